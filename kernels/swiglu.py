"""SwiGLU (Shazeer 2020, arXiv:2002.05202): silu(gate) * up, one launch forward, one backward that recomputes."""

import torch

from .jit import cdiv, jit, tl, use_triton

BLOCK = 1024  # elements per program: 8 per thread of 4 warps, one 128-bit access


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
            swiglu_kernel[(cdiv(out.numel(), BLOCK),)](
                gate, up, out, out.numel(), BLOCK=BLOCK, COMPUTE=_compute(gate), num_warps=4
            )
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad = grad.contiguous()
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        if grad.numel():
            swiglu_backward_kernel[(cdiv(grad.numel(), BLOCK),)](
                grad, gate, up, dgate, dup, grad.numel(), BLOCK=BLOCK, COMPUTE=_compute(gate), num_warps=4
            )
        return dgate, dup


def _compute(tensor: torch.Tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


@jit
def swiglu_kernel(gate, up, out, count, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(COMPUTE)
    u = tl.load(up + at, mask=inside, other=0.0).to(COMPUTE)
    tl.store(out + at, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)


@jit
def swiglu_backward_kernel(grad, gate, up, dgate, dup, count, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    dy = tl.load(grad + at, mask=inside, other=0.0).to(COMPUTE)
    g = tl.load(gate + at, mask=inside, other=0.0).to(COMPUTE)
    u = tl.load(up + at, mask=inside, other=0.0).to(COMPUTE)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    silu = g * sigmoid
    tl.store(dup + at, (dy * silu).to(dup.dtype.element_ty), mask=inside)
    slope = sigmoid + silu * (1.0 - sigmoid)
    tl.store(dgate + at, (dy * u * slope).to(dgate.dtype.element_ty), mask=inside)
