"""An n-gram model to beat: interpolated modified Kneser-Ney (Chen and Goodman 1999, section 3), over token ids.

Counts of the highest order are of occurrences; those of lower orders are of distinct left neighbours. Each order takes
discounts D1, D2, D3+ off and gives what it took to the order below; the lowest gives it to all tokens alike.
"""

from collections.abc import Sequence

import numpy as np


def ngram_log_probs(
    train: Sequence[np.ndarray], held_out: Sequence[np.ndarray], vocabulary: int, order: int = 5
) -> list[np.ndarray]:
    """Natural log-probability of every token of the held-out documents given its document so far, float64.

    Documents are ids in [0, vocabulary). Contexts end at a document's start, which counts as `order - 1` blanks.
    """
    ids, real, seen = _stream([*train, *held_out], len(train), vocabulary, order - 1)
    grams = _grams(ids, vocabulary + 1, order)
    learned, asked = real & seen, real & ~seen
    counted = np.flatnonzero(learned)
    probability = np.full(int(asked.sum()), 1 / vocabulary)
    levels = []
    for level in range(order, 0, -1):  # from the highest order down: what a lower one counts follows from above
        gram, context = grams[level], grams[level - 1]
        found, first, times = np.unique(gram[counted], return_index=True, return_counts=True)
        places = counted[first]  # one position of each distinct n-gram; its suffix is counted once below
        levels.append((found, times, context[places - 1] if level > 1 else np.zeros(len(places), np.int64), level))
        counted = places
    for found, times, context_of_gram, level in reversed(levels):
        here = np.flatnonzero(asked)
        gram, context = grams[level][here], grams[level - 1][here - 1] if level > 1 else np.zeros(len(here), np.int64)
        probability = _interpolate(found, times, context_of_gram, gram, context, probability)
    ends = np.cumsum([len(document) for document in held_out])[:-1]
    return np.split(np.log(probability), ends)


def _interpolate(
    found: np.ndarray, times: np.ndarray, context_of_gram: np.ndarray, gram: np.ndarray, context: np.ndarray,
    below: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """One order's probabilities at the asked positions, from those of the order below."""
    discount_of = _discounts(times)
    discount = discount_of[np.minimum(times, 3)]
    size = int(max(context_of_gram.max(initial=0), context.max(initial=0))) + 1
    total = np.bincount(context_of_gram, weights=times, minlength=size)[context]
    taken = np.bincount(context_of_gram, weights=discount, minlength=size)[context]
    place = np.minimum(np.searchsorted(found, gram), len(found) - 1)
    kept = np.where(found[place] == gram, times[place] - discount[place], 0.0)
    known = total > 0
    safe = np.where(known, total, 1.0)
    return np.where(known, kept / safe + taken / safe * below, below)


def _discounts(times: np.ndarray) -> np.ndarray:
    """D0 = 0, D1, D2, D3+ from how many n-grams are seen once to four times; never quite nothing or everything."""
    n = np.bincount(np.minimum(times, 5), minlength=6)[1:5].astype(float)
    if not n.all():
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n[0] / (n[0] + 2 * n[1])
    found = [k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3)]
    return np.array([0.0, *(min(max(value, 0.05), k - 0.05) for k, value in enumerate(found, 1))])


def _stream(
    documents: Sequence[np.ndarray], train: int, blank: int, blanks: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents end to end, blanks before each: ids, which are tokens, and which belong to the first `train`."""
    pad = np.full(blanks, blank, np.int64)
    ids = np.concatenate([part for document in documents for part in (pad, document.astype(np.int64))])
    sizes = np.array([len(document) + blanks for document in documents])
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    real = np.arange(len(ids)) - starts >= blanks
    seen = np.arange(len(ids)) < sizes[:train].sum()
    return ids, real, seen


def _grams(ids: np.ndarray, base: int, order: int) -> list[np.ndarray]:
    """For each order, a number of the n-gram that ends at each position; equal n-grams have equal numbers."""
    grams = [np.zeros(len(ids), np.int64), ids]
    for _ in range(order - 1):
        before = np.concatenate([[0], grams[-1][:-1]])
        grams.append(np.unique(before * base + ids, return_inverse=True)[1].reshape(-1))
    return grams
