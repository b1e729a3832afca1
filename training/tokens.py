"""Token shards: the text of a corpus as ids, in files that are mapped into memory and never parsed.

A directory of shards is committed (manifest.json) and holds `index.json` and two files a shard: `.tokens`, documents
end to end as little-endian uint16 (vocabularies up to 65,536) or uint32, and `.lengths`, tokens a document as uint32. A
document is [bos, if the tokenizer begins texts with one] + text + [eos]. What a text spells is never a control token.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from .control_tokens import ControlTokens
from .manifest import read_manifest

INDEX = "index.json"
FORMAT = 1
Split = Literal["train", "validation"]
REMEMBERED_WORDS, REMEMBERED_CHARS = 200_000, 1 << 24  # whose ids an encoder keeps, before it starts afresh
PROBES = 4000


@dataclass(frozen=True)
class TextTokenizer:
    """All that turns a text into a document's ids, as plain values that travel to any process."""

    state: str
    before: tuple[int, ...]
    eos: int
    unknown: int | None
    size: int
    by_words: bool
    """Whether the tokenizer cuts a text before every word, so that words may be encoded by themselves."""

    @property
    def digest(self) -> str:
        """Equal digests give equal ids."""
        return hashlib.sha256(repr((self.state, self.before, self.eos)).encode()).hexdigest()

    @property
    def dtype(self) -> str:
        """The narrowest type that holds every id."""
        return "uint16" if self.size <= 1 << 16 else "uint32"


def text_tokenizer(tokenizer: Any) -> TextTokenizer:
    """What a transformers tokenizer does with a text. Raises ValueError if it cannot end one."""
    bos = tokenizer("a")["input_ids"][:1]
    before = tuple(bos) if bos == [tokenizer.bos_token_id] else ()
    if tokenizer.eos_token_id is None:
        raise ValueError("model.tokenizer: it has no eos token, which ends a text; set eos_token")
    plain = ControlTokens(tokenizer).plain()
    state = tokenizer.backend_tokenizer.to_str()
    unknown = getattr(tokenizer, "unk_token_id", None)
    by_words = plain is not None and cuts_at_words(plain)
    size = 1 + max(
        tokenizer.backend_tokenizer.get_vocab().values()
    )  # more than there are tokens, where numbers are left out
    return TextTokenizer(state, before, tokenizer.eos_token_id, unknown, size, by_words)


class DocumentEncoder:
    """Encodes documents, many at a time.

    Where the tokenizer cuts a text before every word (byte-level BPE does; it is tried out, not assumed), words are
    encoded once and remembered: the ids are the tokenizer's own, for a fraction of the time.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        backend = SimpleNamespace(to_str=lambda: tokenizer.state)
        self.control = ControlTokens(SimpleNamespace(backend_tokenizer=backend, unk_token_id=tokenizer.unknown))
        plain = self.control.plain() if tokenizer.by_words else None
        self.words = _Words(plain) if plain is not None else None

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32."""
        words = self.words  # a bos is put before the ids, not the text, so every text begins one ("first")
        if words is None:
            bodies = [np.asarray(self.control.encode_text(text, first=True), np.int32) for text in texts]
        else:
            spelled = [self.control.pattern.search(text) is not None for text in texts]
            plain = iter(words.encode([text for text, odd in zip(texts, spelled, strict=True) if not odd]))
            bodies = [
                np.asarray(self.control.encode_text(text, first=True), np.int32) if odd else next(plain)
                for text, odd in zip(texts, spelled, strict=True)
            ]
        before, after = np.asarray(self.tokenizer.before, np.int32), np.asarray([self.tokenizer.eos], np.int32)
        return [np.concatenate([before, body, after]) for body in bodies]


# Shape legend: W words of a batch of texts, T their tokens.
WORD = re.compile(r"(?:^ ?|(?<=\S) (?=[A-Za-z]))(?:[^ ]+| (?![A-Za-z])|(?<=\s) )*")
"""A piece of text up to the next single space between something and a letter."""


def cuts_at_words(tokenizer: Tokenizer) -> bool:
    """Whether the pieces of `WORD`, encoded one by one, give the ids of the whole text.

    No token of the vocabulary may reach over a cut, and the pre-tokenizer must split pieces as it splits the whole,
    which is tried on 4,000 odd texts.
    """
    state = json.loads(tokenizer.to_str())
    normalizer = (state["normalizer"] or {"type": None})["type"]
    if state["model"]["type"] != "BPE" or state["model"].get("dropout") or normalizer not in (None, "NFC"):
        return False
    if '"ByteLevel"' not in json.dumps(state["pre_tokenizer"]):
        return False
    spaced = [token for token in state["model"]["vocab"] if "Ġ" in token[1:]]  # Ġ is byte-level BPE's space
    if any(re.search(r"\S ", ByteLevel().decode([token])) for token in spaced):
        return False
    draw = np.random.default_rng(0)
    characters = ["a", "Z", "é", "7", "'", "'s", ".", ",", "-", "(", '"', "\n", "\r\n", "\t", " ", "  ", "漢", "🙂", "́"]
    characters += ["\u00a0", "\u2028", "و", "<", "|", ">", "_", "¿", "½", " a", " b", " The", " I'll", " x1"]
    texts = ["".join(draw.choice(characters, size=12)) for _ in range(PROBES)]
    pieces = [WORD.findall(text) for text in texts]
    whole = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    parts = iter(tokenizer.encode_batch_fast([p for row in pieces for p in row], add_special_tokens=False))
    return all(
        "".join(row) == text and [i for _ in row for i in next(parts).ids] == one.ids
        for text, row, one in zip(texts, pieces, whole, strict=True)
    )


class _Index(dict[str, int]):
    """Numbers words in the order they are met."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


class _Words:
    """Ids of words: a table of all ids met, and where in it each word's begin."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._forget()

    def _forget(self) -> None:
        self.index = _Index()
        self.ids = np.empty(0, np.int32)
        self.starts, self.lengths = np.empty(0, np.int64), np.empty(0, np.int64)
        self.characters = 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32, views of one array."""
        if len(self.index) > REMEMBERED_WORDS or self.characters > REMEMBERED_CHARS:
            self._forget()
        found = [WORD.findall(text) for text in texts]
        words = itertools.chain.from_iterable(found)
        numbers_W = np.fromiter(map(self.index.__getitem__, words), np.int64, sum(map(len, found)))
        self._learn()
        lengths_W = self.lengths[numbers_W]
        ends_W = np.cumsum(lengths_W)
        ids_T = self.ids[
            np.repeat(self.starts[numbers_W] - (ends_W - lengths_W), lengths_W) + np.arange(lengths_W.sum())
        ]
        counts = np.cumsum([len(words) for words in found])
        bounds = np.concatenate([[0], ends_W])[counts] if len(ends_W) else np.zeros(len(texts), np.int64)
        return np.split(ids_T, bounds[:-1]) if texts else []

    def _learn(self) -> None:
        new = list(self.index)[len(self.lengths) :]
        if new:
            encoded = [item.ids for item in self.tokenizer.encode_batch_fast(new, add_special_tokens=False)]
            lengths = np.fromiter(map(len, encoded), np.int64, len(new))
            ids = np.fromiter(itertools.chain.from_iterable(encoded), np.int32, int(lengths.sum()))
            self.starts = np.concatenate([self.starts, len(self.ids) + np.cumsum(lengths) - lengths])
            self.lengths = np.concatenate([self.lengths, lengths])
            self.ids = np.concatenate([self.ids, ids])
            self.characters += sum(map(len, new))


@dataclass(frozen=True)
class Shard:
    """One shard of the index. `text_bytes` is the UTF-8 length of its documents."""

    name: str
    source: int
    split: Split
    documents: int
    tokens: int
    text_bytes: int


class TokenShards:
    """A committed directory of shards, mapped. Documents of a (source, split) are numbered over its shards in order."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = read_manifest(directory)
        tree = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        if tree.get("format") != FORMAT:
            raise ValueError(
                f"data.tokens: {directory} is of format {tree.get('format')}, not {FORMAT}; build it again"
            )
        self.dtype = np.dtype(tree["dtype"]).newbyteorder("<")
        self.sources: tuple[str, ...] = tuple(tree["sources"])
        self.tokenizer_digest: str = tree["tokenizer"]["sha256"]
        self.counts: dict[str, int] = tree["counts"]
        self.shards = tuple(Shard(**shard) for shard in tree["shards"])

    def of(self, split: Split, source: int | None = None) -> list[Shard]:
        """Shards of a split, of one source or all."""
        return [s for s in self.shards if s.split == split and source in (None, s.source)]

    def lengths(self, split: Split, source: int | None = None) -> np.ndarray:
        """Tokens of every document, int64."""
        found = [self._map(shard.name, "lengths") for shard in self.of(split, source)]
        return np.concatenate(found).astype(np.int64) if found else np.empty(0, np.int64)

    def reader(self, split: Split, source: int | None = None) -> "DocumentReader":
        """Random access to the documents."""
        return DocumentReader(self, self.of(split, source))

    @functools.lru_cache(maxsize=4096)  # noqa: B019 a directory of shards lives as long as the run
    def _map(self, name: str, part: Literal["tokens", "lengths"]) -> np.ndarray:
        return np.memmap(self.directory / f"{name}.{part}", self.dtype if part == "tokens" else "<u4", mode="r")


class DocumentReader:
    """Parts of documents by number."""

    def __init__(self, shards: TokenShards, chosen: Sequence[Shard]) -> None:
        self.shards, self.chosen = shards, chosen
        self.firsts = np.cumsum([0, *(shard.documents for shard in chosen)])
        self._ends: dict[int, np.ndarray] = {}

    def read(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Ids of a document, or `length` of them from `start`, int32."""
        shard = int(np.searchsorted(self.firsts, document, side="right")) - 1
        name, row = self.chosen[shard].name, document - int(self.firsts[shard])
        if shard not in self._ends:
            self._ends[shard] = np.cumsum(self.shards._map(name, "lengths"), dtype=np.int64)
        ends = self._ends[shard]
        first, end = int(ends[row - 1]) if row else 0, int(ends[row])
        stop = end if length is None else min(end, first + start + length)
        return self.shards._map(name, "tokens")[first + start : stop].astype(np.int32)
