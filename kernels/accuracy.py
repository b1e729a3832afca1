"""Error against fp64 beside that of PyTorch's eager code in the same dtype: how it is measured, and the bars.

Both sides compute as a card does. The kernel runs in the faithful interpreter, and eager code runs with its matrix
products in the same arithmetic (`CardProducts`): what a BLAS for CPUs does, and how it orders its sums on this or that
processor, says nothing about the two on a GPU.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .arithmetic import multiply, multiply_short

RMS_BAR, MAX_BAR = 1.0, 2.0
FEW = 100  # elements, below which a ratio of errors is a draw of lots
SLICE, GEMV = 32, 8  # terms of the longest chain
ROWS_AT_ONCE = 64  # of a product: its accumulators stay in the cache


@dataclass(frozen=True)
class Ratio:
    """Error of one output or gradient over eager's: root mean square, and largest."""

    name: str
    rms: float
    largest: float

    @property
    def holds(self) -> bool:
        return self.rms <= RMS_BAR and self.largest <= MAX_BAR  # NaN does not hold


class CardProducts(TorchDispatchMode):
    """Inside it, products of fp32, fp16 and bf16 matrices on the CPU add up as in `arithmetic.multiply`.

    With `careful` those of fp32 add up as well as a library for a card may do: in chains no longer than SLICE, as where
    the warps of a block share a product's depth, or GEMV where a factor is a vector and lanes share it, added in pairs;
    and other sums are rounded once.
    """

    KINDS = (torch.float32, torch.float16, torch.bfloat16)

    def __init__(self, careful: bool = False):
        super().__init__()
        self.careful = careful

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        on_cpu = args and isinstance(args[0], torch.Tensor) and not args[0].is_cuda
        if self.careful and on_cpu and args[0].dtype == torch.float32:
            if name in ("aten.mm.default", "aten.bmm.default"):
                return _careful_product(*args)
            if name in CAREFUL_SUMS:
                return CAREFUL_SUMS[name](*args, **(kwargs or {}))
        if on_cpu and args[0].dtype in self.KINDS:
            if name in ("aten.mm.default", "aten.bmm.default"):
                return _product(*args)
            if name == "aten.addmm.default":
                return _product(*args[1:], bias=args[0])
            assert not name.startswith(("aten.addmm", "aten.baddbmm", "aten.mv.", "aten.dot.")), f"{name}: not modelled"
        return func(*args, **(kwargs or {}))


def _careful_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(M,K) x (K,N), or a batch of them, in fp32."""
    left, right = (x.detach().numpy() for x in (a, b))
    chain = GEMV if 1 in (a.shape[-2], b.shape[-1]) else SLICE
    return torch.from_numpy(multiply_short(left, right, chain))


def _careful_softmax(x: torch.Tensor, dim: int, half: bool) -> torch.Tensor:
    power = torch.exp(x - x.amax(dim, keepdim=True))
    return power / power.double().sum(dim, keepdim=True).float()


def _careful_slope(grad: torch.Tensor, y: torch.Tensor, dim: int, kind: torch.dtype) -> torch.Tensor:
    """The softmax's backward pass."""
    part = grad * y
    return part - y * part.double().sum(dim, keepdim=True).float()


CAREFUL_SUMS: dict[str, Callable[..., torch.Tensor]] = {
    "aten._softmax.default": _careful_softmax,
    "aten._softmax_backward_data.default": _careful_slope,
    "aten.mean.dim": lambda x, *rest, **options: x.double().mean(*rest, **options).float(),
    "aten.sum.dim_IntList": lambda x, *rest, **options: x.double().sum(*rest, **options).float(),
}


def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(M,K) x (K,N), or a batch of them, in fp32; then rounded to the operands' dtype."""
    half = a.dtype != torch.float32
    left, right = ((x if x.ndim == 3 else x[None]).detach().float().numpy() for x in (a, b))
    out = np.zeros((left.shape[0], left.shape[1], right.shape[2]), np.float32)
    for batch in range(out.shape[0]):
        for row in range(0, out.shape[1], ROWS_AT_ONCE):
            rows = slice(row, row + ROWS_AT_ONCE)
            out[batch, rows] = multiply(left[batch, rows], right[batch], out[batch, rows], half)
    total = torch.from_numpy(out).view(*a.shape[:-1], b.shape[-1])
    return (total if bias is None else total + bias.float()).to(a.dtype)


def run_all_ways(
    mine: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    extras: Sequence[Any] = (),
    backward: bool = True,
    careful: bool | None = None,
) -> list[list[torch.Tensor]]:
    """Outputs and input gradients of `mine`, and of `reference` in the inputs' dtype and in fp64.

    `careful` as in `CardProducts`; None is True where the first input is fp32.
    """
    results, careful = [], inputs[0].dtype == torch.float32 if careful is None else careful
    generator = torch.Generator().manual_seed(7)
    seeds: list[torch.Tensor] = []
    for function, wide in ((mine, False), (reference, False), (reference, True)):
        leaves = [x.detach().to(torch.float64 if wide else x.dtype).requires_grad_() for x in inputs]
        with CardProducts(careful):
            outs = function(*leaves, *extras)
            outs = outs if isinstance(outs, tuple) else (outs,)
            seeds = seeds or [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outs]
            grads = [s.to(o.dtype) for s, o in zip(seeds, outs, strict=True)]
            results.append([o.detach() for o in outs])
            if backward:
                results[-1] += torch.autograd.grad(outs, leaves, grads)
    return results


def error_ratios(
    name: str,
    mine: Sequence[torch.Tensor],
    eager: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    cancels: bool = False,
) -> Iterator[Ratio]:
    """Compares lists of tensors; `exact` is fp64. Appends the ratios to $SHIPYARD_KERNEL_RATIOS where that is set.

    With `cancels` the exact gradients are nearly zero: errors below an eighth of eps of the largest tensor are equal.
    """
    scale = max(z.abs().max().item() for z in exact) * cancels
    for index, (x, y, z) in enumerate(zip(mine, eager, exact, strict=True)):
        assert x.dtype == y.dtype, name
        error, theirs = (x.double() - z).flatten(), (y.double() - z).flatten()
        eps = torch.finfo(x.dtype).eps
        floor = eps * max(z.abs().max().item() * 2**-6, scale / 8) + 1e-300  # exact results have no error to beat
        if z.numel() < FEW:  # a handful of numbers, all within an ulp of the largest: whose is nearer is luck
            floor = max(floor, eps * z.abs().max().item())
        rms = error.pow(2).mean().sqrt().item() / max(theirs.pow(2).mean().sqrt().item(), floor)
        ratio = Ratio(f"{name}[{index}]", rms, error.abs().max().item() / max(theirs.abs().max().item(), floor))
        if path := os.environ.get("SHIPYARD_KERNEL_RATIOS"):
            with open(path, "a") as file:
                file.write(json.dumps({"name": ratio.name, "rms": ratio.rms, "max": ratio.largest}) + "\n")
        yield ratio


def hold_bars(
    name: str,
    mine: Sequence[torch.Tensor],
    eager: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    cancels: bool = False,
) -> None:
    """Raises AssertionError for the first of `error_ratios` that does not hold."""
    for ratio in error_ratios(name, mine, eager, exact, cancels):
        assert ratio.holds, f"{ratio.name}: RMS error {ratio.rms:.4f}, largest {ratio.largest:.3f} of eager's"
