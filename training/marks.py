"""Finding what each message says inside a rendering: mark it, render, look where the marks went.

A mark is a private-use character that occurs nowhere else, one for each message, put around what the message says.
Taken out again, the rendering must be the unmarked one; where it is not, the template looked at the contents, and the
caller compares renderings instead.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

REASONING_TAGS = ("<think>", "</think>")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Marked:
    """A rendering without its marks, and where they stood: (position, message), in order."""

    text: str
    marks: list[tuple[int, int]]

    def of(self, message: int) -> list[int]:
        return [position for position, owner in self.marks if owner == message]


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_strings(key, change): map_strings(item, change) for key, item in value.items()}
    return [map_strings(item, change) for item in value] if isinstance(value, list | tuple) else value


def mark_message(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """Copy a message with `mark` around what it says. Marks stay inside white space and reasoning tags, which templates
    strip and split at; a text beside tool calls stays empty if it is."""
    copy = dict(message)
    calls = message.get("tool_calls")
    for key in ("content", *REASONING_KEYS):
        text = message.get(key)
        if isinstance(text, str) and (text.strip() or (key == "content" and not calls)):
            tags = REASONING_TAGS if message["role"] == "assistant" else ()
            copy[key] = _mark_text(text, mark, tags, fill=key == "content" and not calls)
    if isinstance(calls, list):
        copy["tool_calls"] = [_mark_call(call, mark) for call in calls]
    return copy


def _mark_text(text: str, mark: str, tags: Sequence[str], fill: bool) -> str:
    edges = sorted({0, len(text), *(edge for tag in tags for edge in _edges(text, tag))})
    parts = []
    for a, b in pairwise(edges) if len(edges) > 1 else [(0, len(text))]:
        part = text[a:b]
        core = part.strip()
        if core and core not in tags:
            before = part[: len(part) - len(part.lstrip())]
            after = part[len(part.rstrip()) :]
            part = f"{before}{mark}{core}{mark}{after}"
        elif not core and b == len(text) and fill:
            part += mark
        parts.append(part)
    if fill and parts[-1] in tags:
        parts.append(mark)
    return "".join(parts)


def _edges(text: str, tag: str) -> Iterator[int]:
    at = text.find(tag)
    while at >= 0:
        yield at
        yield at + len(tag)
        at = text.find(tag, at + len(tag))


def _mark_call(call: Any, mark: str) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _mark_call(call["function"], mark)}
    return {**call, "name": f"{mark}{call['name']}{mark}"} if isinstance(call.get("name"), str) else call


def find_marks(text: str, owners: Mapping[str, int]) -> Marked:
    marks: list[tuple[int, int]] = []
    kept: list[str] = []
    length = start = 0
    for at, character in enumerate(text):
        if character in owners:
            kept.append(text[start:at])
            length += at - start
            start = at + 1
            marks.append((length, owners[character]))
    return Marked("".join([*kept, text[start:]]), marks)


def common_prefix(a: str, b: str) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:  # binary search: comparing slices is fast, comparing characters in Python is not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
