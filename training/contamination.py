"""Eval sets found in training text: runs of 13 words that both hold (Brown et al. 2020, GPT-3, appendix C)."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from .corpus import paths_of
from .lines import decode
from .quarantine import Quarantine
from .rows import TEXT_SUFFIXES, load_hub, read_file

GRAM_WORDS = 13
WORDS = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Grams:
    """Sorted hashes (uint64) of every run of 13 words of the eval sets; how many items, and how many too short."""

    hashes: np.ndarray
    items: int
    short: int


def grams_of(text: str) -> np.ndarray:
    """Hashes of a text's runs of 13 words, case and punctuation aside, uint64; none if it has fewer words."""
    words = WORDS.findall(text.lower())
    if len(words) < GRAM_WORDS:
        return np.empty(0, np.uint64)
    hashes = np.fromiter(map(_word_hash, words), np.uint64, len(words))
    runs = len(words) - GRAM_WORDS + 1
    total = np.zeros(runs, np.uint64)
    for offset in range(GRAM_WORDS):  # a polynomial modulo 2^64
        total = total * _FACTOR + hashes[offset : offset + runs]
    return total


@functools.lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))


def collect(names: Sequence[str]) -> Grams:
    """Read eval sets (files, folders, assets, hub names), every text in every column of every split: the one that is
    trained on is the one that least matters here. Raises ValueError, one line."""
    found: list[np.ndarray] = []
    items = short = 0
    for name in names:
        for text in _texts(name):
            grams = grams_of(text)
            items += 1
            short += not len(grams)
            found.append(grams)
    return Grams(np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64), items, short)


def holds_any(text: str, hashes: np.ndarray) -> bool:
    """Whether a text holds one of the runs."""
    grams = grams_of(text)
    if not len(grams) or not len(hashes):
        return False
    places = np.searchsorted(hashes, grams)
    return bool((hashes[np.minimum(places, len(hashes) - 1)] == grams).any())


def _texts(name: str) -> Iterator[str]:
    for path in paths_of(name, None):
        if path is None:
            for table in load_hub(name, None).values():
                yield from (text for values in table for text in _strings(values))
        elif path.suffix.lower() in TEXT_SUFFIXES:
            try:
                yield decode(path.read_bytes())
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        else:
            for row in read_file(path, Quarantine("stop")):
                yield from _strings(row.values)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for inner in value.values() for text in _strings(inner))
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        yield from (text for inner in value for text in _strings(inner))
