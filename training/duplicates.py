"""Documents that are in a corpus more than once: the very same text, and almost the same (MinHash).

Of equal documents the first in the corpus stays. Near-duplicates are judged in the same order, against the documents
that stay, so what is dropped depends on the corpus alone, not on who read it.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np
import xxhash

SHINGLE_WORDS, PERMUTATIONS, SEED = 5, 128, 1
SHINGLES_AT_ONCE = 4096
HASHES_AT_ONCE = 1 << 23
"""Documents whose hashes are sorted at a time: 300 MB, however large the corpus is."""


def document_hash(text: str) -> bytes:
    """XXH3-128 of a document's UTF-8."""
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


def held_out(hashes_N2: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents validate: those whose hash (N, 2 uint64) is in the first `fraction` of all hashes, bool (N,)."""
    return hashes_N2[:, 0] < np.uint64(min(int(fraction * 2**64), 2**64 - 1))


def later_copies(load: Callable[[int], np.ndarray], pieces: int, total: int) -> list[np.ndarray]:
    """Mark, in each piece, every document that an equal one precedes. `load(piece)` gives its hashes (N, 2 uint64).

    Hashes are compared in ranges of their leading bits, so that memory stays bounded.
    """
    ranges = 1 << max(0, (total - 1) // HASHES_AT_ONCE).bit_length()
    marks = [np.zeros(len(load(piece)), bool) for piece in range(pieces)]
    shift = np.uint64(64 - (ranges.bit_length() - 1))
    for number in range(ranges):
        parts: list[np.ndarray] = []
        places: list[tuple[int, np.ndarray]] = []
        for piece in range(pieces):
            hashes = load(piece)
            rows = np.flatnonzero(hashes[:, 0] >> shift == number) if ranges > 1 else np.arange(len(hashes))
            parts.append(hashes[rows])
            places.append((piece, rows))
        joined = np.concatenate(parts)
        order = np.lexsort((joined[:, 1], joined[:, 0]))  # stable: of equal hashes the first stays in front
        again = np.zeros(len(joined), bool)
        again[order[1:]] = (joined[order[1:]] == joined[order[:-1]]).all(1)
        at = 0
        for piece, rows in places:
            marks[piece][rows] = again[at : at + len(rows)]
            at += len(rows)
    return marks


def signature(text: str) -> np.ndarray:
    """MinHash of a document's runs of five words (Broder 1997), shape (128,) uint32."""
    minhash = _minhash()
    words = text.lower().split()
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    for start in range(0, last, SHINGLES_AT_ONCE):
        stop = min(last, start + SHINGLES_AT_ONCE)
        minhash.update_batch([" ".join(words[at : at + SHINGLE_WORDS]).encode() for at in range(start, stop)])
    return minhash.hashvalues.astype(np.uint32)


def near_copies(signatures: Iterable[Sequence[np.ndarray | None]], threshold: float) -> list[np.ndarray]:
    """Mark documents whose estimated Jaccard similarity to one that stays is at least `threshold`.

    One sequence a piece; None stands for a document that is out already. The index of those that stay is in memory:
    about 6 KB a document.
    """
    from datasketch import LeanMinHash, MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    kept: dict[Hashable, np.ndarray] = {}
    marks: list[np.ndarray] = []
    for piece in signatures:
        marks.append(np.zeros(len(piece), bool))
        for row, values in enumerate(piece):
            if values is None:
                continue
            minhash = LeanMinHash(seed=SEED, hashvalues=values, scheme="affine32")
            similar = (float(np.mean(kept[key] == values)) for key in index.query(minhash))
            if any(similarity >= threshold for similarity in similar):
                marks[-1][row] = True
                continue
            index.insert(len(kept), minhash, check_duplication=False)
            kept[len(kept)] = values
    return marks


def _minhash():
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, seed=SEED, hashfunc=xxhash.xxh32_intdigest, scheme="affine32")
