"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), q and k in one launch, forward and backward.

Shape suffixes: B rows, T tokens, H query heads, G key heads, D head width, R rotary pairs (rotary width / 2).
NeoX layout pairs dimension i with i + R (Llama, Qwen, Mistral); interleaved pairs 2i with 2i + 1 (GPT-J, DeepSeek).
Dimensions from 2R on pass through (partial rotary).
"""

import math
from typing import Any

import torch

from .jit import cdiv, compute_type, jit, next_power_of_2, tl, use_triton

HEADS_EACH = 8  # of a program: the angles of a token are read once for so many, and there are programs enough


def inverse_frequencies(rotary_width: int, theta: float, scaling: dict[str, Any] | None = None):
    """(R,) float32 radians per position and the factor on cos and sin, for `scaling` as config.json writes it.

    `rope_type` llama3 is Llama 3.1's scheme, yarn is arXiv:2309.00071; absent or default is plain theta ** (-2i/2R).
    """
    index_R = torch.arange(0, rotary_width, 2, dtype=torch.float32)
    inv_freq_R = 1.0 / theta ** (index_R / rotary_width)
    kind = (scaling or {}).get("rope_type", "default")
    if scaling is None or kind == "default":
        return inv_freq_R, 1.0
    if kind == "llama3":
        return _llama3(inv_freq_R, scaling), 1.0
    if kind == "yarn":
        return _yarn(inv_freq_R, rotary_width, theta, scaling)
    raise ValueError(f"rope_type: {kind!r}, must be default, llama3 or yarn")


def _llama3(inv_freq_R: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns_R = scaling["original_max_position_embeddings"] * inv_freq_R / (2 * math.pi)
    kept_R = ((turns_R - low) / (high - low)).clamp(0, 1)
    return (1 - kept_R) * inv_freq_R / scaling["factor"] + kept_R * inv_freq_R


def _yarn(inv_freq_R: torch.Tensor, width: int, theta: float, scaling: dict[str, Any]):
    """NTK-by-parts: interpolate dimensions that turn less than beta_slow times, keep those above beta_fast."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def dimension_of(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(scaling.get("beta_fast") or 32), dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp_R = ((torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)

    def mscale(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        top, bottom = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = mscale(top) / mscale(bottom) if top and bottom else mscale(1.0)
    return inv_freq_R / factor * ramp_R + inv_freq_R * (1 - ramp_R), attention


def rope_tables(position_ids_BT: torch.Tensor, inv_freq_R: torch.Tensor, factor: float = 1.0):
    """cos and sin, (B,T,R) float32. Positions restart in each document of a pack, so packing needs nothing else."""
    angle_BTR = position_ids_BT[..., None].float() * inv_freq_R.to(position_ids_BT.device)
    return angle_BTR.cos() * factor, angle_BTR.sin() * factor


def rope_reference(q_BTHD, k_BTGD, cos_BTR, sin_BTR, interleaved: bool = False):
    """The plain PyTorch twin of `rope`."""
    return tuple(_rotate_reference(x, cos_BTR, sin_BTR, interleaved) for x in (q_BTHD, k_BTGD))


def _rotate_reference(x_BTND, cos_BTR, sin_BTR, interleaved: bool):
    width = 2 * cos_BTR.shape[-1]
    cos, sin = cos_BTR[:, :, None].to(x_BTND.dtype), sin_BTR[:, :, None].to(x_BTND.dtype)
    turned, rest = x_BTND[..., :width], x_BTND[..., width:]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([out, rest], -1)


def rope(q_BTHD, k_BTGD, cos_BTR, sin_BTR, interleaved: bool = False):
    """Rotates q (B,T,H,D) and k (B,T,G,D) by the tables of `rope_tables`; returns new tensors, differentiable.

    The tables may have one row for all rows of the batch. Inputs may be strided views whose last dimension is dense.
    """
    rows, tokens, _, width = q_BTHD.shape
    if k_BTGD.shape[:2] != (rows, tokens) or k_BTGD.shape[3] != width:
        raise ValueError(f"rope: k {tuple(k_BTGD.shape)} must agree with q {tuple(q_BTHD.shape)} in all but heads")
    if cos_BTR.shape != sin_BTR.shape or cos_BTR.shape[0] not in (1, rows) or cos_BTR.shape[1] != tokens:
        raise ValueError(f"rope: cos {tuple(cos_BTR.shape)} must be ({rows} or 1, {tokens}, pairs), as sin")
    if 2 * cos_BTR.shape[2] > width:
        raise ValueError(f"rope: {cos_BTR.shape[2]} rotary pairs do not fit a head of width {width}")
    if not use_triton(q_BTHD):
        return rope_reference(q_BTHD, k_BTGD, cos_BTR, sin_BTR, interleaved)
    return _Rope.apply(q_BTHD, k_BTGD, cos_BTR, sin_BTR, interleaved)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BTHD, k_BTGD, cos_BTR, sin_BTR, interleaved):
        ctx.save_for_backward(cos_BTR, sin_BTR)
        ctx.interleaved = interleaved
        return _launch(q_BTHD, k_BTGD, cos_BTR, sin_BTR, interleaved, 1.0)

    @staticmethod
    def backward(ctx, dout_q, dout_k):
        # the inverse of a rotation is the rotation by minus the angle; scaled tables scale both ways alike
        cos_BTR, sin_BTR = ctx.saved_tensors
        dq_BTHD, dk_BTGD = _launch(dout_q, dout_k, cos_BTR, sin_BTR, ctx.interleaved, -1.0)
        return dq_BTHD, dk_BTGD, None, None, None


def _launch(q_BTHD, k_BTGD, cos_BTR, sin_BTR, interleaved: bool, sign: float):
    rows, tokens, heads, width = q_BTHD.shape
    pairs = cos_BTR.shape[2]
    q_BTHD, k_BTGD = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTHD, k_BTGD))
    cos_BTR = cos_BTR.contiguous()
    sin_BTR = sin_BTR.contiguous()
    out_q, out_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BTHD, k_BTGD))
    block = rope_block(width)
    shared = 0 if cos_BTR.shape[0] == 1 else tokens * pairs
    key_heads = k_BTGD.shape[2]
    grid = (cdiv(tokens, block), rows, cdiv(heads + key_heads, HEADS_EACH))
    rope_kernel[grid](
        q_BTHD, k_BTGD, out_q, out_k, cos_BTR, sin_BTR, tokens, sign, shared,
        *q_BTHD.stride()[:3], *k_BTGD.stride()[:3], *out_q.stride()[:2], *out_k.stride()[:2],
        HEADS=heads, KEY_HEADS=key_heads, EACH=HEADS_EACH, WIDTH=width, PAIRS=pairs, PAIRS_BLOCK=next_power_of_2(pairs),
        REST_BLOCK=next_power_of_2(width - 2 * pairs), BLOCK=block, INTERLEAVED=interleaved,
        COMPUTE=compute_type(q_BTHD.dtype), num_warps=4,
    )  # fmt: skip
    return out_q, out_k


def rope_block(width: int) -> int:
    """Tokens per program: about 16 KiB of fp32 in registers."""
    return max(4, 2048 // next_power_of_2(width))


@jit
def turn(
    source, target, c, s, live,
    WIDTH: tl.constexpr, PAIRS: tl.constexpr, PAIRS_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Rotates one head of BLOCK tokens, whose rows begin at `source`, by cosines and sines of (BLOCK, PAIRS_BLOCK)."""
    kind = target.dtype.element_ty
    r = tl.arange(0, PAIRS_BLOCK)
    if INTERLEAVED:
        d = tl.arange(0, 2 * PAIRS_BLOCK)
        both = live[:, None] & (d < 2 * PAIRS)[None, :]
        x = tl.load(source[:, None] + d[None, :], mask=both, other=0.0).to(COMPUTE)
        first, second = tl.split(tl.reshape(x, (BLOCK, PAIRS_BLOCK, 2)))
        y = tl.reshape(tl.join(first * c - second * s, second * c + first * s), (BLOCK, 2 * PAIRS_BLOCK))
        tl.store(target[:, None] + d[None, :], y.to(kind), mask=both)
    else:
        inside = live[:, None] & (r < PAIRS)[None, :]
        first = tl.load(source[:, None] + r[None, :], mask=inside, other=0.0).to(COMPUTE)
        second = tl.load(source[:, None] + (r + PAIRS)[None, :], mask=inside, other=0.0).to(COMPUTE)
        tl.store(target[:, None] + r[None, :], (first * c - second * s).to(kind), mask=inside)
        tl.store(target[:, None] + (r + PAIRS)[None, :], (second * c + first * s).to(kind), mask=inside)
    if 2 * PAIRS < WIDTH:
        d = 2 * PAIRS + tl.arange(0, REST_BLOCK)
        rest = live[:, None] & (d < WIDTH)[None, :]
        tl.store(target[:, None] + d[None, :], tl.load(source[:, None] + d[None, :], mask=rest), mask=rest)


@jit
def rope_kernel(
    q, k, out_q, out_k, cos, sin, tokens, sign, table_stride,
    q_b, q_t, q_h, k_b, k_t, k_h, oq_b, oq_t, ok_b, ok_t,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, EACH: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr,
    PAIRS_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program rotates BLOCK tokens of EACH heads of q, then of k, by angles that it reads once; 64-bit offsets,
    since T * H * D passes 2**31."""
    row = tl.program_id(1).to(tl.int64)
    start = tl.program_id(2) * EACH
    t = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    live = t < tokens
    r = tl.arange(0, PAIRS_BLOCK)
    at = row * table_stride + t[:, None] * PAIRS + r[None, :]
    inside = live[:, None] & (r < PAIRS)[None, :]
    c = tl.load(cos + at, mask=inside, other=0.0).to(COMPUTE)
    s = tl.load(sin + at, mask=inside, other=0.0).to(COMPUTE) * sign
    for head in range(start, tl.minimum(start + EACH, HEADS)):
        turn(q + row * q_b + t * q_t + head * q_h, out_q + row * oq_b + t * oq_t + head * WIDTH, c, s, live,
             WIDTH, PAIRS, PAIRS_BLOCK, REST_BLOCK, BLOCK, INTERLEAVED, COMPUTE)  # fmt: skip
    for head in range(tl.maximum(start - HEADS, 0), tl.minimum(start + EACH - HEADS, KEY_HEADS)):
        turn(k + row * k_b + t * k_t + head * k_h, out_k + row * ok_b + t * ok_t + head * WIDTH, c, s, live,
             WIDTH, PAIRS, PAIRS_BLOCK, REST_BLOCK, BLOCK, INTERLEAVED, COMPUTE)  # fmt: skip
