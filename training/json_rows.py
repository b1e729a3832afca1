"""Rows of JSONL files and JSON arrays, strictly: no NaN, no key given twice, no cut-off end, no lone surrogate."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from .lines import (
    BOM,
    KEPT_BYTES,
    LINE_LIMIT_BYTES,
    bom_reason,
    decode,
    long_reason,
    not_utf8,
    read_lines,
    refuse_utf16,
)
from .quarantine import RAW_LIMIT_CHARS, Quarantine, Row


def read_jsonl(path: Path, quarantine: Quarantine, start: int = 0, end: int | None = None) -> Iterator[Row]:
    """Rows of a file, or of the lines that begin between two bytes (numbered from 1 within them)."""
    for number, line, complaint in read_lines(path, start, end):
        if not line.strip() and not complaint:
            continue
        source = f"{path}:{number}"
        try:
            if complaint:
                raise ValueError(complaint)
            values = _parse_row(decode(line))
        except ValueError as error:
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = _explain(error, last=not line.endswith(b"\n"))
            quarantine.refuse(source, reason, line[:KEPT_BYTES].decode("utf-8", "backslashreplace"))
            continue
        yield Row(source, values)


def read_json(path: Path, quarantine: Quarantine) -> Iterator[Row]:
    """Read an array of objects; a file of one object a line is read as JSONL whatever its suffix."""
    with path.open("rb") as file:
        head = file.read(1024)
        refuse_utf16(path, head)
        if head.startswith(BOM):
            raise ValueError(f"{path}:1: {bom_reason(path)}")
        if head.lstrip()[:1] == b"{":
            yield from read_jsonl(path, quarantine)
            return
        raw = head + file.read()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: {not_utf8(raw, error)}") from None
    yield from _array_rows(path, text, quarantine)


def _array_rows(path: Path, text: str, quarantine: Quarantine) -> Iterator[Row]:
    at = _skip_space(text, 0)
    line = 1 + text.count("\n", 0, at)
    if text[at : at + 1] != "[":
        raise ValueError(f"{path}:{line}: a JSON file must hold an array of rows, or one row a line")
    previous, at = at, _skip_space(text, at + 1)
    lenient = json.JSONDecoder(parse_int=str)
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
                raise ValueError(long_reason(end - at))
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


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python's limit is 4,300 digits
        raise ValueError(f"a number of {len(text)} digits; write it as text") from None


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} overflows a number; write a smaller one")
    return value


_STRICT = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole
)


def _explain(error: json.JSONDecodeError, last: bool) -> str:
    where = f"not JSON: {error.msg} at column {error.colno}"
    if last:
        return f"the last line is cut off ({where}); the file was not written to its end, fetch it again"
    return f"{where}; each line must be one JSON object"
