"""Rows of a data file, each with its place: JSONL, JSON array, CSV, Parquet, folders of these, a hub data set.

Reading is strict. What is not exactly a row (a byte order mark, NaN, a key given twice, bytes that are not UTF-8, a
cut-off last line, a line over 10 MB) is refused with file:line, the reason and a remedy, or put aside in a quarantine
file and counted: `on_bad_row` decides. Nothing is dropped silently; only lines of nothing but white space are no rows.
"""

import csv
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .json_rows import read_json, read_jsonl
from .lines import LINE_LIMIT_BYTES, read_lines
from .quarantine import Quarantine, Row
from .recipe import Data

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXT_SUFFIXES = (".txt",)  # one document a file, for pretraining
BESIDE_DATA = (".md", ".txt", ".yaml", ".yml", ".py", ".lock", ".tmp")  # what lies beside data files in a folder
SPLITS = ("train", "validation", "valid", "val", "dev", "test")
TOO_LONG = "\ud800"  # stands for a line over the limit inside the CSV reader; no decoded text holds a lone surrogate


@dataclass(frozen=True)
class Rows:
    """What was read, and how many rows were put aside."""

    rows: list[Row]
    quarantined: int


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
    path = local_path(name)
    if path is None:
        return list(read_hub(name, split))
    files = files_in(path, split) if path.is_dir() else [path]
    return [row for file in files for row in read_file(file, quarantine)]


def local_path(name: str) -> Path | None:
    """The path that a data name stands for, `asset:NAME` fetched; None for a hub name. Raises ValueError."""
    if name.startswith("asset:"):
        from ..launch.assets import resolve  # only rows of assets need the downloader

        path = resolve(name)
    else:
        path = Path(name).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if (
        path.suffix.lower() in (*SUFFIXES, *TEXT_SUFFIXES)
        or name.startswith((".", "/", "~"))
        or not re.fullmatch(r"[\w.-]+/[\w.:-]+", name)
    ):
        raise ValueError(f"data: {name} is not a file, a folder or a hub name (OWNER/NAME){_near(path)}")
    return None


def read_file(path: Path, quarantine: Quarantine) -> Iterator[Row]:
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return read_jsonl(path, quarantine)
        case ".json":
            return read_json(path, quarantine)
        case ".csv":
            return _read_csv(path, quarantine, ",")
        case ".tsv":
            return _read_csv(path, quarantine, "\t")
        case ".parquet":
            return read_parquet(path)
    raise ValueError(
        f"data: {path} has an unknown suffix; use one of {', '.join(SUFFIXES)} (unpack it first if packed)"
    )


def inside(row: Row, data: Data) -> bool:
    """Whether a row is among those that data.where asks for. Raises ValueError for a column that it lacks."""
    for column, wanted in (data.where or {}).items():
        if column not in row.values:
            known = ", ".join(map(str, list(row.values)[:8]))
            raise ValueError(f"data.where: {row.source} has no column {column!r}; its columns are {known}")
        if str(row.values[column]) != wanted:
            return False
    return True


# --- CSV ---


def _read_csv(path: Path, quarantine: Quarantine, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(LINE_LIMIT_BYTES)
    record: list[str] = []  # lines of the row that is being read
    reader = csv.reader(_csv_lines(path, record), delimiter=delimiter, strict=True)
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
        record.clear()
        try:
            cells = next(reader)
            reason = _csv_complaint(cells)
            if not reason and cells and len(cells) != len(header):
                reason = f"{len(cells)} cells, the header names {len(header)} columns; quote cells that hold commas"
        except StopIteration:
            return
        except csv.Error as error:
            reason = _csv_broken(source, error, record)
        if reason:
            raw = "".join(record).replace(TOO_LONG, "").encode("utf-8", "surrogateescape")
            quarantine.refuse(source, reason, raw.decode("utf-8", "backslashreplace"))
        elif cells:
            yield Row(source, dict(zip(header, cells, strict=True)))


def _csv_broken(source: str, error: csv.Error, record: Sequence[str]) -> str:
    """Say what is wrong with a row. Raises ValueError, whatever becomes of bad rows, where its quotes do not tell where
    it ends: what follows would be read as rows that nobody wrote, or rows would be lost in it."""
    if "unexpected end of data" in str(error):
        if len(record) > 1:
            lines = f"it would hold {len(record)} lines"
            raise ValueError(
                f"{source}: a quoted cell begins that does not end, and {lines}; close it, or fetch the file again"
            )
        return "the last row is cut off inside a quoted cell; fetch the file again"
    if sum(line.count('"') for line in record) % 2:
        raise ValueError(
            f"{source}: not CSV: {error}; a quote is left open, so no row after it can be read; write a quote inside a "
            "quoted cell twice"
        )
    return f"not CSV: {error}"


def _csv_lines(path: Path, record: list[str]) -> Iterator[str]:
    for number, line, complaint in read_lines(path):
        if number == 1 and complaint:
            raise ValueError(f"{path}:1: {complaint}")
        record.append(f"{TOO_LONG}{complaint}\n" if complaint else line.decode("utf-8", "surrogateescape"))
        yield record[-1]


def _csv_complaint(cells: Iterable[str]) -> str:
    for cell in cells:
        if TOO_LONG in cell:  # the complaint holds commas
            return ",".join(cells).partition(TOO_LONG)[2].splitlines()[0]
        escaped = re.search("[\udc80-\udcff]", cell)
        if escaped:
            byte = ord(escaped.group()) - 0xDC00
            return f"not UTF-8: byte 0x{byte:02x} in {cell[:30]!a}; convert the file with iconv -t UTF-8"
    return ""


# --- Parquet, folders, the hub ---


def read_parquet(path: Path, groups: range | None = None) -> Iterator[Row]:
    """Rows of a Parquet file, or of some of its row groups, a thousand in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = range(file.num_row_groups) if groups is None else groups
            number = sum(file.metadata.row_group(group).num_rows for group in range(wanted.start))
            for batch in file.iter_batches(batch_size=1024, row_groups=list(wanted)):
                for values in batch.to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    yield Row(f"{path}:{number}", _as_written(values))
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a whole Parquet file: {reason[:200]}; fetch it again") from None


def _as_written(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what Arrow fills in: objects of one column all have the same keys there, null where a row had none
    (the arguments of another tool's calls). The columns themselves stay."""
    return {column: _without_nulls(value) for column, value in values.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def files_in(folder: Path, split: str | None, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Return a folder's data files in order; where names say train, test ..., those of the split (None: all)."""
    files = [path for path in shown_files(folder) if path.name != "manifest.json"]
    beside = [path for path in files if path.suffix.lower() in BESIDE_DATA or not path.suffix]
    strange = [path for path in files if path.suffix.lower() not in suffixes and path not in beside]
    if strange:
        raise ValueError(f"data: {strange[0]} has an unknown suffix; move it away, or use {', '.join(suffixes)}")
    data = [path for path in files if path.suffix.lower() in suffixes]
    if not data:
        raise ValueError(f"data: {folder} holds no data file ({', '.join(suffixes)})")
    if split is None:
        return data
    words = {path: set(re.split(r"[^a-z0-9]+", str(path.relative_to(folder)).lower())) for path in data}
    chosen = [path for path in data if split.lower() in words[path]]
    if not chosen and any(words[path] & set(SPLITS) for path in data):
        raise ValueError(f"data.split: {folder} has no file named for split {split!r}; name one that is there")
    return chosen or data


def shown_files(folder: Path) -> list[Path]:
    """Files under a folder, in order, but for hidden ones and what hidden folders keep: copies of editors, caches of
    downloads."""
    found = (path for path in folder.rglob("*") if not any(p.startswith(".") for p in path.relative_to(folder).parts))
    return sorted(path for path in found if path.is_file())


def read_hub(name: str, split: str, rows: range | None = None) -> Iterator[Row]:
    """Rows of a hub data set, or some of them."""
    loaded = load_hub(name, split)
    wanted = range(len(loaded)) if rows is None else rows
    for number, values in enumerate(loaded.select(wanted), wanted.start + 1):
        yield Row(f"{name}[{split}]:{number}", _as_written(values))


def load_hub(name: str, split: str | None) -> Any:
    """A hub data set's split, memory-mapped by `datasets`, or all of them by name. Raises ValueError when it cannot be
    had."""
    import datasets  # heavy, and only hub names need it

    owner_name, _, config = name.partition(":")
    try:
        return datasets.load_dataset(owner_name, config or None, split=split)
    except Exception as error:  # whatever the hub client raises: it has dozens of classes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        wanted = f"its split {split!r}" if split else "it"
        raise ValueError(
            f"data: {name!r} is no file here, and the hub does not give {wanted}: {reason}; check the name, "
            "data.split and the network, or give a local file"
        ) from None


def _near(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; {folder} does not exist"
    near = difflib.get_close_matches(path.name, [item.name for item in folder.iterdir()], n=1, cutoff=0.5)
    return f"; did you mean {folder / near[0]}?" if near else ""
