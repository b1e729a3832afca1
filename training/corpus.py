"""Documents of a recipe's sources, cut into pieces that any process can read by itself, one document at a time.

How a source is cut depends on its files alone, never on who reads them: line files by bytes, Parquet by row groups, hub
sets by rows, folders of text by file. A text file is one document; a row's document is its column `text`.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .formats import to_text
from .json_rows import read_jsonl
from .lines import BOM, LINE_LIMIT_BYTES, bom_reason, count_lines, decode, long_reason, refuse_utf16
from .quarantine import Quarantine, Row
from .recipe import Data
from .rows import (
    SUFFIXES,
    TEXT_SUFFIXES,
    files_in,
    inside,
    load_hub,
    local_path,
    read_file,
    read_hub,
    read_parquet,
    shown_files,
)

MIN_PIECE_BYTES, MAX_PIECE_BYTES, PIECES = 1 << 20, 256 << 20, 256


@dataclass(frozen=True)
class Span:
    """A part of one file or hub set: bytes of a line file, row groups of Parquet, rows of a hub set, else the whole."""

    path: str
    kind: Literal["text", "lines", "groups", "hub", "whole"]
    start: int
    end: int
    bytes: int
    changed_ns: int


@dataclass(frozen=True)
class Piece:
    """What one process reads at a time: spans of one source, in order. Pieces are numbered over all sources."""

    number: int
    source: int
    spans: tuple[Span, ...]


def sources_of(data: Data) -> tuple[str, ...]:
    """The names of what a recipe trains on."""
    return tuple(data.mixture) if data.mixture is not None else (data.train,)


def cut(data: Data) -> list[Piece]:
    """Cut every source into pieces of about the same size. Raises ValueError, one line, for what cannot be read."""
    whole = [
        [span for path in paths_of(name, data.split) for span in _spans(name, path, data.split)]
        for name in sources_of(data)
    ]
    total = sum(span.bytes for spans in whole for span in spans)
    limit = max(MIN_PIECE_BYTES, min(MAX_PIECE_BYTES, total // PIECES))
    pieces: list[Piece] = []
    for source, spans in enumerate(whole):
        held: list[Span] = []
        size = 0
        for part in itertools.chain.from_iterable(_divide(span, limit) for span in spans):
            if held and size + part.bytes > limit:
                pieces.append(Piece(len(pieces), source, tuple(held)))
                held, size = [], 0
            held.append(part)
            size += part.bytes
        pieces.append(Piece(len(pieces), source, tuple(held)))
    return pieces


def paths_of(name: str, split: str | None) -> list[Path | None]:
    """The files behind a source, in order, of all splits where `split` is None; [None] for a hub set. Text files count
    where no file of rows is there."""
    path = local_path(name)
    if path is None or not path.is_dir():
        return [path]
    if not any(item.suffix.lower() in SUFFIXES and item.name != "manifest.json" for item in shown_files(path)):
        return list(files_in(path, split, TEXT_SUFFIXES))
    return list(files_in(path, split))


def _spans(name: str, path: Path | None, split: str) -> Iterator[Span]:
    if path is None:
        loaded = load_hub(name, split)
        yield Span(name, "hub", 0, len(loaded), int(loaded.data.nbytes), 0)
        return
    state, suffix = path.stat(), path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                sizes = [file.metadata.row_group(n).total_byte_size for n in range(file.num_row_groups)]
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: not a whole Parquet file: {reason}; fetch it again") from None
        for number, size in enumerate(sizes):
            yield Span(str(path), "groups", number, number + 1, size, state.st_mtime_ns)
        return
    kind = "text" if suffix in TEXT_SUFFIXES else "lines" if suffix in (".jsonl", ".ndjson") else "whole"
    yield Span(str(path), kind, 0, state.st_size, state.st_size, state.st_mtime_ns)


def _divide(span: Span, limit: int) -> Iterator[Span]:
    if span.kind not in ("lines", "hub") or span.bytes <= limit:
        yield span
        return
    parts = -(-span.bytes // limit)
    edges = [span.start + (span.end - span.start) * n // parts for n in range(parts + 1)]
    for start, end in itertools.pairwise(edges):
        yield Span(span.path, span.kind, start, end, span.bytes // parts, span.changed_ns)


class _Shifted(Quarantine):
    """A quarantine for a range of lines: it gives them the numbers that they have in the file."""

    def __init__(self, outer: Quarantine, span: Span) -> None:
        super().__init__(outer.policy)
        self.outer, self.span = outer, span

    @functools.cached_property
    def before(self) -> int:
        """Lines in front of the range."""
        return count_lines(Path(self.span.path), self.span.start - 1) + 1 if self.span.start else 0

    def refuse(self, source: str, reason: str, raw: Any = "") -> None:
        """Raise or put aside, under the true line number."""
        self.outer.refuse(self.name(source), reason, raw)

    def name(self, source: str) -> str:
        """`FILE:NUMBER` with the number in the file."""
        path, _, number = source.rpartition(":")
        return f"{path}:{int(number) + self.before}"


def documents(piece: Piece, data: Data, quarantine: Quarantine) -> Iterator[str]:
    """Yield a piece's documents. Raises ValueError under policy stop, else puts bad ones in the quarantine."""
    for span in piece.spans:
        _refuse_changed(span)
        shifted = _Shifted(quarantine, span)
        if span.kind == "text":
            if (text := _read_text(Path(span.path), quarantine)) is not None:
                yield text
            continue
        for row in _rows(span, data.split, quarantine, shifted):
            try:
                if not inside(row, data):
                    quarantine.outside += 1
                    continue
                text = to_text(row)
            except ValueError as error:
                source = shifted.name(row.source) if span.kind == "lines" else row.source
                reason = str(error).replace(row.source, source, 1)
                if reason.startswith("data.where"):
                    raise ValueError(reason) from None
                quarantine.refuse(source, reason.removeprefix(f"{source}: "), row.values)
                continue
            yield text


def _rows(span: Span, split: str, quarantine: Quarantine, shifted: Quarantine) -> Iterator[Row]:
    match span.kind:
        case "lines":
            return read_jsonl(Path(span.path), shifted, span.start, span.end)
        case "groups":
            return read_parquet(Path(span.path), range(span.start, span.end))
        case "hub":
            return read_hub(span.path, split, range(span.start, span.end))
    return read_file(Path(span.path), quarantine)


def _read_text(path: Path, quarantine: Quarantine) -> str | None:
    size = path.stat().st_size
    raw = b""
    try:
        if size > LINE_LIMIT_BYTES:
            raise ValueError(long_reason(size))
        raw = path.read_bytes()
        if raw.startswith(BOM):
            raise ValueError(bom_reason(path))
        refuse_utf16(path, raw[:2])
        text = decode(raw)
        if not text.strip():
            raise ValueError("holds no text; remove the file")
        return text
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}:1: ")
        quarantine.refuse(str(path), reason, raw[:2000].decode("utf-8", "backslashreplace"))
        return None


def _refuse_changed(span: Span) -> None:
    if span.kind == "hub":
        return
    path = Path(span.path)
    if not path.is_file() or path.stat().st_mtime_ns != span.changed_ns:
        raise ValueError(f"data: {path} changed while shards were built from it; run `shipyard data build` again")


def pieces_to_json(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """Plain values of pieces."""
    return [asdict(piece) for piece in pieces]


def piece_from_json(tree: dict[str, Any]) -> Piece:
    """A piece from what `pieces_to_json` gave."""
    return Piece(tree["number"], tree["source"], tuple(Span(**span) for span in tree["spans"]))
