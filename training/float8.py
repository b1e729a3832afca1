"""Linear layers that multiply in float8, with a scale for each row (Micikevicius et al. 2022; torchao's recipe
`rowwise_with_gw_hp`).

Output and input gradient are float8 products; the weight's gradient stays a bf16 one. A token's scale depends on that
token alone, so its result does not depend on which tokens share its micro-batch. Row scales are what cuBLAS and
CUTLASS compute on Hopper and newer; elsewhere a run is refused. (torch multiplies so on CPUs too, slowly: tests do.)

Shape legend: T tokens, K inputs, N outputs.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn
MULTIPLE = 16
"""Both sizes of a matrix must divide by it."""


def use_float8(layers: list[nn.Module]) -> int:
    """Let the linear layers inside `layers` multiply in float8, in place; return how many do. Parameters stay."""
    count = 0
    for module in (inner for layer in layers for inner in layer.modules()):
        if type(module) is nn.Linear and module.in_features % MULTIPLE == module.out_features % MULTIPLE == 0:
            module.forward = MethodType(_forward, module)
            count += 1
    return count


def require_hopper(device: torch.device) -> None:
    """Raises ValueError where no float8 with row scales is to be had."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < (9, 0):
        here = f"compute capability {capability[0]}.{capability[1]}" if capability else "no CUDA device"
        raise ValueError(f"model.float8: needs an H100 or newer (compute capability 9.0), this is {here}; set it false")


def _forward(module: Any, x: Tensor) -> Tensor:
    flat_TK = x.reshape(-1, x.shape[-1])
    out_TN: Any = Float8Product.apply(flat_TK.to(torch.bfloat16), module.weight)
    out = out_TN.view(*x.shape[:-1], module.out_features)
    return out if module.bias is None else out + module.bias.to(out.dtype)


class Float8Product(torch.autograd.Function):
    """(T, K) bf16, (N, K) -> (T, N) bf16: x W^T."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        return product(x_TK, weight_NK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x_TK, weight_NK = ctx.saved_tensors
        gradient_TN = gradients[0].to(torch.bfloat16)
        return product(gradient_TN, weight_NK.t()), (gradient_TN.t() @ x_TK).to(weight_NK.dtype)


def product(a_TK: Tensor, b_NK: Tensor) -> Tensor:
    """a b^T, shape (T, N), bf16: both rounded to float8 row by row."""
    a8_TK, a_T1 = _rounded(a_TK)
    b8_NK, b_N1 = _rounded(b_NK)
    return torch._scaled_mm(a8_TK, b8_NK.t(), a_T1, b_N1.t(), out_dtype=torch.bfloat16)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Float8 rows, contiguous, and the scale (rows, 1) that gives them back."""
    wide = rows.float()
    scale = wide.abs().amax(1, keepdim=True).clamp(min=1e-12) / torch.finfo(FLOAT8).max
    return (wide / scale).to(FLOAT8).contiguous(), scale
