"""SwiGLU (Shazeer 2020, arXiv:2002.05202): silu(gate) * up, one launch forward, one backward that recomputes."""

import torch

from .attention_tiles import raise_two
from .jit import architecture, cdiv, exponent, jit, tl, use_triton


def swiglu_block(arch: str) -> int:
    """Elements per program: 8 per thread of 4 warps, one 128-bit access of a half type; AMD's are 64 threads wide."""
    return 2048 if arch.startswith("gfx") else 1024


def swiglu_reference(gate, up):
    """The plain PyTorch twin of `swiglu`."""
    return torch.nn.functional.silu(gate) * up


def swiglu(gate, up):
    """gate * sigmoid(gate) * up, elementwise over equal shapes; computed in fp32 and rounded once."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} must agree in shape and dtype")
    return _SwiGlu.apply(gate, up) if use_triton(gate) else swiglu_reference(gate, up)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        if out.numel():
            block = swiglu_block(architecture(gate.device))
            swiglu_kernel[(cdiv(out.numel(), block),)](
                gate, up, out, out.numel(), BLOCK=block, num_warps=4, **exponent(gate.dtype)
            )
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad = grad.contiguous()
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        if grad.numel():
            block = swiglu_block(architecture(grad.device))
            swiglu_backward_kernel[(cdiv(grad.numel(), block),)](
                grad, gate, up, dgate, dup, grad.numel(), BLOCK=block, num_warps=4, **exponent(gate.dtype)
            )
        return dgate, dup


@jit
def sigmoid(x, C: tl.constexpr, C_LOW: tl.constexpr, EXACT: tl.constexpr, COMPUTE: tl.constexpr):
    """sigmoid(x) and 1 - sigmoid(x), each with what its rounding lost (EXACT); neither tail overflows or cancels."""
    one = tl.full(x.shape, 1.0, COMPUTE)
    fall = raise_two(-tl.abs(x), C, C_LOW, EXACT, COMPUTE)
    total = 1.0 + fall
    large = 1.0 / total
    if not EXACT:
        right, small = x >= 0, fall * large
        return tl.where(right, large, small), x, tl.where(right, small, large), x
    large_low = large * (tl.fma(-large, total, one) - large * (fall - (total - 1.0)))
    small = fall * large
    small_low = tl.fma(fall, large, -small) + fall * large_low
    right = x >= 0
    low, rest_low = tl.where(right, large_low, small_low), tl.where(right, small_low, large_low)
    return tl.where(right, large, small), low, tl.where(right, small, large), rest_low


@jit
def swiglu_kernel(
    gate, up, out, count, BLOCK: tl.constexpr, C: tl.constexpr, C_LOW: tl.constexpr, EXACT: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """What is rounded to half a word is made without what its steps lost: that would take longer than memory does."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(COMPUTE)
    u = tl.load(up + at, mask=inside, other=0.0).to(COMPUTE)
    if EXACT:
        s, s_low, _, _ = sigmoid(g, C, C_LOW, EXACT, COMPUTE)
        silu = g * s
        low = tl.fma(g, s, -silu) + g * s_low
        low = tl.where(low == low, low, 0.0)  # an infinite gate
        y = tl.fma(silu, u, low * u)
    else:
        y = g / (1.0 + tl.exp2(g * -C)) * u
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@jit
def swiglu_backward_kernel(
    grad, gate, up, dgate, dup, count, BLOCK: tl.constexpr, C: tl.constexpr, C_LOW: tl.constexpr, EXACT: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """dup = dy silu(g) and dgate = dy u sigmoid(g) (1 + g (1 - sigmoid(g)))."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    dy = tl.load(grad + at, mask=inside, other=0.0).to(COMPUTE)
    g = tl.load(gate + at, mask=inside, other=0.0).to(COMPUTE)
    u = tl.load(up + at, mask=inside, other=0.0).to(COMPUTE)
    s, s_low, rest, rest_low = sigmoid(g, C, C_LOW, EXACT, COMPUTE)
    silu = g * s
    if not EXACT:
        tl.store(dup + at, (silu * dy).to(dup.dtype.element_ty), mask=inside)
        tl.store(dgate + at, (dy * u * s * (1.0 + g * rest)).to(dgate.dtype.element_ty), mask=inside)
        return
    low = tl.fma(g, s, -silu) + g * s_low
    low = tl.where(low == low, low, 0.0)  # an infinite gate
    tl.store(dup + at, tl.fma(silu, dy, low * dy).to(dup.dtype.element_ty), mask=inside)
    term = g * rest
    bend = 1.0 + term
    part = bend - 1.0  # with this, the sum's rounding error is exact
    bend_low = (1.0 - (bend - part)) + (term - part) + tl.fma(g, rest, -term) + g * rest_low
    slope = s * bend
    slope_low = tl.fma(s, bend, -slope) + s * bend_low + s_low * bend
    w = dy * u
    w_low = tl.fma(dy, u, -w)
    tl.store(dgate + at, tl.fma(w, slope, w_low * slope + w * slope_low).to(dgate.dtype.element_ty), mask=inside)
