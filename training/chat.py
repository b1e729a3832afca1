"""Messages to token ids and the supervised mask, for any Jinja chat template, with no marks inside the template.

How a conversation becomes ids:

1. Control tokens that somebody spelled in a message or a tool are replaced by stand-ins (private-use characters that
   occur nowhere else) before the template sees them. In the rendering, every control token left is the template's own.
   The assistant may write the tags of its reasoning (`REASONING_TAGS`), and nothing else.
2. The rendering is cut at its control tokens; the text between is encoded by a twin of the tokenizer without them
   (`control_tokens.py`), stand-ins put back. Where nobody spells a control token and no reply starts with white space,
   the ids are those of `tokenizer(rendering, add_special_tokens=False)`.
3. A reply starts where the generation prompt ends: `render(messages[:i], add_generation_prompt=True)` is a prefix of
   the rendering for most templates and turns. Where it is not (Qwen3 drops old reasoning, Mistral moves the tools
   to the last question), the two are compared from the last message that both show (`replies.py`). Text is cut there,
   so that the ids that train are what a server feeds plus what it samples. That is the one difference from the
   library: it would fuse white space at the start of a reply with the header's last newline, which no server can.
4. A reply ends with the first end-of-turn token behind its text, which is supervised. Where the text is inside the
   rendering is found by marking it (one private-use character per message) and rendering again. A template that
   writes no end after the last reply gets the tokenizer's.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from jinja2 import TemplateError

from .control_tokens import ControlTokens, unused_characters
from .marks import REASONING_KEYS, REASONING_TAGS, map_strings
from .replies import Message, Replies

TODAY = date(2024, 7, 26)
"""For templates that write the day, which would make ids a function of the clock: a run that goes on after midnight
would train on others. It is the day that Llama 3.1's template takes where it has no clock. Servers have their own."""


@dataclass(frozen=True)
class Encoded:
    """One conversation. `mask[t]`: token t is a target, predicted from the tokens before it; never true at 0."""

    ids: list[int]
    mask: list[bool]


@dataclass(frozen=True)
class _Scene:
    """Messages and tools with stand-ins for spelled control tokens, the way back, and characters nobody used."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    spelled: dict[int, str]
    unused: Iterator[str]


class ChatEncoder:
    """Encodes conversations with one tokenizer and its chat template.

    `end_ids` are the tokens that end a turn: what the template writes after a plain reply, and the tokenizer's eos.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("model.tokenizer: it has no chat template; name a chat model's in model.tokenizer")
        self._tokenizer = tokenizer
        _refuse_space_eater(tokenizer)
        self._control = ControlTokens(tokenizer)
        first_ids = tokenizer("a")["input_ids"][:1]
        self._own_bos = first_ids if first_ids == [tokenizer.bos_token_id] else []
        self._eos: int | None = tokenizer.eos_token_id
        self.end_ids: frozenset[int] = self._find_end_ids()
        self._call_style = self._find_call_style()
        self._shows_tools = self._probe_tools()

    def encode(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, supervise_from: int = 0
    ) -> Encoded:
        """Encode a whole conversation; every assistant turn is supervised with its end-of-turn token.

        `supervise_from`: the first message that may be supervised; assistant turns before it are prompt.

        Raises ValueError if there is nothing to learn, if the template refuses the conversation or leaves a reply out.
        """
        if not any(
            message["role"] == "assistant" and _says_something(message) for message in messages[supervise_from:]
        ):
            raise ValueError("nothing to learn: no assistant turn says anything; remove the row or give it a reply")
        if messages[0]["role"] == "assistant":
            raise ValueError("messages[0]: the assistant speaks first, so it has no prompt; put a user turn first")
        scene = self._scene(messages, tools)
        replies = self._replies(scene)
        spans, unended = replies.spans(supervise_from)
        ids, mask = self._tokenize(scene, replies.text, spans)
        if unended:
            if self._eos is None:
                raise ValueError("model.tokenizer: neither it nor its template has an end-of-turn token; set eos_token")
            ids.append(self._eos)
            mask.append(True)
        return self._with_bos(ids, mask)

    def encode_prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """Encode messages and the generation prompt: what a server feeds. A prefix of `encode` with the reply added,
        unless the template shows history otherwise than when it was new, or an earlier reply starts with white space
        (a server encodes it again, together with its header; `encode` keeps it as it was sampled)."""
        scene = self._scene(messages, tools)
        text = self._render(scene.messages, scene.tools, prompt=True)
        ids, mask = self._tokenize(scene, text, [])
        return self._with_bos(ids, mask).ids

    def _replies(self, scene: _Scene) -> Replies:
        def render(messages: Sequence[Message], prompt: bool) -> str:
            return self._render(messages, scene.tools, prompt)

        return Replies(scene.messages, render, self._control, self.end_ids, scene.unused)

    # --- rendering ---

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, prompt: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt, strftime_now=TODAY.strftime
            )
        except (TemplateError, TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the chat template refuses the conversation: {reason}") from None
        return str(text)

    def _scene(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> _Scene:
        try:
            everything = json.dumps([list(messages), tools], ensure_ascii=False)
            everything.encode()
        except UnicodeEncodeError:
            raise ValueError("a lone surrogate, which is no character; write the text as UTF-8") from None
        except TypeError as error:  # Parquet and the hub have times, bytes and decimals
            raise ValueError(f"messages and tools hold what JSON has not: {error}; write it as text") from None
        if tools and not self._shows_tools:
            raise ValueError(
                "tools: the chat template does not show them to the model; use one that does, or remove them"
            )
        unused = iter(unused_characters(everything))
        plain = [self._in_style(message) for message in messages]
        if not self._control.pattern.search(everything):
            return _Scene(plain, list(tools) if tools else None, {}, unused)
        stand_ins: dict[str, str] = {}

        def replace(text: str, keep: tuple[str, ...] = ()) -> str:
            def one(match: Any) -> str:
                token = match.group()
                if token in keep:
                    return token
                if token not in stand_ins:
                    stand_ins[token] = next(unused)
                return stand_ins[token]

            return self._control.pattern.sub(one, text)

        clean = [
            {
                key: map_strings(value, lambda text: replace(text, REASONING_TAGS))
                if message["role"] == "assistant" and key in ("content", *REASONING_KEYS)
                else map_strings(value, replace)
                for key, value in message.items()
            }
            for message in plain
        ]
        clean_tools = map_strings(list(tools), replace) if tools else None
        return _Scene(clean, clean_tools, {ord(mark): token for token, mark in stand_ins.items()}, unused)

    # --- ids ---

    def _tokenize(self, scene: _Scene, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        turn = 0
        for start, end, control in self._control.pieces(text, [edge for span in spans for edge in span]):
            if control is None:
                piece = text[start:end].translate(scene.spelled) if scene.spelled else text[start:end]
                new = self._control.encode_text(piece, first=not ids and not start)
            else:
                new = [control]
            while turn < len(spans) and spans[turn][1] <= start:
                turn += 1
            supervised = turn < len(spans) and spans[turn][0] <= start
            ids += new
            mask += [supervised] * len(new)
        return ids, mask

    def _with_bos(self, ids: list[int], mask: list[bool]) -> Encoded:
        if self._own_bos and ids[:1] != self._own_bos:
            ids, mask = self._own_bos + ids, [False, *mask]
        if mask:
            mask[0] = False
        return Encoded(ids, mask)

    def _in_style(self, message: Message) -> dict[str, Any]:
        """Write tool calls as this template reads them: arguments as an object or as JSON, no text as "" or None."""
        copy = dict(message)
        calls = message.get("tool_calls")
        if not isinstance(calls, list) or not calls:
            copy.pop("tool_calls", None)
            return copy
        blank, as_object = self._call_style
        copy["content"] = message.get("content") or blank
        copy["tool_calls"] = [_call_in_style(call, as_object) for call in calls]
        return copy

    def _find_call_style(self) -> tuple[str | None, bool]:
        """Try which form of a tool call the template shows: Qwen3 fails on content None, DeepSeek V3 wants it and
        fails on arguments that are no string, Mistral quotes those that are."""
        for blank, as_object in (("", True), (None, True), ("", False), (None, False)):
            call = {"name": "probe", "arguments": {"x": "seen"} if as_object else '{"x": "seen"}'}
            calls = [{"id": "call00001", "type": "function", "function": call}]
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": blank, "tool_calls": calls}]
            try:
                text = self._render(turns, None, prompt=False)
            except ValueError:
                continue
            if "probe" in text and "seen" in text:
                return blank, as_object
        return "", True

    def _probe_tools(self) -> bool:
        function = {"name": "probe", "description": "probe", "parameters": {"type": "object", "properties": {}}}
        try:
            turns = [{"role": "user", "content": "a"}]
            return "probe" in self._render(turns, [{"type": "function", "function": function}], prompt=True)
        except ValueError:
            return False

    def _find_end_ids(self) -> frozenset[int]:
        ends = set() if self._eos is None else {self._eos}
        mark = "\ue001"
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
        try:
            text = self._render(probe, None, prompt=False)
        except ValueError:
            text = ""
        match = self._control.pattern.search(text, text.find(mark)) if mark in text else None
        if match:
            ends.add(self._control.ids[match.group()])
        return frozenset(ends)


def _says_something(message: Message) -> bool:
    content = message.get("content")
    return bool(message.get("tool_calls")) or bool(content.strip() if isinstance(content, str) else content)


def _call_in_style(call: Any, as_object: bool) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call_in_style(call["function"], as_object)}
    arguments = call.get("arguments")
    if as_object and isinstance(arguments, str):
        try:
            return {**call, "arguments": json.loads(arguments)}
        except ValueError:
            return dict(call)
    if not as_object and arguments is not None and not isinstance(arguments, str):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return dict(call)


def _refuse_space_eater(tokenizer: Any) -> None:
    """transformers 5 rebuilds a tokenizer whose config says LlamaTokenizer as Llama 2's and ignores how tokenizer.json
    splits: with the vocabulary of DeepSeek V3 every space is lost, silently."""
    ids = tokenizer("one two", add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids).strip() == "onetwo":
        raise ValueError(
            f"model.tokenizer: {type(tokenizer).__name__} loses the spaces of 'one two', so it is not the one that "
            "tokenizer.json describes; load it with transformers.PreTrainedTokenizerFast"
        )
