"""`deterministic: elastic`: the same bits of weights, gradient norm and loss on 1, 2, 4, 8 ... ranks.

Floating-point sums depend on their order, so this engine fixes it. A global batch is cut into micro-batches by its
lengths and the recipe's `batch.micro` alone; each one's gradient is computed by itself, and all of them are added in
one binary tree over their numbers. The tree halves the row of micro-batches, the larger half on the left; with a power
of two of ranks, each rank owns one whole subtree, and what is left to add between ranks is a balanced tree over rank
numbers. There, sums are not left to an all-reduce: every rank gets its slice of everybody's gradient, adds the pieces
in tree order and hands the result to all; as many bytes travel as in a ring all-reduce.

The price: weights, gradients and moments lie whole on every rank; up to log2(micro-batches of a rank) + 2 gradients are
held at a time; nothing is sent before the last backward ends; on CPUs one thread computes, because the order of sums
inside a matrix product depends on the number of threads. Bits are equal on processors of one kind, not across kinds.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .batches import Item, accumulation, cut, tree_block, tree_merges
from .engine import Engine
from .ranks import Ranks
from .recipe import Batch, Recipe

BUCKET_NUMBERS = 1 << 24
"""Gradient elements that travel at a time: the exchange holds three buffers of this size, 192 MiB."""


class ElasticEngine(Engine):
    """Replicated weights like DDP, gradients added in a canonical tree."""

    def __init__(self, ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        super().__init__(ranks, model, optimizer, recipe)
        self._merges: list[int] = []
        self._rounds = 1
        self._partial: list[list[Tensor]] = []
        """Sums of finished subtrees, the earliest first: no more of them than the tree is deep."""

    def _distribute(self) -> nn.Module:
        return self.module

    def share(self, items: Sequence[Item], tokens: Sequence[float], batch: Batch) -> list[Sequence[Item]]:
        """The subtree of this rank; a rank without one computes one inert micro-batch, whose gradient is zero."""
        leaves = accumulation(len(items), batch.micro, 1)
        block = tree_block(leaves, self.ranks.world_size, self.ranks.rank)
        self._rounds = max(1, -(-leaves // self.ranks.world_size))
        self._merges = tree_merges(max(1, len(block)))
        self._partial = []
        parts = cut(tokens, batch, leaves)
        return [[items[index] for index in parts[number]] for number in block] or [items[:0]]

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trainable]
        self.optimizer.zero_grad(set_to_none=True)
        self._partial.append(gradient)
        for _ in range(self._merges.pop(0)):
            right = self._partial.pop()
            torch._foreach_add_(self._partial[-1], right)
        if last:
            (total,) = self._partial
            self._partial = []
            if self.ranks.world_size > 1:
                for bucket in _buckets(total):
                    add_over_ranks(bucket, self.ranks.world_size)
            for parameter, gradient in zip(self.trainable, total, strict=True):
                parameter.grad = gradient.add_(0.0)  # a rank without micro-batches may have turned -0 into 0

    def total(self, parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Logged numbers, added exactly and rounded once: no order of addition shows."""
        keys = list(parts[0])
        table = torch.zeros(self._rounds, len(keys), dtype=torch.float64)
        table[: len(parts)] = torch.tensor([[part[key] for key in keys] for part in parts], dtype=torch.float64)
        everyone = [table]
        if self.ranks.world_size > 1:
            everyone = [torch.empty_like(table, device=self.ranks.device) for _ in range(self.ranks.world_size)]
            dist.all_gather(everyone, table.to(self.ranks.device))
        columns = torch.cat(everyone).T.tolist()
        return {key: _exact_sum(column) for key, column in zip(keys, columns, strict=True)}


def _exact_sum(numbers: list[float]) -> float:
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else sum(numbers)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(map(torch.numel, bucket)) + tensor.numel() > BUCKET_NUMBERS:
            yield bucket
            bucket = []
        bucket.append(tensor)
    yield bucket


def add_over_ranks(tensors: Sequence[Tensor], world_size: int) -> None:
    """Replace tensors, in place, by their sums over all ranks, added as a balanced tree of rank numbers. Collective.

    ((r0 + r1) + (r2 + r3)) + ((r4 + r5) + ...): the tree that `tree_block` cuts between ranks. A power of two of them.
    """
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    length = len(flat)
    flat = nn.functional.pad(flat, (0, -length % world_size))
    received = torch.empty_like(flat)
    dist.all_to_all_single(received, flat)
    pieces = list(received.view(world_size, -1))
    while len(pieces) > 1:
        pieces = [left + right for left, right in zip(pieces[::2], pieces[1::2], strict=True)]
    dist.all_gather_into_tensor(flat, pieces[0])
    for tensor, total in zip(tensors, flat[:length].split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))
