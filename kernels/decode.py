"""Decode attention: one new query per sequence against its keys in a paged cache.

Shape suffixes: B sequences, H query heads, G key/value heads, D head width, P pages, S slots of a page, N splits.
The keys of a sequence are cut every SPLIT_KEYS, whatever else is in the batch, and the parts are joined in order: a
sequence's result is the same bits in every batch (the fixed split size of "Defeating nondeterminism in LLM inference").

fp32 is multiplied and added up in fp64: memory bounds a step, and a library's GEMV, whose lanes share a product's
depth, rounds less than any chain of fp32 sums that Triton makes.
"""

from typing import Any

import torch

from .attention_tiles import raise_two
from .jit import architecture, cdiv, exponent, is_exact, jit, next_power_of_2, tl, use_triton, wide_type

SPLIT_KEYS = 256
TILE_KEYS = 64
JOIN_ELEMENTS = 512  # per program of one warp: at least 8 per lane on every card, one 128-bit store of a half type


def decode_reference(q_BHD, k_PSGD, v_PSGD, page_table, lengths_B, scale=None) -> torch.Tensor:
    """The plain PyTorch twin of `decode_attention`."""
    heads, width = q_BHD.shape[1:]
    slots, groups = k_PSGD.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    out_BHD = torch.zeros_like(q_BHD)
    for row, length in enumerate(lengths_B.tolist()):
        if length:
            pages = page_table[row, : cdiv(length, slots)].long()
            k_THD, v_THD = (
                x[pages].flatten(0, 1)[:length].repeat_interleave(heads // groups, 1) for x in (k_PSGD, v_PSGD)
            )
            s_HT = torch.einsum("hd,thd->ht", q_BHD[row], k_THD) * scale
            p_HT = torch.softmax(s_HT.to(wide_type(s_HT.dtype)), -1).to(q_BHD.dtype)
            out_BHD[row] = torch.einsum("ht,thd->hd", p_HT, v_THD)
    return out_BHD


def decode_attention(q_BHD, k_PSGD, v_PSGD, page_table, lengths_B, scale=None) -> torch.Tensor:
    """softmax(q k^T scale) v, (B,H,D) against pages (P,S,G,D) -> (B,H,D).

    `page_table` (B, pages) int32 lists each sequence's pages in order, `lengths_B` int32 its keys; 0 gives zeros.
    """
    rows, heads, width = q_BHD.shape
    slots, groups = k_PSGD.shape[1:3]
    if k_PSGD.shape != v_PSGD.shape or k_PSGD.shape[3] != width or heads % groups:
        raise ValueError(f"decode_attention: k {tuple(k_PSGD.shape)} and v {tuple(v_PSGD.shape)} do not fit q's heads")
    if width != next_power_of_2(width) or width < 16:
        raise ValueError(f"decode_attention: head width {width}, must be a power of two of at least 16")
    if page_table.shape[0] != rows or lengths_B.shape != (rows,):
        raise ValueError(f"decode_attention: page_table and lengths must have one row per sequence ({rows})")
    if not use_triton(q_BHD):
        return decode_reference(q_BHD, k_PSGD, v_PSGD, page_table, lengths_B, scale)
    scale = width**-0.5 if scale is None else scale
    q_BHD, k_PSGD, v_PSGD = q_BHD.contiguous(), k_PSGD.contiguous(), v_PSGD.contiguous()
    page_table = page_table.contiguous()
    splits = max(1, cdiv(page_table.shape[1] * slots, SPLIT_KEYS))
    exact = is_exact(q_BHD.dtype)
    state = torch.float64 if exact else torch.float32
    parts = torch.empty(rows, heads, splits, width, dtype=state, device=q_BHD.device)
    tops, totals = (torch.empty(rows, heads, splits, dtype=state, device=q_BHD.device) for _ in range(2))
    out_BHD = torch.empty_like(q_BHD)
    base = decode_exponent(q_BHD.dtype, scale)
    if rows:
        decode_kernel[(rows, groups, splits)](
            q_BHD, k_PSGD, v_PSGD, page_table, lengths_B, parts, tops, totals, page_table.shape[1], splits,
            GROUP=heads // groups, HEADS=heads, GROUPS=groups, WIDTH=width, SLOTS=slots, SPLIT=SPLIT_KEYS,
            num_warps=4, num_stages=2, **base,
            **decode_tile(architecture(q_BHD.device), q_BHD.dtype, heads // groups, width),
        )  # fmt: skip
        tile = join_heads(width)
        join_kernel[(rows, cdiv(heads, tile))](
            parts, tops, totals, lengths_B, out_BHD, splits, HEADS=heads, TILE=tile, WIDTH=width, SPLIT=SPLIT_KEYS,
            num_warps=1, **base,
        )  # fmt: skip
    return out_BHD


def decode_tile(arch: str, dtype: torch.dtype, group: int, width: int) -> dict[str, int]:
    """Query heads and keys of one step, and columns of one product. Tensor cores want 16 rows, fp64 as many as it
    has heads. Where Triton gives fp64 none of those cores, a thread holds whole rows of a product's factors."""
    if not is_exact(dtype):
        return dict(GROUP_TILE=max(16, next_power_of_2(group)), BN=TILE_KEYS, SLICE=width)
    keys = 32 if arch in ("sm_80", "sm_90") else 16
    return dict(GROUP_TILE=next_power_of_2(group), BN=keys, SLICE=min(width, 32))


def decode_exponent(dtype: torch.dtype, scale: float) -> dict[str, Any]:
    """`exponent` with fp64 sums for fp32."""
    base = exponent(dtype, scale)
    return base | dict(COMPUTE=tl.float64) if base["EXACT"] else base


def join_heads(width: int) -> int:
    """Query heads that one program joins."""
    return max(1, JOIN_ELEMENTS // width)


@jit
def raise_wide(x, C: tl.constexpr, C_LOW: tl.constexpr, EXACT: tl.constexpr, COMPUTE: tl.constexpr, KIND: tl.constexpr):
    """2 ** (x * C) for x <= 0. Of fp32 data x is fp64, and the power as near as fp32's exp2 comes."""
    if tl.float32 != KIND:
        return raise_two(x, C, C_LOW, EXACT, COMPUTE)
    power = tl.maximum(x, -1e30) * C
    near = power.to(tl.float32)
    return tl.exp2(near) * (1.0 + (power - near) * 0.6931471805599453)


@jit
def wide_scores(q, live, k, inside, WIDTH: tl.constexpr, SLICE: tl.constexpr, COMPUTE: tl.constexpr):
    """q k^T in COMPUTE, of the rows at these pointers, SLICE columns at a time."""
    s = tl.zeros([q.shape[0], k.shape[0]], COMPUTE)
    for first in tl.static_range(0, WIDTH, SLICE):
        d = first + tl.arange(0, SLICE)[None, :]
        queries = tl.load(q + d, mask=live, other=0.0).to(COMPUTE)
        keys = tl.load(k + d, mask=inside, other=0.0).to(COMPUTE)
        s = tl.dot(queries, tl.trans(keys), s, input_precision="ieee", out_dtype=COMPUTE)
    return s


@jit
def decode_kernel(
    q, k, v, page_table, lengths, parts, tops, totals, pages, splits, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, SPLIT: tl.constexpr,
    BN: tl.constexpr, SLICE: tl.constexpr, C: tl.constexpr, C_LOW: tl.constexpr, EXACT: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program makes one split of one key head of one sequence, for all query heads of the group at once."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    member = tl.arange(0, GROUP_TILE)
    d = tl.arange(0, WIDTH)
    head = row * HEADS + kv_head * GROUP + member
    live = member < GROUP
    kind: tl.constexpr = q.dtype.element_ty
    if not EXACT:
        queries = tl.load(q + head[:, None] * WIDTH + d[None, :], mask=live[:, None], other=0.0)
    top = tl.full([GROUP_TILE], float("-inf"), COMPUTE)
    total = tl.zeros([GROUP_TILE], COMPUTE)
    acc = tl.zeros([GROUP_TILE, WIDTH], COMPUTE)
    start = split * SPLIT
    for n in range(start, tl.minimum(start + SPLIT, length), BN):
        key = n + tl.arange(0, BN)
        inside = key < length
        page = tl.load(page_table + row * pages + key // SLOTS, mask=inside, other=0).to(tl.int64)
        first = ((page * SLOTS + key % SLOTS) * GROUPS + kv_head)[:, None] * WIDTH
        at = first + d[None, :]
        if EXACT:
            s = wide_scores(q + head[:, None] * WIDTH, live[:, None], k + first, inside[:, None], WIDTH, SLICE, COMPUTE)
        else:
            keys = tl.load(k + at, mask=inside[:, None], other=0.0)
            s = tl.dot(queries, tl.trans(keys), tl.zeros([GROUP_TILE, BN], COMPUTE), input_precision="ieee",
                       out_dtype=COMPUTE)  # fmt: skip
        s = tl.where(inside[None, :], s, float("-inf"))
        top_new = tl.maximum(top, tl.max(s, 1))
        p = raise_wide(s - top_new[:, None], C, C_LOW, EXACT, COMPUTE, kind)
        fade = raise_wide(top - top_new, C, C_LOW, EXACT, COMPUTE, kind)
        total = total * fade + tl.sum(p, 1)
        values = tl.load(v + at, mask=inside[:, None], other=0.0)
        factor: tl.constexpr = COMPUTE if EXACT else kind
        acc = tl.dot(p.to(factor), values.to(factor), acc * fade[:, None], input_precision="ieee", out_dtype=COMPUTE)
        top = top_new
    if start < length:
        part = head * splits + split
        tl.store(parts + part[:, None] * WIDTH + d[None, :], acc, mask=live[:, None])
        tl.store(tops + part, top, mask=live)
        tl.store(totals + part, total, mask=live)


@jit
def join_kernel(
    parts, tops, totals, lengths, out, splits, HEADS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
    SPLIT: tl.constexpr, C: tl.constexpr, C_LOW: tl.constexpr, EXACT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Joins the splits of TILE heads of one sequence, each head by itself, first split to last."""
    row = tl.program_id(0).to(tl.int64)
    member = tl.program_id(1) * TILE + tl.arange(0, TILE)
    live = member < HEADS
    head = row * HEADS + member
    length = tl.load(lengths + row)
    d = tl.arange(0, WIDTH)
    kind: tl.constexpr = out.dtype.element_ty
    top = tl.full([TILE], float("-inf"), COMPUTE)
    total = tl.zeros([TILE], COMPUTE)
    acc = tl.zeros([TILE, WIDTH], COMPUTE)
    for split in range(0, (length + SPLIT - 1) // SPLIT):
        part = head * splits + split
        part_top = tl.load(tops + part, mask=live, other=0.0)
        top_new = tl.maximum(top, part_top)
        fade = raise_wide(top - top_new, C, C_LOW, EXACT, COMPUTE, kind)
        weight = raise_wide(part_top - top_new, C, C_LOW, EXACT, COMPUTE, kind)
        values = tl.load(parts + part[:, None] * WIDTH + d[None, :], mask=live[:, None], other=0.0)
        acc = acc * fade[:, None] + values * weight[:, None]
        total = total * fade + tl.load(totals + part, mask=live, other=0.0) * weight
        top = top_new
    share = tl.where(total > 0.0, 1.0 / total, 0.0)
    tl.store(
        out + head[:, None] * WIDTH + d[None, :], (acc * share[:, None]).to(out.dtype.element_ty), mask=live[:, None]
    )
