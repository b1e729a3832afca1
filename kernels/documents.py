"""Packed documents on the PyTorch path: where they end, and SDPA within each.

On a processor every document has an SDPA call of its own. A GPU would wait for hundreds of small calls a layer, so
there documents of like length share one: causal attention never looks at the padding behind a document's last token.

Shape suffixes: B rows, T tokens, H query heads, G key/value heads, D head width, E value width, N tokens by bucket.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .kept import join

SHORTEST_BUCKET = 16
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def document_ends(position_ids_BT: torch.Tensor) -> list[list[int]]:
    """For each row, the ends of its documents: a document goes on as long as positions count up by one."""
    ends: list[list[int]] = []
    width = position_ids_BT.shape[1]
    breaks_BT = (position_ids_BT[:, 1:] - position_ids_BT[:, :-1]) != 1
    for breaks_T in breaks_BT.cpu():
        ends.append([*(torch.nonzero(breaks_T).flatten() + 1).tolist(), width])
    return ends


@dataclass(frozen=True)
class Bucket:
    """Documents that one call takes: how many, the length they are padded to, and where in the padded rows their
    tokens stand."""

    documents: int
    length: int
    slots_N: torch.Tensor


@dataclass(frozen=True)
class Buckets:
    """`tokens_N` lists a row-major batch's tokens by bucket, `places_T` undoes that."""

    buckets: tuple[Bucket, ...]
    tokens_N: torch.Tensor
    places_T: torch.Tensor


@dataclass(frozen=True)
class Packing:
    """The documents of a batch: for each row where they end."""

    ends: list[list[int]]
    length: int
    device: torch.device

    @cached_property
    def borders(self) -> list[int]:
        """All documents' borders, the rows one after another."""
        return [0, *(row * self.length + end for row, ends in enumerate(self.ends) for end in ends)]

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        return torch.tensor(self.borders, dtype=torch.int32, device=self.device)

    @cached_property
    def causal_buckets(self) -> Buckets:
        """By the next power of two, which at most doubles the scores' rows and needs a dozen calls at most."""
        return buckets_of(self.borders, True, self.device)

    @cached_property
    def equal_buckets(self) -> Buckets:
        """By length, for attention that would see padding."""
        return buckets_of(self.borders, False, self.device)


def buckets_of(borders: Sequence[int], padded: bool, device: torch.device) -> Buckets:
    """Sorts the documents between `borders` into buckets of a length, or of lengths up to a power of two."""
    by_length: dict[int, list[tuple[int, int]]] = {}
    for start, end in itertools.pairwise(borders):
        length = max(1 << (end - start - 1).bit_length(), SHORTEST_BUCKET) if padded else end - start
        by_length.setdefault(length, []).append((start, end))
    buckets, tokens = [], []
    for length, spans in sorted(by_length.items()):
        slots = [torch.arange(end - start) + place * length for place, (start, end) in enumerate(spans)]
        buckets.append(Bucket(len(spans), length, torch.cat(slots).to(device)))
        tokens += [torch.arange(start, end) for start, end in spans]
    tokens_N = torch.cat(tokens)
    return Buckets(tuple(buckets), tokens_N.to(device), torch.argsort(tokens_N).to(device))


class _LastPacking:
    """The packing of the position ids seen last: all layers of a pass share them, and one wait for the device."""

    def __init__(self) -> None:
        self.key: tuple = ()
        self.positions: torch.Tensor | None = None
        self.packing: Packing | None = None

    def of(self, position_ids: torch.Tensor | None, rows: int, length: int, device: torch.device) -> Packing:
        """Position ids may be given once for all rows; without any, each row is one document."""
        if position_ids is None or position_ids.is_inference():  # whose changes leave no trace
            return self._read(position_ids, rows, length, device)
        key = (position_ids._version, rows, length, device)
        if self.packing is None or self.positions is not position_ids or self.key != key:
            self.packing = self._read(position_ids, rows, length, device)
            self.positions, self.key = position_ids, key
        return self.packing

    def _read(self, position_ids: torch.Tensor | None, rows: int, length: int, device: torch.device) -> Packing:
        ends = document_ends(position_ids) if position_ids is not None else [[length]]
        return Packing(ends * rows if len(ends) == 1 else ends, length, device)


packing_of = _LastPacking().of


def sdpa_document(q_1HTD, k_1GTD, v_1GTE, scale, dropout, window, causal: bool, later=None) -> torch.Tensor:
    """SDPA over documents of equal length, (B,H,T,D) x (B,G,S,D) x (B,G,S,E) -> (B,H,T,E).

    Queries are the last T of S tokens; where these are not all, `later` says what of them they see, without a window.
    """
    queries, length, mask = q_1HTD.shape[2], k_1GTD.shape[2], later
    if causal and window is not None and length > window:
        index = torch.arange(length, device=q_1HTD.device)
        back = index[length - queries :, None] - index[None, :]
        mask = (back >= 0) & (back < window)
    gqa = k_1GTD.shape[1] != q_1HTD.shape[1]
    if gqa and mask is not None and q_1HTD.device.type != "cpu":  # fused kernels there share heads or take a mask
        k_1GTD, v_1GTE = (x.repeat_interleave(q_1HTD.shape[1] // x.shape[1], 1) for x in (k_1GTD, v_1GTE))
        gqa = False
    return F.scaled_dot_product_attention(
        q_1HTD, k_1GTD, v_1GTE, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None and queries > 1,
        scale=scale, enable_gqa=gqa,
    )  # fmt: skip


def sdpa_each(packing: Packing, q_BHTD, k_BGTD, v_BGTE, scale, dropout, window, causal: bool) -> torch.Tensor:
    """One call a document, (B,H,T,D), (B,G,T,D), (B,G,T,E) -> (B,T,H,E)."""
    out_rows = []
    for row, row_ends in enumerate(packing.ends):
        lengths = [end - start for start, end in itertools.pairwise([0, *row_ends])]
        # split, not slices: the gradient of a slice is as large as the whole row, once for each document
        parts = zip(*(x[row : row + 1].split(lengths, 2) for x in (q_BHTD, k_BGTD, v_BGTE)), strict=True)
        pieces = [sdpa_document(q, k, v, scale, dropout, window, causal) for q, k, v in parts]
        out_rows.append([piece.transpose(1, 2) for piece in pieces])
    return join(out_rows)


def sdpa_by_bucket(packing: Packing, q_BHTD, k_BGTD, v_BGTE, scale, dropout, window, causal: bool) -> torch.Tensor:
    """One call for all documents of like length, shapes as `sdpa_each`.

    Tokens are sorted by bucket once; a bucket's go to their slots among zeros, and its results come back from them.
    Not by cuDNN, which PyTorch would choose on Hopper: it plans anew for every shape it has not seen, for milliseconds.
    """
    sorted_by = packing.causal_buckets if causal else packing.equal_buckets
    sizes = [bucket.slots_N.numel() for bucket in sorted_by.buckets]
    parts = zip(*(_by_bucket(x, sorted_by, sizes) for x in (q_BHTD, k_BGTD, v_BGTE)), strict=True)
    pieces = []
    for bucket, (q, k, v) in zip(sorted_by.buckets, parts, strict=True):
        q, k, v = (_pad(x, bucket).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(BACKENDS):
            out_BTHE = sdpa_document(q, k, v, scale, dropout, window, causal).transpose(1, 2)
        pieces.append(out_BTHE.flatten(0, 1).index_select(0, bucket.slots_N))
    out = torch.cat(pieces).index_select(0, sorted_by.places_T)
    return out.unflatten(0, (q_BHTD.shape[0], packing.length))


def _by_bucket(x_BHTD: torch.Tensor, sorted_by: Buckets, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    return x_BHTD.transpose(1, 2).flatten(0, 1).index_select(0, sorted_by.tokens_N).split(sizes)


def _pad(x_NHD: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    rows = x_NHD.new_zeros(bucket.documents * bucket.length, *x_NHD.shape[1:])
    return rows.index_copy(0, bucket.slots_N, x_NHD).unflatten(0, (bucket.documents, bucket.length))
