"""Control tokens kept apart from text: what a template writes is control, what a person writes never is.

A tokenizer turns the characters `<|im_end|>` into the end-of-turn id whoever spelled them. Here text is encoded by a
twin of the tokenizer that knows no control token, and the control tokens are put between the pieces by position. Where
nobody spells one, the ids are those of the tokenizer itself.
"""

import json
import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken, Tokenizer

PRIVATE_USE = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd]")
SHORT_CHARS = 48  # pieces up to this length (headers, separators) are remembered: every row repeats them
REMEMBERED = 4096


class ControlTokens:
    """The control tokens of one tokenizer, and a way to encode text that cannot contain them.

    A control token is any added token, special or not (DeepSeek's `<｜User｜>` is not), except those
    made of blanks: several vocabularies hold runs of spaces as added tokens, and those are text.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"model.tokenizer: {type(tokenizer).__name__} has no tokenizer.json behind it; convert it to a fast one"
            )
        self._state = json.loads(backend.to_str())
        added = self._state["added_tokens"]
        self.ids: dict[str, int] = {token["content"]: token["id"] for token in added if not _is_blank(token["content"])}
        self._text_tokens = [token for token in added if _is_blank(token["content"])]
        self._strips_left = {token["content"] for token in added if token["lstrip"]}
        self._strips_right = {token["content"] for token in added if token["rstrip"]}
        self.pattern = re.compile(_longest_of(self.ids) if self.ids else r"(?!)")
        unknown = getattr(tokenizer, "unk_token_id", None)  # text may be unknown; that is no spelled control token
        self._guarded = frozenset(self.ids.values()) - {unknown}
        self._twins: dict[str, tuple[Tokenizer, dict[int, int]]] = {}
        self._remembered: dict[tuple[str, bool], list[int]] = {}

    def pieces(self, text: str, cuts: Iterable[int] = ()) -> list[tuple[int, int, int | None]]:
        """Cut a rendering into (start, end, control id or None for text), in order, text also cut at `cuts`.

        White space beside a token that asks for it (`lstrip`, `rstrip`) belongs to no piece, as in the tokenizer.
        """
        spans: list[tuple[int, int, int | None]] = []
        position = 0
        for match in self.pattern.finditer(text):
            token, end = match.group(), match.start()
            if token in self._strips_left:
                end = position + len(text[position:end].rstrip())
            if end > position:
                spans.append((position, end, None))
            spans.append((match.start(), match.end(), self.ids[token]))
            position = match.end()
            if token in self._strips_right:
                position += len(text[position:]) - len(text[position:].lstrip())
        if position < len(text):
            spans.append((position, len(text), None))
        for cut in sorted(set(cuts)):
            for index, (start, end, control) in enumerate(spans):
                if control is None and start < cut < end:
                    spans[index : index + 1] = [(start, cut, None), (cut, end, None)]
                    break
        return spans

    def plain(self) -> Tokenizer | None:
        """The tokenizer that knows no control token; None where some of its ids are not ours."""
        twin, renumbered = self._twin(None)
        return None if renumbered else twin

    def encode_text(self, text: str, first: bool) -> list[int]:
        """Encode text that holds no control token, whatever it spells. `first`: nothing stands before it."""
        key = (text, first)
        ids = self._remembered.get(key)
        if ids is None:
            ids = self._encode(text, first)
            if len(text) <= SHORT_CHARS and len(self._remembered) < REMEMBERED:
                self._remembered[key] = ids
        return ids

    def _encode(self, text: str, first: bool) -> list[int]:
        # A piece in the middle is encoded behind a token of its own, so that vocabularies that mark the start of a text
        # (Metaspace, prepend "first") do not mark it again.
        fence = "\ue000" if "\ue000" not in text else _unused_character(text)
        if fence not in self._twins:
            self._twins[fence] = self._twin(fence)
        twin, renumbered = self._twins[fence]
        ids: list[int] = twin.encode(text if first else fence + text, add_special_tokens=False).ids
        ids = ids if first else ids[1:]
        if renumbered:
            ids = [renumbered.get(token, token) for token in ids]
        if not self._guarded.isdisjoint(ids) and len(text) > 1:
            # A vocabulary that holds control tokens as ordinary pieces too: break each spelled one after one character.
            cuts = [0, *(match.start() + 1 for match in self.pattern.finditer(text)), len(text)]
            parts = [text[a:b] for a, b in pairwise(cuts) if a < b]
            if len(parts) > 1:
                ids = [token for n, part in enumerate(parts) for token in self._encode(part, first and n == 0)]
        return ids

    def _twin(self, fence: str | None) -> tuple[Tokenizer, dict[int, int]]:
        """Build the tokenizer without control tokens, and the map from its ids to ours where they differ."""
        state = {**self._state, "added_tokens": [], "post_processor": None, "padding": None, "truncation": None}
        twin = Tokenizer.from_str(json.dumps(state))
        for token in self._text_tokens:
            flags = {flag: token[flag] for flag in ("lstrip", "rstrip", "normalized", "single_word", "special")}
            twin.add_tokens([AddedToken(token["content"], **flags)])
        if fence is not None:
            twin.add_special_tokens([AddedToken(fence, normalized=False)])
        pairs = [(twin.token_to_id(token["content"]), token["id"]) for token in self._text_tokens]
        return twin, {here: there for here, there in pairs if here is not None and here != there}


def unused_characters(text: str) -> Iterable[str]:
    """Yield private-use characters that `text` does not hold."""
    used = set(PRIVATE_USE.findall(text))
    for block in (range(0xE001, 0xF900), range(0xF0000, 0xFFFFE)):
        yield from (chr(code) for code in block if chr(code) not in used)


def _unused_character(text: str) -> str:
    return next(iter(unused_characters(text)))


def _is_blank(content: str) -> bool:
    return not content.replace("\u2581", "").strip()


def _longest_of(words: Iterable[str]) -> str:
    """Return a pattern for the longest of `words` at a place: a tree by first characters, since a flat list of a
    thousand alternatives is tried one by one (a tokenizer of DeepSeek has 818)."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}
    return _pattern_of(tree)


def _pattern_of(node: dict[str, Any]) -> str:
    chain = ""
    while len(node) == 1 and "" not in node:  # walk single children in a loop: names are long, recursion is not deep
        ((character, node),) = node.items()
        chain += re.escape(character)
    branches = [re.escape(character) + _pattern_of(child) for character, child in node.items() if character]
    if not branches:
        return chain
    return f"{chain}(?:{'|'.join(branches)}){'?' if '' in node else ''}"
