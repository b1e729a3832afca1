"""Lines of a file with their numbers: never held whole beyond a limit, and what is wrong with them said in words."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

LINE_LIMIT_BYTES = 10_000_000
KEPT_BYTES = 8000  # of a line over the limit
CHUNK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_lines(path: Path, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes, str]]:
    """Yield (number, line, complaint). A line over the limit comes cut, having never been held whole.

    With `start` and `end` (bytes): the lines whose first byte lies between them, numbered from 1 within the range, so
    that ranges side by side read every line once.
    """
    number = 0
    with path.open("rb") as file:
        refuse_utf16(path, file.peek(2)[:2] if isinstance(file, io.BufferedReader) else b"")
        at = _line_start(file, start)
        while (end is None or at < end) and (line := file.readline(LINE_LIMIT_BYTES + 1)):
            number += 1
            length = len(line)
            complaint = bom_reason(path) if at == 0 and line.startswith(BOM) else ""
            if length > LINE_LIMIT_BYTES:
                line, tail = line[:KEPT_BYTES], line
                while not tail.endswith(b"\n") and (tail := file.readline(CHUNK_BYTES)):
                    length += len(tail)
                complaint = long_reason(length)
            at += length
            yield number, line, complaint


def _line_start(file: BinaryIO, start: int) -> int:
    """Go to the first line that begins at or after byte `start`; return where it begins."""
    if start:
        file.seek(start - 1)
        while (piece := file.readline(CHUNK_BYTES)) and not piece.endswith(b"\n"):
            pass
    return file.tell()


def count_lines(path: Path, end: int) -> int:
    """How many lines begin before byte `end` and end before it, too."""
    count = 0
    with path.open("rb") as file:
        while end > 0 and (chunk := file.read(min(CHUNK_BYTES, end))):
            count += chunk.count(b"\n")
            end -= len(chunk)
    return count


def decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(line, error)) from None


def not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    column = error.start - data.rfind(b"\n", 0, error.start)
    return (
        f"not UTF-8: byte 0x{data[error.start]:02x} at byte {column} of the line; convert the file with iconv -t UTF-8"
    )


def bom_reason(path: Path) -> str:
    return f"the file starts with a byte order mark; remove it: sed -i '1s/^\\xEF\\xBB\\xBF//' {path}"


def long_reason(length: int) -> str:
    return f"{length:,} bytes, a row may have {LINE_LIMIT_BYTES:,}; split the document"


def refuse_utf16(path: Path, head: bytes) -> None:
    if head.startswith(UTF16):
        raise ValueError(f"{path}:1: the file is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {path}")
