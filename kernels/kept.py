"""The PyTorch path's layers with gradients by hand, which keep less for the backward pass than autograd does.

Autograd keeps the input of every operation: of a gated MLP the gate, silu(gate), up, and their product, once more as
the input of the last linear layer. All come from two of them at the cost of a pass over memory. Here a layer keeps what
no cheap pass can make again, and tells the linear layer after it how to do without its input (`Again`).

Shape legend: T tokens, D width, F width between, R columns of a linear layer's small side, N targets, C of them,
V vocabulary, H heads.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 1 << 16
"""Elements of a tensor at a time where several passes follow each other: they find each other's in a core's cache."""
LOGITS = 1 << 23
"""Logits at a time of a frozen head: 32 MiB. Fewer, and reading the head anew for each chunk takes longer."""
NOTE = "shipyard_again"


@dataclass(frozen=True)
class Again:
    """How a linear layer does without its input x (T, D): `of` are tensors that are kept anyway, and
    `outer(left_TR, *of)` is left^T x, (R, D), all that the gradient of its weight wants of x."""

    of: tuple[Tensor, ...]
    outer: Callable[..., Tensor]
    shape: tuple[int, int]
    version: int

    @staticmethod
    def note(x: Tensor, of: Sequence[Tensor], outer: Callable[..., Tensor], width: int) -> None:
        """Leave word on x, whose rows are `width` long, for the layer that reads it."""
        if torch.is_grad_enabled():
            kept = tuple(tensor.detach() for tensor in of)
            setattr(x, NOTE, Again(kept, outer, (x.numel() // max(1, width), width), x._version))

    @staticmethod
    def found(x: Tensor) -> "Again | None":
        """The word left on x or on what x is a view of; None if there is none, or x was written to since."""
        again = getattr(x, NOTE, None)
        if again is None and x._base is not None and x._base.numel() == x.numel() and x.is_contiguous():
            again = getattr(x._base, NOTE, None)
        rows = x.numel() // max(1, x.shape[-1])
        return again if again and again.version == x._version and again.shape == (rows, x.shape[-1]) else None


def norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Llama's RMSNorm, bit by bit as transformers computes it: (..., D) -> (..., D). Keeps x and a number a row."""
    y, rstd = _Norm.apply(x, weight_D, eps)  # pyright: ignore[reportGeneralTypeIssues]
    if x.dtype == torch.float32 and not hasattr(weight_D, "ds_id"):  # ZeRO-3 scatters the weight behind its layer
        Again.note(y, (x, rstd, weight_D), _outer_of_norm, x.shape[-1])
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = x.float()
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, rstd, weight_D)
        ctx.mark_non_differentiable(rstd)
        return (wide * rstd).to(x.dtype).mul_(weight_D), rstd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor, _: Any):
        """dx = rstd (w dy - n mean(w dy n)) and dw = sum(dy n), n = rstd x."""
        x, rstd, weight_D = ctx.saved_tensors
        wide, dweight_D = x.float(), None
        if ctx.needs_input_grad[1]:
            dweight_D = (dy * (wide * rstd)).reshape(-1, x.shape[-1]).sum(0).to(weight_D.dtype)
        dn = dy.float() * weight_D.float()
        slope = (dn * wide).sum(-1, keepdim=True) * rstd.pow(3) / -x.shape[-1]
        return dn.mul_(rstd).addcmul_(wide, slope).to(x.dtype), dweight_D, None


def _outer_of_norm(left_TR: Tensor, x: Tensor, rstd: Tensor, weight_D: Tensor) -> Tensor:
    return ((left_TR * rstd.reshape(-1, 1)).T @ x.reshape(-1, x.shape[-1])).mul_(weight_D)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, as PyTorch computes it. Keeps gate and up."""
    gate, up = gate.contiguous(), up.contiguous()
    y: Any = _SwiGlu.apply(gate, up)
    Again.note(y, (gate, up), _outer_of_swiglu, gate.shape[-1])
    return y


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        for dy_CF, gate_CF, up_CF, dgate_CF, dup_CF in _pieces(dy.contiguous(), gate, up, dgate, dup):
            torch.mul(F.silu(gate_CF), dy_CF, out=dup_CF)
            torch.ops.aten.silu_backward.grad_input(dy_CF * up_CF, gate_CF, grad_input=dgate_CF)
        return dgate, dup


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    for y_CF, gate_CF, up_CF in _pieces(y, gate, up):
        torch.mul(F.silu(gate_CF), up_CF, out=y_CF)
    return y


def _outer_of_swiglu(left_TR: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return left_TR.T @ _swiglu(gate, up).view(left_TR.shape[0], -1)


def join(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Outputs of attention, (1, t, H, E) for each document of each row, as (B, T, H, E). Autograd keeps the parts for
    their own sake, so a linear layer after this need not keep the whole."""
    each = [torch.cat(list(pieces), 1).contiguous() for pieces in rows]
    y = torch.cat(each) if len(each) > 1 else each[0]
    pieces = [piece for row in rows for piece in row]
    if all(len(piece) == 1 for piece in pieces):
        Again.note(y, pieces, _outer_of_joined, y.shape[2] * y.shape[3])
    return y


def _outer_of_joined(left_TR: Tensor, *pieces: Tensor) -> Tensor:
    parts = left_TR.split([piece.shape[1] for piece in pieces])
    total_RD = parts[0].T @ pieces[0].reshape(parts[0].shape[0], -1)
    for part, piece in zip(parts[1:], pieces[1:], strict=True):
        total_RD.addmm_(part.T, piece.reshape(part.shape[0], -1))
    return total_RD


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all, (C, F) each, a few at a time; whole tensors on a GPU, which minds launches more."""
    width = tensors[0].shape[-1]
    rows = max(1, PIECE // width) if tensors[0].device.type == "cpu" else max(1, tensors[0].numel())
    return zip(*(tensor.view(-1, width).split(rows) for tensor in tensors), strict=True)


def head_terms(x_ND: Tensor, weight_VD: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """log p of each id under a frozen head and log Z of its softmax, fp32, (N,) both, without keeping logits.

    The gradient of x is two numbers a row away from the softmax's mean of the head's rows, so the forward pass makes it
    while a chunk's logits are there: no product more than a forward and a backward pass have anyway.
    """
    return _Head.apply(x_ND, weight_VD, ids_N)  # pyright: ignore[reportReturnType]


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
        logp_N, log_z_N = (x_ND.new_empty(len(ids_N), dtype=torch.float32) for _ in range(2))
        rows, pull_ND = max(1, LOGITS // len(weight_VD)), torch.empty_like(x_ND)
        for start in range(0, len(ids_N), rows):
            part = slice(start, start + rows)
            logits_CV, at_C1 = x_ND[part] @ weight_VD.T, ids_N[part, None]
            hit_C = logits_CV.gather(-1, at_C1)[:, 0].float()
            soft_CV = torch.log_softmax(logits_CV.float(), -1)
            logp_N[part] = soft_CV.gather(-1, at_C1)[:, 0]
            log_z_N[part] = hit_C - logp_N[part]
            if ctx.needs_input_grad[0]:
                soft_CV.exp_().scatter_add_(1, at_C1, soft_CV.new_full(at_C1.shape, -1.0))
                pull_ND[part] = soft_CV.to(x_ND.dtype) @ weight_VD
        ctx.save_for_backward(pull_ND, weight_VD, ids_N)
        ctx.set_materialize_grads(False)  # None says which of the two nobody asked for
        return logp_N, log_z_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp_N: Tensor | None, dlog_z_N: Tensor | None):
        """With g = (softmax - one_hot) W: d logp / dx = -g and d log Z / dx = g + W[id]."""
        pull_ND, weight_VD, ids_N = ctx.saved_tensors
        toward_N = torch.zeros_like(ids_N, dtype=torch.float32) if dlogp_N is None else -dlogp_N
        if dlog_z_N is not None:
            toward_N = toward_N + dlog_z_N
        dx_ND = pull_ND.float() * toward_N[:, None]
        if dlog_z_N is not None:
            dx_ND.addcmul_(weight_VD[ids_N].float(), dlog_z_N[:, None])
        return dx_ND.to(pull_ND.dtype), None, None
