"""Rows of a data file, each with its place: JSONL, JSON array, CSV, Parquet, folders of these, a hub data set.

Reading is strict. What is not exactly a row (a byte order mark, NaN, a key given twice, bytes that are not UTF-8, a
cut-off last line, a line over 10 MB) is refused with file:line, the reason and a remedy, or put aside in a quarantine
file and counted: `on_bad_row` decides. Nothing is dropped silently; only lines of nothing but white space are no rows.
"""

import csv
import difflib
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

LINE_LIMIT_BYTES = 10_000_000
RAW_LIMIT_CHARS = 2000
CHUNK_BYTES = 1 << 20
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
BESIDE_DATA = (".md", ".txt", ".yaml", ".yml", ".py", ".lock", ".tmp")  # what lies beside data files in a folder
SPLITS = ("train", "validation", "valid", "val", "dev", "test")
BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
TOO_LONG = "\ud800"  # stands for a line over the limit inside the CSV reader; no decoded text holds a lone surrogate


@dataclass(frozen=True)
class Row:
    """One row and its place, `reviews.jsonl:12`: a line of the file, or a row number for Parquet and the hub."""

    source: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """What was read, and how many rows were put aside."""

    rows: list[Row]
    quarantined: int


@dataclass
class Quarantine:
    """Rows left out, with reasons. `policy` says what a bad row does: stop the run, or be put aside."""

    policy: Literal["stop", "quarantine"]
    entries: list[dict[str, str]] = field(default_factory=list)

    def refuse(self, source: str, reason: str, raw: Any = "") -> None:
        """Raise ValueError `source: reason` under policy stop, put the row aside otherwise."""
        if self.policy == "stop":
            raise ValueError(f"{source}: {reason}")
        self.put(source, reason, raw)

    def put(self, source: str, reason: str, raw: Any) -> None:
        """Put a row aside whatever the policy."""
        text = raw if isinstance(raw, str) else json.dumps(raw, ensure_ascii=False, default=str)
        self.entries.append({"source": source, "reason": reason, "raw": text[:RAW_LIMIT_CHARS]})

    def write(self, path: Path) -> Path | None:
        """Write the rows put aside as JSONL (source, reason, raw), whole or not at all; None if there are none.

        Every rank of a job writes the same file, so it is renamed into place. A file of an earlier run is removed."""
        if not self.entries:
            path.unlink(missing_ok=True)
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        lines = (json.dumps(entry, ensure_ascii=False) for entry in self.entries)
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
        draft.replace(path)
        return path


def read_rows(
    name: str,
    split: str = "train",
    on_bad_row: Literal["stop", "quarantine"] = "stop",
    quarantine_path: Path | None = None,
) -> Rows:
    """Read every row of a file, folder, `asset:NAME` or hub data set (`OWNER/NAME` or `OWNER/NAME:CONFIG`).

    Raises ValueError, one line, for a name that is none of these and, under policy stop, for the first bad row.
    """
    quarantine = Quarantine(on_bad_row)
    rows = read_into(quarantine, name, split)
    if quarantine_path is not None:
        quarantine.write(quarantine_path)
    return Rows(rows, len(quarantine.entries))


def read_into(quarantine: Quarantine, name: str, split: str) -> list[Row]:
    """Like `read_rows`, with bad rows going to a quarantine that the caller writes."""
    if name.startswith("asset:"):
        from ..launch.assets import resolve  # only rows of assets need the downloader

        path = resolve(name)
    else:
        path = Path(name).expanduser()
    if path.is_dir():
        return [row for file in _files(path, split) for row in _read_file(file, quarantine)]
    if path.is_file():
        return list(_read_file(path, quarantine))
    if (
        path.suffix.lower() in SUFFIXES
        or name.startswith((".", "/", "~"))
        or not re.fullmatch(r"[\w.-]+/[\w.:-]+", name)
    ):
        raise ValueError(f"data: {name} is not a file, a folder or a hub name (OWNER/NAME){_near(path)}")
    return list(_read_hub(name, split))


def _read_file(path: Path, quarantine: Quarantine) -> Iterator[Row]:
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return _read_jsonl(path, quarantine)
        case ".json":
            return _read_json(path, quarantine)
        case ".csv":
            return _read_csv(path, quarantine, ",")
        case ".tsv":
            return _read_csv(path, quarantine, "\t")
        case ".parquet":
            return _read_parquet(path)
    raise ValueError(
        f"data: {path} has an unknown suffix; use one of {', '.join(SUFFIXES)} (unpack it first if packed)"
    )


# --- JSON ---


def _read_jsonl(path: Path, quarantine: Quarantine) -> Iterator[Row]:
    for number, line, complaint in _lines(path):
        if not line.strip() and not complaint:
            continue
        source = f"{path}:{number}"
        try:
            if complaint:
                raise ValueError(complaint)
            values = _parse_row(_decode(line))
        except ValueError as error:
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = _explain(error, last=not line.endswith(b"\n"))
            quarantine.refuse(source, reason, line[: 4 * RAW_LIMIT_CHARS].decode("utf-8", "backslashreplace"))
            continue
        yield Row(source, values)


def _read_json(path: Path, quarantine: Quarantine) -> Iterator[Row]:
    """Read an array of objects; a file of one object a line is read as JSONL whatever its suffix."""
    with path.open("rb") as file:
        head = file.read(1024)
        _refuse_utf16(path, head)
        if head.startswith(BOM):
            raise ValueError(f"{path}:1: {_bom_reason(path)}")
        if head.lstrip()[:1] == b"{":
            yield from _read_jsonl(path, quarantine)
            return
        raw = head + file.read()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: {_not_utf8(raw, error)}") from None
    yield from _array_rows(path, text, quarantine)


def _array_rows(path: Path, text: str, quarantine: Quarantine) -> Iterator[Row]:
    at = _skip_space(text, 0)
    line = 1 + text.count("\n", 0, at)
    if text[at : at + 1] != "[":
        raise ValueError(f"{path}:{line}: a JSON file must hold an array of rows, or one row a line")
    previous, at = at, _skip_space(text, at + 1)
    lenient = json.JSONDecoder()
    while text[at : at + 1] != "]":
        line += text.count("\n", previous, at)
        source = f"{path}:{line}"
        try:
            _, end = lenient.raw_decode(text, at)
        except json.JSONDecodeError as error:
            where = f"{path}:{line + text.count(chr(10), at, error.pos)}"
            cut = _skip_space(text, error.pos) >= len(text) or error.msg.startswith("Unterminated")
            hint = "the file ends inside a row" if cut else "no row after this one can be read"
            raise ValueError(f"{where}: not JSON: {error.msg}; {hint}; mend the file") from None
        except RecursionError:
            raise ValueError(f"{source}: nested too deeply to be a row; mend the file") from None
        try:
            if end - at > LINE_LIMIT_BYTES:
                raise ValueError(_long_reason(end - at))
            row = Row(source, _parse_row(text[at:end]))
        except ValueError as error:
            quarantine.refuse(source, str(error), text[at : min(end, at + RAW_LIMIT_CHARS)])
        else:
            yield row
        previous, at = at, _skip_space(text, end)
        if text[at : at + 1] == ",":
            at = _skip_space(text, at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", previous, at)
            raise ValueError(f"{path}:{line}: the array is not closed: ',' or ']' expected; is the file whole?")
    rest = _skip_space(text, at + 1)
    if rest != len(text):
        raise ValueError(f"{path}:{1 + text.count(chr(10), 0, rest)}: something follows the array; remove it")


def _skip_space(text: str, at: int) -> int:
    match = re.compile(r"[ \t\r\n]*").match(text, at)
    return match.end() if match else at


def _parse_row(text: str) -> dict[str, Any]:
    try:
        values = _STRICT.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply to be a row; flatten it") from None
    if not isinstance(values, dict):
        raise ValueError(f"a row must be an object with named columns, not {type(values).__name__}")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                "an escaped lone surrogate (\\ud800 to \\udfff), which is no character; remove it"
            ) from None
    return values


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice; keep one")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write null or leave the key out")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} overflows a number; write a smaller one")
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)


def _explain(error: json.JSONDecodeError, last: bool) -> str:
    where = f"not JSON: {error.msg} at column {error.colno}"
    if last:
        return f"the last line is cut off ({where}); the file was not written to its end, fetch it again"
    return f"{where}; each line must be one JSON object"


# --- lines ---


def _lines(path: Path) -> Iterator[tuple[int, bytes, str]]:
    """Yield (number, line, complaint). A line over the limit comes cut, having never been held whole."""
    number = 0
    with path.open("rb") as file:
        _refuse_utf16(path, file.peek(2)[:2] if isinstance(file, io.BufferedReader) else b"")
        while line := file.readline(LINE_LIMIT_BYTES + 1):
            number += 1
            length = len(line)
            complaint = _bom_reason(path) if number == 1 and line.startswith(BOM) else ""
            if length > LINE_LIMIT_BYTES:
                line, tail = line[: 4 * RAW_LIMIT_CHARS], line
                while not tail.endswith(b"\n") and (tail := file.readline(CHUNK_BYTES)):
                    length += len(tail)
                complaint = _long_reason(length)
            yield number, line, complaint


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(line, error)) from None


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    column = error.start - data.rfind(b"\n", 0, error.start)
    return (
        f"not UTF-8: byte 0x{data[error.start]:02x} at byte {column} of the line; convert the file with iconv -t UTF-8"
    )


def _bom_reason(path: Path) -> str:
    return f"the file starts with a byte order mark; remove it: sed -i '1s/^\\xEF\\xBB\\xBF//' {path}"


def _long_reason(length: int) -> str:
    return f"{length:,} bytes, a row may have {LINE_LIMIT_BYTES:,}; split the document"


def _refuse_utf16(path: Path, head: bytes) -> None:
    if head.startswith(UTF16):
        raise ValueError(f"{path}:1: the file is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {path}")


# --- CSV ---


def _read_csv(path: Path, quarantine: Quarantine, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(LINE_LIMIT_BYTES)
    reader = csv.reader(_csv_lines(path), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise ValueError(f"{path}:1: not CSV: {error}; the first line must name the columns") from None
    if not header or len(set(header)) != len(header) or not all(name.strip() for name in header):
        raise ValueError(f"{path}:1: the first line must name every column once, not {','.join(header or [])[:200]!r}")
    if reason := _csv_complaint(header):
        raise ValueError(f"{path}:1: {reason}")
    while True:
        source = f"{path}:{reader.line_num + 1}"
        cells: list[str] = []
        try:
            cells = next(reader)
            reason = _csv_complaint(cells)
            if not reason and cells and len(cells) != len(header):
                reason = f"{len(cells)} cells, the header names {len(header)} columns; quote cells that hold commas"
        except StopIteration:
            return
        except csv.Error as error:
            cut = "unexpected end of data" in str(error)
            reason = (
                "the last row is cut off inside a quoted cell; fetch the file again" if cut else f"not CSV: {error}"
            )
        if reason:
            raw = delimiter.join(cells).encode("utf-8", "surrogateescape" if TOO_LONG not in reason else "replace")
            quarantine.refuse(source, reason, raw.decode("utf-8", "backslashreplace"))
        elif cells:
            yield Row(source, dict(zip(header, cells, strict=True)))


def _csv_lines(path: Path) -> Iterator[str]:
    for number, line, complaint in _lines(path):
        if number == 1 and complaint:
            raise ValueError(f"{path}:1: {complaint}")
        yield f"{TOO_LONG}{complaint}\n" if complaint else line.decode("utf-8", "surrogateescape")


def _csv_complaint(cells: Iterable[str]) -> str:
    for cell in cells:
        if TOO_LONG in cell:
            return cell.partition(TOO_LONG)[2].strip()
        escaped = re.search("[\udc80-\udcff]", cell)
        if escaped:
            byte = ord(escaped.group()) - 0xDC00
            return f"not UTF-8: byte 0x{byte:02x} in {cell[:30]!a}; convert the file with iconv -t UTF-8"
    return ""


# --- Parquet, folders, the hub ---


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:{number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a whole Parquet file: {reason[:200]}; fetch it again") from None


def _files(folder: Path, split: str) -> list[Path]:
    """Return a folder's data files in order; where names say train, test ..., those of the split."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    beside = [path for path in files if path.suffix.lower() in BESIDE_DATA or not path.suffix]
    strange = [path for path in files if path.suffix.lower() not in SUFFIXES and path not in beside]
    if strange:
        raise ValueError(f"data: {strange[0]} has an unknown suffix; move it away, or use {', '.join(SUFFIXES)}")
    data = [path for path in files if path.suffix.lower() in SUFFIXES and path.name != "manifest.json"]
    if not data:
        raise ValueError(f"data: {folder} holds no data file ({', '.join(SUFFIXES)})")
    words = {path: set(re.split(r"[^a-z0-9]+", str(path.relative_to(folder)).lower())) for path in data}
    chosen = [path for path in data if split.lower() in words[path]]
    if not chosen and any(words[path] & set(SPLITS) for path in data):
        raise ValueError(f"data.split: {folder} has no file named for split {split!r}; name one that is there")
    return chosen or data


def _read_hub(name: str, split: str) -> Iterator[Row]:
    import datasets  # heavy, and only hub names need it

    owner_name, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(owner_name, config or None, split=split)
    except Exception as error:  # whatever the hub client raises: it has dozens of classes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"data: {name!r} is no file here, and the hub does not give its split {split!r}: {reason}; check the name, "
            "data.split and the network, or give a local file"
        ) from None
    for number, values in enumerate(loaded, 1):
        yield Row(f"{name}[{split}]:{number}", dict(values))


def _near(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; {folder} does not exist"
    near = difflib.get_close_matches(path.name, [item.name for item in folder.iterdir()], n=1, cutoff=0.5)
    return f"; did you mean {folder / near[0]}?" if near else ""
