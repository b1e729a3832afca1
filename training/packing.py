"""Documents packed into rows of one width: best fit, boundaries kept, nothing lost; and which rows make a batch.

A document longer than a row is cut into spans that overlap by one token, so that every token but a document's first is
predicted exactly once. Spans go into rows by best fit in order of falling length (Johnson 1974): each into the fullest
row that still has room. What a row holds is a function of (lengths, width, seed, epoch); which rows a step takes is a
function of (seed, step, mixture weights).

Shape legend: B rows, T tokens of a row, S spans, K kept columns, N targets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .batches import MicroBatch, batch_indices, steps_per_epoch
from .tokens import DocumentReader

RESOLUTION = 1 << 32


@dataclass(frozen=True)
class Spans:
    """Parts of documents, at most a row wide: `document`, first token and length of each, int64 (S,)."""

    document_S: np.ndarray
    start_S: np.ndarray
    length_S: np.ndarray


def cut_documents(lengths: np.ndarray, width: int) -> Spans:
    """Cut documents into spans of at most `width` tokens that overlap by one. One-token documents teach nothing."""
    assert width >= 2
    counts = np.where(lengths > 1, -(-(lengths - 1) // (width - 1)), 0)
    document_S = np.repeat(np.arange(len(lengths)), counts)
    part_S = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    start_S = part_S * (width - 1)
    return Spans(document_S, start_S, np.minimum(lengths[document_S] - start_S, width))


def best_fit(length_S: np.ndarray, width: int, order_S: np.ndarray) -> tuple[np.ndarray, int]:
    """Put spans into rows; return the row of each (S,) and the number of rows.

    Spans of one length are taken in the order of `order_S`. All spans of a length that go into rows of equal room go in
    one step, so time grows with the number of distinct lengths, not of spans.
    """
    row_S = np.empty(len(length_S), np.int64)
    by_length = order_S[np.argsort(-length_S[order_S], kind="stable")]
    lengths, starts = np.unique(-length_S[by_length], return_index=True)
    room: dict[int, list[np.ndarray]] = {}  # rows by the tokens that still fit, and a bit for every room there is
    open_rooms = rows = 0
    for length, queue in zip((-lengths).tolist(), np.split(by_length, starts[1:]), strict=True):
        while len(queue):
            fitting = open_rooms >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                found = np.concatenate(room.pop(space))
                open_rooms ^= 1 << space
            else:
                space, each = width, width // length
                found = np.arange(rows, rows + -(-len(queue) // each))
                rows += len(found)
            each = space // length  # a row that takes one stays the fullest: it takes all that fit
            used = min(len(found), -(-len(queue) // each))
            taken, rest = found[:used], found[used:]
            placed = min(len(queue), used * each)
            row_S[queue[:placed]] = np.repeat(taken, each)[:placed]
            full, last = space - each * length, space - (placed - (used - 1) * each) * length
            for left, which in ((full, taken[:-1]), (last, taken[-1:]), (space, rest)):
                if left and len(which):
                    room.setdefault(left, []).append(which)
                    open_rooms |= 1 << left
            queue = queue[placed:]
    return row_S, rows


class PackedSource:
    """The rows of one source. Every epoch packs afresh; the number of rows is the same in each."""

    def __init__(self, reader: DocumentReader, lengths: np.ndarray, width: int, seed: Sequence[int]) -> None:
        self.reader, self.width, self.seed = reader, width, list(seed)
        self.spans = cut_documents(lengths, width)
        self.targets = int((self.spans.length_S - 1).sum())
        self._packed = lru_cache(maxsize=2)(self._pack)
        self.rows = len(self._packed(0)[1]) - 1

    def _pack(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Spans in the order of their rows, and where each row begins (one more than there are rows)."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([*self.seed, epoch])))
        row_S, rows = best_fit(self.spans.length_S, self.width, rng.permutation(len(self.spans.length_S)))
        by_row = np.argsort(row_S, kind="stable")
        return by_row, np.searchsorted(row_S[by_row], np.arange(rows + 1))

    def row(self, epoch: int, number: int) -> list[np.ndarray]:
        """The parts of documents in a row, each with ids int32."""
        spans, (by_row, firsts) = self.spans, self._packed(epoch)
        return [
            self.reader.read(int(spans.document_S[s]), int(spans.start_S[s]), int(spans.length_S[s]))
            for s in by_row[firsts[number] : firsts[number + 1]]
        ]


def rows_of_step(seed: int, step: int, size: int, sources: Sequence[int], weights: Sequence[float]) -> np.ndarray:
    """(source, epoch, row) of each sample of a step (from 0), int64 (size, 3). `sources`: rows an epoch, of each.

    One source: every row once an epoch, the last batch of an epoch ragged. Several: after any number of samples each
    source has had its weight's share of them, to within as many samples as there are sources, and runs through its own
    epochs.
    """
    if len(sources) == 1:
        rows = batch_indices(seed, step, sources[0], size)
        epoch = step // steps_per_epoch(sources[0], size)
        return np.stack([np.zeros_like(rows), np.full_like(rows, epoch), rows], axis=1)
    picked = []
    for number in range(step * size, (step + 1) * size):
        source, turn = turn_of(number, weights)
        epoch, place = divmod(turn, sources[source])
        picked.append((source, epoch, _order(seed, source, epoch, sources[source])[place]))
    return np.array(picked, np.int64)


@lru_cache(maxsize=64)
def _order(seed: int, source: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, source, epoch]))).permutation(rows)


def turn_of(number: int, weights: Sequence[float]) -> tuple[int, int]:
    """Which source gives sample `number` (from 0), and how many that source gave before.

    Of every n samples the first source gives floor(n w), spread evenly; what is left is divided among the others in
    the same way. In whole numbers, so that no rounding adds up.
    """
    for source in range(len(weights) - 1):
        share = round(RESOLUTION * weights[source] / sum(weights[source:]))
        before, after = number * share // RESOLUTION, (number + 1) * share // RESOLUTION
        if after > before:
            return source, before
        number -= before
    return len(weights) - 1, number


def collate_rows(rows: Sequence[Sequence[np.ndarray]], width: int, micro: int) -> MicroBatch:
    """Lay rows out as one micro-batch of (micro, width) tokens, always of that shape.

    Position ids restart at each document and at the padding, so that none sees another. Every column but the last
    predicts the next; what is no target (a document's first token, padding, rows that are missing) weighs nothing.
    """
    assert len(rows) <= micro
    ids_BT, positions_BT = np.zeros((micro, width), np.int64), np.zeros((micro, width), np.int64)
    real_BT, weights_BK = np.zeros((micro, width), bool), np.zeros((micro, width - 1), np.float32)
    for row, parts in enumerate(rows):
        at = 0
        for part in parts:
            end = at + len(part)
            ids_BT[row, at:end], positions_BT[row, at:end] = part, np.arange(len(part))
            weights_BK[row, at : end - 1] = 1
            at = end
        real_BT[row, :at] = True
        positions_BT[row, at:] = np.arange(width - at)
    positions_BT[len(rows) :] = np.arange(width)
    return MicroBatch(
        ids_BT=torch.from_numpy(ids_BT),
        positions_BT=torch.from_numpy(positions_BT),
        real_BT=torch.from_numpy(real_BT),
        keep_K=torch.arange(width - 1),
        select_N=torch.arange(micro * (width - 1)),
        targets_N=torch.from_numpy(ids_BT[:, 1:].reshape(-1).copy()),
        weights_N=torch.from_numpy(weights_BK.reshape(-1)),
        row_N=torch.arange(micro).repeat_interleave(width - 1),
        rows=micro,
        tokens=sum(len(part) for parts in rows for part in parts),
    )


def shares(weights: Mapping[str, float], targets: Sequence[int], rows: Sequence[int]) -> list[float]:
    """A mixture's weights, which count tokens, as weights that count rows: rows of some sources are fuller."""
    return [
        weight * row_count / target for weight, target, row_count in zip(weights.values(), targets, rows, strict=True)
    ]
