"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) with an optional residual addition, forward and backward.

Shape suffixes: T rows (any leading shape is flattened), D width, P partial sums.
"""

import torch

from .jit import cdiv, compute_type, is_exact, jit, next_power_of_2, tl, use_triton, wide_type

ROWS_PER_PARTIAL = 16  # rows whose weight gradient one program adds up, in order: no atomics; several programs an SM


def rms_norm_reference(x, weight_D, eps: float, residual=None):
    """The plain PyTorch twin of `rms_norm`; rounds where Llama's module in transformers does."""
    x = x if residual is None else x + residual
    x_wide = x.to(wide_type(x.dtype))
    normed = x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    y = weight_D * normed.to(x.dtype)
    return y if residual is None else (y, x)


def rms_norm(x, weight_D, eps: float, residual=None):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, (..., D) -> (..., D).

    With `residual` (same shape) it norms s = x + residual and returns (y, s), s being the next residual.
    """
    if weight_D.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight {tuple(weight_D.shape)} must be ({x.shape[-1]},), the width of x")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"rms_norm: residual {tuple(residual.shape)} must have the shape of x {tuple(x.shape)}")
    if not use_triton(x):
        return rms_norm_reference(x, weight_D, eps, residual)
    y, s = _RmsNorm.apply(x, weight_D, eps, residual)
    return y if residual is None else (y, s)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, eps, residual):
        shape, width = x.shape, x.shape[-1]
        x_TD = x.reshape(-1, width).contiguous()
        residual_TD = x_TD if residual is None else residual.reshape(-1, width).contiguous()
        rows = x_TD.shape[0]
        y_TD = torch.empty_like(x_TD)
        s_TD = x_TD if residual is None else torch.empty_like(x_TD)
        rstd_T = torch.empty(rows, dtype=_sum_type(x.dtype), device=x.device)
        if rows:
            rms_norm_kernel[(rows,)](
                x_TD, residual_TD, weight_D, y_TD, s_TD, rstd_T, eps, WIDTH=width, BLOCK=next_power_of_2(width),
                RESIDUAL=residual is not None, EXACT=is_exact(x.dtype),
                COMPUTE=compute_type(x.dtype), num_warps=norm_warps(width),
            )  # fmt: skip
        ctx.save_for_backward(s_TD, weight_D, rstd_T)
        ctx.has_residual = residual is not None
        s = s_TD.view(shape)
        if residual is None:
            ctx.mark_non_differentiable(s := s.new_empty(0))
        return y_TD.view(shape), s

    @staticmethod
    def backward(ctx, dy, ds):
        s_TD, weight_D, rstd_T = ctx.saved_tensors
        rows, width = s_TD.shape
        dy_TD = dy.reshape(-1, width).contiguous()
        ds_TD = ds.reshape(-1, width).contiguous() if ctx.has_residual else dy_TD
        dx_TD = torch.empty_like(s_TD)
        partials = cdiv(rows, ROWS_PER_PARTIAL)
        dw_PD = torch.empty(partials, width, dtype=_sum_type(dy.dtype), device=dy.device)
        if rows:
            rms_norm_backward_kernel[(partials,)](
                dy_TD, ds_TD, s_TD, weight_D, rstd_T, dx_TD, dw_PD, rows, WIDTH=width, BLOCK=next_power_of_2(width),
                ROWS=ROWS_PER_PARTIAL, RESIDUAL=ctx.has_residual, EXACT=is_exact(dy.dtype),
                COMPUTE=compute_type(dy.dtype), num_warps=norm_warps(width),
            )  # fmt: skip
        dx = dx_TD.view(dy.shape)
        return dx, dw_PD.sum(0).to(weight_D.dtype), None, dx if ctx.has_residual else None


def _sum_type(dtype: torch.dtype) -> torch.dtype:
    """Of what one kernel leaves to another: a row's scale, and the sums that make the weight's gradient."""
    return torch.float64 if is_exact(dtype) else torch.float32


def norm_warps(width: int) -> int:
    """16 elements a thread: a row of 8192 takes 16 warps."""
    return min(16, max(1, next_power_of_2(width) // 512))


@jit
def rms_norm_kernel(
    x, residual, weight, y, s_out, rstd, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, EXACT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < WIDTH
    kind = y.dtype.element_ty
    s = tl.load(x + row * WIDTH + d, mask=inside, other=0.0).to(COMPUTE)
    if RESIDUAL:
        s = s + tl.load(residual + row * WIDTH + d, mask=inside, other=0.0).to(COMPUTE)
        tl.store(s_out + row * WIDTH + d, s.to(kind), mask=inside)
        s = s.to(kind).to(COMPUTE)  # norm what the next layer will read
    w = tl.load(weight + d, mask=inside, other=0.0).to(COMPUTE)
    if not EXACT:  # the result is rounded to half a word
        r = 1.0 / tl.sqrt(tl.sum(s * s, 0) / WIDTH + eps)
        tl.store(rstd + row, r)
        tl.store(y + row * WIDTH + d, (s * r * w).to(kind), mask=inside)
        return
    nothing = tl.zeros([BLOCK], COMPUTE)
    mean = nothing + (tl.sum(s * s, 0) / WIDTH + eps)
    r = 1.0 / tl.sqrt(mean)
    part = mean * r
    # one step of Newton's method gives what the root and the division lost; the result is rounded once
    r_low = 0.5 * r * (tl.fma(-part, r, nothing + 1.0) - tl.fma(mean, r, -part) * r)
    tl.store(rstd + row, tl.max(r.to(tl.float64) + r_low, 0))
    x_hat = s * r
    low = tl.fma(s, r, -x_hat) + s * r_low
    tl.store(y + row * WIDTH + d, tl.fma(x_hat, w, low * w).to(kind), mask=inside)


@jit
def rms_norm_backward_kernel(
    dy, ds, s_in, weight, rstd, dx, dw, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, RESIDUAL: tl.constexpr, EXACT: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (w dy - x_hat * mean(w dy x_hat)) (+ ds); each program also adds up dw over its ROWS rows."""
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < WIDTH
    w = tl.load(weight + d, mask=inside, other=0.0).to(COMPUTE)
    total = tl.zeros([BLOCK], dtype=COMPUTE)
    lost = tl.zeros([BLOCK], dtype=COMPUTE)  # Kahan: what rounding took from `total`
    for row in range(program * ROWS, tl.minimum((program + 1) * ROWS, rows)):
        at = row * WIDTH + d
        scale = tl.load(rstd + row)
        r = tl.zeros([BLOCK], COMPUTE) + scale.to(COMPUTE)
        x_hat = tl.load(s_in + at, mask=inside, other=0.0).to(COMPUTE) * r
        grad = tl.load(dy + at, mask=inside, other=0.0).to(COMPUTE)
        if EXACT:  # with what rounding took from x_hat; the product itself is not rounded
            s = tl.load(s_in + at, mask=inside, other=0.0)
            low_hat = tl.fma(s, r, -x_hat) + s * (scale - scale.to(COMPUTE)).to(COMPUTE)
            term = tl.fma(grad, x_hat, tl.fma(grad, low_hat, -lost))
        else:
            term = grad * x_hat - lost
        grown = total + term
        lost = (grown - total) - term
        total = grown
        wdy = w * grad
        shrink = x_hat * (tl.sum(wdy * x_hat, 0) / WIDTH)
        rest = wdy - shrink
        out = tl.zeros([BLOCK], COMPUTE)
        if EXACT:
            back = rest - wdy
            low = (wdy - (rest - back)) - (shrink + back) + tl.fma(w, grad, -wdy)  # what the two lines above lost
            out = low * r
        if RESIDUAL:
            out += tl.load(ds + at, mask=inside, other=0.0).to(COMPUTE)
        out = tl.fma(rest, r, out)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
    if EXACT:
        total = total.to(tl.float64) - lost
    tl.store(dw + program * WIDTH + d, total, mask=inside)
