"""Where the replies of one conversation are in its rendering, whatever the chat template does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .control_tokens import ControlTokens
from .marks import Marked, common_prefix, find_marks, mark_message

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool], str]  # messages, and whether the generation prompt follows


@dataclass(frozen=True)
class _Marks:
    """The messages with marks, the owner of each mark, and where the marks stand in the text."""

    messages: list[dict[str, Any]]
    owners: dict[str, int]
    shown: Marked


class Replies:
    """One conversation's `text`, which is what trains, and the spans of the replies in it.

    The text is the template's rendering, with one exception: where the template shows what comes before the last reply
    otherwise than to a server (Mistral leaves the system turn out unless the last message is the user's), that is
    rendered as a server does, and the last reply follows.
    """

    def __init__(
        self,
        messages: list[dict[str, Any]],
        render: Render,
        control: ControlTokens,
        end_ids: frozenset[int],
        unused: Iterator[str],
    ) -> None:
        self._messages, self._render, self._control, self._end_ids = messages, render, control, end_ids
        self._unused = unused
        self._last = len(messages) - 1
        self.text = render(messages, False)
        self._prompts: dict[int, str] = {}
        if messages[-1]["role"] == "assistant" and not self.text.startswith(self._prompt(self._last)):
            self._ask_as_a_server_does()
        self._refuse_left_out()

    def spans(self, supervise_from: int) -> tuple[list[tuple[int, int]], bool]:
        """Return each assistant turn's [start, end), and whether the last message lacks an end token."""
        spans: list[tuple[int, int]] = []
        unended = False
        for index, message in enumerate(self._messages):
            if message["role"] != "assistant" or index < supervise_from:
                continue
            start, end = self._plain_span(index) or self._marked_span(index)
            if end < 0:
                unended, end = True, len(self.text)
            spans.append((max(start, spans[-1][1]) if spans else start, end))
        return spans, unended

    def _prompt(self, index: int) -> str:
        if index not in self._prompts:
            self._prompts[index] = self._render(self._messages[:index], True)
        return self._prompts[index]

    def _plain_span(self, index: int) -> tuple[int, int] | None:
        """The common case, without marks: prompt, then the reply's text, then at once an end token."""
        prompt, content = self._prompt(index), self._messages[index].get("content")
        core = content.strip() if isinstance(content, str) else ""
        if not core or not self.text.startswith(prompt):
            return None
        found = self.text.find(core, len(prompt))
        after = found + len(core)
        match = self._control.pattern.search(self.text, after) if found >= 0 else None
        if match is None or self.text[after : match.start()].strip() or not self._ends(match.group()):
            return None
        return len(prompt), match.end()

    def _marked_span(self, index: int) -> tuple[int, int]:
        """Find one reply by its marks; end -1 if it is the last message and no end token follows it."""
        marks = self._marks
        mine = marks.shown.of(index)
        if not mine:
            raise ValueError(f"messages[{index}]: {_LEFT_OUT}")
        start = len(self._prompt(index))
        if not self.text.startswith(self._prompt(index)):
            asked = find_marks(self._render(marks.messages[:index], True), marks.owners)
            start, _ = _after_header(marks.shown, asked, index, mine[0])
        limit = min((at for at, owner in marks.shown.marks if owner != index and at > mine[-1]), default=len(self.text))
        for match in self._control.pattern.finditer(self.text, mine[-1], limit):
            if self._ends(match.group()):
                return start, match.end()
        if index == self._last:
            return start, -1
        # No end token before the next message: the reply ends where the template would stop writing it.
        so_far = find_marks(self._render(marks.messages[: index + 1], False), marks.owners)
        own = so_far.of(index)
        tail = so_far.text[own[-1] :] if own else ""
        return start, mine[-1] + common_prefix(tail, self.text[mine[-1] : limit])

    def _ends(self, token: str) -> bool:
        return self._control.ids[token] in self._end_ids

    # --- marks ---

    @cached_property
    def _marks(self) -> _Marks:
        owners = {next(self._unused): index for index in range(len(self._messages))}
        marked = [mark_message(message, mark) for message, mark in zip(self._messages, owners, strict=True)]
        try:
            shown = find_marks(self._render(marked, False), owners)
        except ValueError:
            shown = Marked("", [])
        if shown.text != self.text:
            shown = self._compare_each(marked, owners)
        return _Marks(marked, owners, shown)

    def _compare_each(self, marked: list[dict[str, Any]], owners: dict[str, int]) -> Marked:
        """The template looks at what the messages say: mark one at a time, and see where the rendering changes."""
        marks: list[tuple[int, int]] = []
        for mark, index in owners.items():
            one = [*self._messages[:index], marked[index], *self._messages[index + 1 :]]
            try:
                other = self._render(one, False)
            except ValueError:
                continue
            if mark in other:
                start = common_prefix(self.text, other)
                end = len(self.text) - common_prefix(self.text[::-1], other[::-1])
                marks += [(start, index), (max(start, end), index)]
        return Marked(self.text, sorted(marks))

    def _ask_as_a_server_does(self) -> None:
        """Put the last reply behind its own prompt, if the two end in the same header and differ only before."""
        marks, prompt = self._marks, self._prompt(self._last)
        mine = marks.shown.of(self._last)
        asked = find_marks(self._render(marks.messages[: self._last], True), marks.owners)
        if not mine or asked.text != prompt:
            return
        start, whole = _after_header(marks.shown, asked, self._last, mine[0])
        if whole:
            moved = [(at - start + len(prompt), owner) for at, owner in marks.shown.marks if owner == self._last]
            self.text = prompt + self.text[start:]
            self.__dict__["_marks"] = _Marks(marks.messages, marks.owners, Marked(self.text, [*asked.marks, *moved]))

    def _refuse_left_out(self) -> None:
        """A question or system turn that the template does not show would be dropped silently."""
        for index, message in enumerate(self._messages):
            content = message.get("content")
            if message["role"] == "assistant" or not isinstance(content, str) or content.strip() in self.text:
                continue
            if not self._marks.shown.of(index):
                raise ValueError(f"messages[{index}]: {_LEFT_OUT}")


_LEFT_OUT = "the chat template leaves this turn out; remove it or use another template"


def _after_header(shown: Marked, asked: Marked, index: int, payload: int) -> tuple[int, bool]:
    """Return where reply `index` starts in a rendering that does not begin with its prompt, and whether the prompt's
    end is there whole: from the last message that both show, follow what the prompt goes on with."""
    for before in range(index - 1, -1, -1):
        here = [at for at in shown.of(before) if at <= payload]
        there = asked.of(before)
        if here and there:
            tail = asked.text[there[-1] :]
            common = common_prefix(tail, shown.text[here[-1] :])
            whole = common == len(tail)
            return here[-1] + (common if whole else min(common, payload - here[-1])), whole
    return payload, False
