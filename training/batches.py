"""Batches as a pure function of (seed, step): no loader state, so nothing to save, replay or lose.

One optimizer step consumes one *global* batch. The number of ranks, the micro-batch size and the accumulation change
who computes what, never what is computed. So the batch is cut evenly by the lengths of its samples: ranks do not wait
for the one with the longest, and no pass takes much more memory than another. A rank whose share of a ragged last
window is empty gets a micro-batch of weight zero: every rank takes part in every collective.

Shape legend: B rows, T tokens, K kept columns, N supervised targets of the micro-batch.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from .recipe import Batch

Item = TypeVar("Item")


class Tokens(Protocol):
    """What a batch needs of a sample: ids of one document and which of them are training targets."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def mask(self) -> np.ndarray: ...


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass on one rank.

    `real_BT` is false at padding; `keep_K` are the columns whose hidden state predicts a target, so that the
    vocabulary head runs on these alone; `select_N` picks the targets out of the (B*K) logits; `row_N` says which
    document a target belongs to.
    """

    ids_BT: Tensor
    positions_BT: Tensor
    real_BT: Tensor
    keep_K: Tensor
    select_N: Tensor
    targets_N: Tensor
    weights_N: Tensor
    row_N: Tensor
    rows: int
    tokens: int

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same micro-batch on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return MicroBatch(**moved, rows=self.rows, tokens=self.tokens)


def steps_per_epoch(rows: int, size: int) -> int:
    """Global steps that visit every row once; the last one may be ragged."""
    return -(-rows // size)


def batch_indices(seed: int, step: int, rows: int, size: int) -> np.ndarray:
    """Row numbers of global step `step` (from 0): a fresh permutation each epoch, every row exactly once in each."""
    epoch, window = divmod(step, steps_per_epoch(rows, size))
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)
    return order[window * size : (window + 1) * size]


def accumulation(size: int, micro: int, world_size: int) -> int:
    """Micro-batches a rank runs in one step; the same on every rank and in every step, ragged ones included."""
    return -(-size // (micro * world_size))


def share(
    items: Sequence[Item], tokens: Sequence[float], batch: Batch, world_size: int, rank: int
) -> list[Sequence[Item]]:
    """Cut one global batch, whose items have so many `tokens` each: this rank's micro-batches, the longest first.

    Always `accumulation(...)` of them; if there is less to do, the last ones are empty on every rank. Those that run at
    the same time are of like length, and the longest of each turn goes to the rank that has least so far.
    """
    turns = accumulation(len(items), batch.micro, world_size)
    parts = cut(tokens, batch, turns * world_size)
    mine: list[Sequence[Item]] = []
    loads = [0.0] * world_size
    for turn in range(turns):
        each = parts[turn * world_size : (turn + 1) * world_size]
        for owner, part in zip(sorted(range(world_size), key=loads.__getitem__), each, strict=True):
            loads[owner] += _cost(part, tokens, batch)
            if owner == rank:
                mine.append([items[index] for index in part])
    return mine + [items[:0]] * (accumulation(batch.size, batch.micro, world_size) - turns)


def cut(tokens: Sequence[float], batch: Batch, count: int) -> list[list[int]]:
    """`count` groups of at most `batch.micro` of the items that have so many tokens each, by index, costliest first.

    Packed, each goes to the group that is shortest so far, the longest item first (Graham 1969). Padded, items of like
    length lie together.
    """
    assert len(tokens) <= count * batch.micro
    order = sorted(range(len(tokens)), key=lambda index: -tokens[index])
    parts: list[list[int]] = [[] for _ in range(count)]
    if batch.packing:
        heap = [(0.0, number) for number in range(count)]
        for index in order:
            load, number = heapq.heappop(heap)
            parts[number].append(index)
            if len(parts[number]) < batch.micro:
                heapq.heappush(heap, (load + tokens[index], number))
    else:
        parts = [part.tolist() for part in np.array_split(np.asarray(order, np.int64), max(1, count))]
    return sorted(map(sorted, parts), key=lambda part: -_cost(part, tokens, batch))


def _cost(part: Sequence[int], tokens: Sequence[float], batch: Batch) -> float:
    """Tokens that a pass computes, padding included."""
    lengths = [tokens[index] for index in part]
    return sum(lengths) if batch.packing else len(lengths) * max(lengths, default=0.0)


def tree_block(leaves: int, world_size: int, rank: int) -> range:
    """Numbers of the micro-batches that a rank owns when a binary tree adds them up: one whole subtree, maybe empty.

    The tree halves a row of leaves, the larger half on the left, and depends on their number alone. `world_size` must
    be a power of two; no rank owns more than ceil(leaves / world_size).
    """
    assert world_size & (world_size - 1) == 0
    block, ranks = range(leaves), world_size
    while ranks > 1:
        ranks //= 2
        middle = (len(block) + 1) // 2
        block = block[middle:] if rank & ranks else block[:middle]
    return block


def tree_merges(leaves: int) -> list[int]:
    """How many additions follow each leaf, when a tree's sums are made from left to right on a stack."""
    if leaves == 1:
        return [0]
    left, right = tree_merges((leaves + 1) // 2), tree_merges(leaves // 2)
    return [*left, *right[:-1], right[-1] + 1]


def collate(documents: Sequence[Tokens], packing: bool) -> MicroBatch:
    """Lay documents out for one forward pass; an empty list gives one inert row of weight zero.

    Packed: one row, documents end to end, position ids restarting at each (no attention mask: transformers then keeps
    documents apart, exactly). Not packed: one row a document, padded on the right, where no real token can look.
    """
    inert = not documents
    ids = [np.zeros(2, np.int64)] if inert else [np.asarray(item.ids, np.int64) for item in documents]
    masks = [np.array([False, True])] if inert else [np.asarray(item.mask, bool) for item in documents]
    for mask in masks:
        assert not mask[0], "the first token of a document has nothing to predict it from"
    layout = _packed if packing else _padded
    ids_BT, positions_BT, keep_K, select_N, targets_N, row_N = layout(ids, masks)
    lengths = np.array(
        [[0 if inert else sum(map(len, ids))]] if packing else [[0 if inert else len(row)] for row in ids]
    )
    return MicroBatch(
        ids_BT=torch.from_numpy(ids_BT),
        positions_BT=torch.from_numpy(positions_BT),
        real_BT=torch.from_numpy(np.arange(ids_BT.shape[1]) < lengths),
        keep_K=torch.from_numpy(keep_K),
        select_N=torch.from_numpy(select_N),
        targets_N=torch.from_numpy(targets_N),
        weights_N=torch.full((len(targets_N),), 0.0 if inert else 1.0),
        row_N=torch.from_numpy(row_N),
        rows=len(ids),
        tokens=0 if inert else sum(map(len, ids)),
    )


def _packed(ids: list[np.ndarray], masks: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    positions = np.concatenate([np.arange(len(document)) for document in ids])
    targets = np.flatnonzero(np.concatenate(masks))
    row_T = np.repeat(np.arange(len(ids)), [len(document) for document in ids])
    flat = np.concatenate(ids)
    return flat[None], positions[None], targets - 1, np.arange(len(targets)), flat[targets], row_T[targets]


def _padded(ids: list[np.ndarray], masks: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    width = max(map(len, ids))
    ids_BT = np.stack([np.pad(document, (0, width - len(document))) for document in ids])
    mask_BT = np.stack([np.pad(mask, (0, width - len(mask))) for mask in masks])
    row_N, column_N = np.nonzero(mask_BT)
    keep_K = np.unique(column_N - 1)
    select_N = row_N * len(keep_K) + np.searchsorted(keep_K, column_N - 1)
    positions_BT = np.broadcast_to(np.arange(width), ids_BT.shape).copy()
    return ids_BT, positions_BT, keep_K, select_N, ids_BT[row_N, column_N], row_N
