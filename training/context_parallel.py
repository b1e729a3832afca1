"""Context parallel: neighbouring ranks share the tokens of every row, and packed documents stay apart.

Each of c ranks takes two of 2c chunks of every row, number `place` from the left and from the right, because under a
causal mask later tokens see more: so all have the same work. All that a transformer does token by token needs nothing
else than right position ids. In attention, keys and values of the whole row are gathered over the group, and a rank's
queries attend, document by document, to what came before them (Llama Team 2024, section 3.3.2: keys and values are
small under grouped queries, and any mask of documents works; ring attention's partial softmaxes have neither). Their
gradients go back the same way and are added in the order of ranks.

Labels are shifted before a row is cut, by `collate`: a chunk's last token predicts the next chunk's first. Every rank
of a group gets back the log-probabilities of all targets, with gradients for its own, so that methods see whole rows.

Shape legend: B rows, S tokens of a row, T of them here, N targets, M of them here, K kept columns, H query heads,
G key/value heads, D head width, E value width.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.bias import CausalBias, causal_lower_right

from ..kernels.documents import document_ends, sdpa_document
from ..kernels.huggingface import TORCH_ATTENTION
from .batches import MicroBatch


@dataclass(frozen=True)
class Neighbours:
    """The ranks that share rows, and this rank's place among them."""

    group: Any
    size: int
    place: int


@dataclass(frozen=True)
class Stretch:
    """Tokens of one document in one chunk: so many queries, which see the document's first `keys` tokens and are the
    last of them."""

    document: int
    queries: int
    keys: int
    mask: CausalBias | None
    """What queries at the end of the keys see, in torch's word for it: no mask in memory where a kernel knows it."""


@dataclass(frozen=True)
class Row:
    """A row's documents by their lengths, and the stretches that lie here, in their order."""

    documents: list[int]
    stretches: list[Stretch]


_NEIGHBOURS: ContextVar[Neighbours | None] = ContextVar("ranks that share the rows of this micro-batch", default=None)


def neighbours(mesh: DeviceMesh, model: nn.Module) -> Neighbours:
    """Who shares rows with this rank. Raises ValueError for a model whose attention is not ours."""
    config = cast(Any, model).config
    if config._attn_implementation != TORCH_ATTENTION:
        raise ValueError(
            f"parallel.context: the attention of {config.model_type} cannot be shared by ranks here; set "
            "parallel.context: 1"
        )
    group = mesh["cp"].get_group()
    return Neighbours(group, dist.get_world_size(group), dist.get_rank(group))


@contextmanager
def sharing(who: Neighbours | None) -> Iterator[None]:
    """The scope in which `part_of` cuts rows; with None it leaves them whole."""
    token = _NEIGHBOURS.set(who)
    try:
        yield
    finally:
        _NEIGHBOURS.reset(token)


class SharedAttention:
    """What attention needs to know of the rows that ranks share; `rows` has one entry if all are alike.

    No dataclass: FSDP2 looks for tensors to cast in those among a model's arguments, and takes a mask for one.
    """

    def __init__(self, who: Neighbours, rows: list[Row]) -> None:
        self.who, self.rows = who, rows

    def attend(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, scale: float | None, dropout: float, window: int | None
    ) -> Tensor:
        """Causal attention of this rank's queries to the keys of their documents, on all ranks: (B,T,H,E). Collective.

        Under activation checkpointing the backward pass calls it again, on every rank in the same order.
        """
        kv_BGSF = gather_tokens(torch.cat([k_BGTD, v_BGTE], -1), self.who)
        widths = [k_BGTD.shape[-1], v_BGTE.shape[-1]]
        rows = [slice(None)] if len(self.rows) == 1 else [slice(b, b + 1) for b in range(len(self.rows))]
        done = []
        for b, row in zip(rows, self.rows, strict=True):
            # split, not slices: the gradient of a slice is as large as the whole row, once for each document
            documents = kv_BGSF[b].split(row.documents, 2)
            queries = q_BHTD[b].split([stretch.queries for stretch in row.stretches], 2)
            pieces = []
            for q, stretch in zip(queries, row.stretches, strict=True):
                k, v = documents[stretch.document][:, :, : stretch.keys].split(widths, -1)
                pieces.append(sdpa_document(q, k, v, scale, dropout, window, True, stretch.mask).transpose(1, 2))
            done.append(torch.cat(pieces, dim=1))
        return torch.cat(done).contiguous()


@dataclass(frozen=True)
class Part:
    """What one rank computes of a micro-batch: a micro-batch of its own, some of the targets, and its attention."""

    batch: MicroBatch
    who: Neighbours
    mine_M: Tensor
    """Which of the whole micro-batch's targets are here."""
    targets: int
    """How many the whole has."""
    attention: SharedAttention

    def whole(self, here_M: Tensor) -> Tensor:
        """A number of every target of the whole micro-batch on every rank, gradients for those here. Collective."""
        return _Whole.apply(here_M, self.mine_M, self.targets, self.who.group)  # pyright: ignore[reportReturnType]


def part_of(whole: MicroBatch) -> Part | None:
    """This rank's part of a micro-batch; None outside `sharing`."""
    who = _NEIGHBOURS.get()
    if who is None:
        return None
    count, width = whole.ids_BT.shape
    chunk = -(-width // (2 * who.size))
    places = (who.place, 2 * who.size - 1 - who.place)
    device = whole.ids_BT.device
    padding = 2 * who.size * chunk - width
    restart_T = torch.arange(padding, device=device).expand(count, padding)  # padding is a document of its own
    positions_BS = torch.cat([whole.positions_BT, restart_T], dim=1)
    column_T = torch.cat([torch.arange(place * chunk, (place + 1) * chunk, device=device) for place in places])
    here_S = torch.full((positions_BS.shape[1],), -1, device=device)
    here_S[column_T] = torch.arange(2 * chunk, device=device)
    kept_K = here_S[whole.keep_K]
    keep_K = kept_K[kept_K >= 0]
    place_K = torch.cumsum(kept_K >= 0, 0) - 1  # of each kept column among those kept here
    row_N, at_N = whole.select_N // len(whole.keep_K), whole.select_N % len(whole.keep_K)
    mine_M = torch.nonzero(kept_K[at_N] >= 0).flatten()
    if not len(keep_K):  # the head computes something on every rank, so that every weight has a gradient
        keep_K = here_S.new_zeros(1)
    batch = replace(
        whole,
        ids_BT=F.pad(whole.ids_BT, (0, padding))[:, column_T],
        positions_BT=positions_BS[:, column_T],
        real_BT=F.pad(whole.real_BT, (0, padding))[:, column_T],
        keep_K=keep_K,
        select_N=row_N[mine_M] * len(keep_K) + place_K[at_N[mine_M]],
        targets_N=whole.targets_N[mine_M],
        weights_N=whole.weights_N[mine_M],
        row_N=whole.row_N[mine_M],
    )
    ends = document_ends(positions_BS)
    alike = all(row == ends[0] for row in ends)
    rows = [_row(row, places, chunk) for row in (ends[:1] if alike else ends)]
    return Part(batch, who, mine_M, len(whole.select_N), SharedAttention(who, rows))


def _row(ends: list[int], places: tuple[int, int], chunk: int) -> Row:
    """A row whose documents end at `ends`, as far as it lies in two chunks."""
    borders = list(itertools.pairwise([0, *ends]))
    found = []
    for place in places:
        for number, (start, end) in enumerate(borders):
            begin, stop = max(start, place * chunk), min(end, (place + 1) * chunk)
            if begin < stop:
                queries, keys = stop - begin, stop - start
                mask = causal_lower_right(queries, keys) if 1 < queries < keys else None
                found.append(Stretch(number, queries, keys, mask))
    return Row([end - start for start, end in borders], found)


def gather_tokens(x_BGTF: Tensor, who: Neighbours) -> Tensor:
    """The whole rows of which every rank has two chunks, (B,G,S,F), in the rows' order. Collective, backward too."""
    left, right = _Gather.apply(x_BGTF, who).chunk(2, dim=3)  # pyright: ignore
    return torch.cat([*left.unbind(), *right.flip(0).unbind()], dim=2)


class _Gather(torch.autograd.Function):
    """Every rank's tensor, stacked by rank; backward, every rank's gradients of one's own, added in rank order in fp32:
    a backend's reduce-scatter may add in any."""

    @staticmethod
    def forward(ctx, x: Tensor, who: Neighbours) -> Tensor:
        ctx.who = who
        everyone = x.new_empty((who.size, *x.shape))
        dist.all_gather(list(everyone.unbind()), x.contiguous(), group=who.group)
        return everyone

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        received = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, grad.contiguous(), group=ctx.who.group)
        total = received[0].float()
        for piece in received[1:]:
            total = total + piece
        return total.to(grad.dtype), None


class _Whole(torch.autograd.Function):
    """Numbers that lie on one rank each, on every rank. Adding zeros changes no bit."""

    @staticmethod
    def forward(ctx, here_M: Tensor, mine_M: Tensor, targets: int, group: Any) -> Tensor:
        ctx.save_for_backward(mine_M)
        whole_N = here_M.new_zeros(targets).index_copy(0, mine_M, here_M)
        dist.all_reduce(whole_N, group=group)
        return whole_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N: Tensor):
        (mine_M,) = ctx.saved_tensors
        return grad_N[mine_M], None, None, None
