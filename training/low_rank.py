"""The arithmetic of a linear layer with a low-rank adapter: one pass over its output, rounded once.

    y = x W^T + b + s x A^T B^T        (Hu et al. 2021, equation 3; W and b frozen, A and B trained)

PEFT rounds x W^T to the model's dtype and adds the adapter's term to that. In bf16 a term of less than half a step of
the rounding then changes nothing: of what one step at a learning rate of 1e-4 makes of B, 23 % arrives, at 1e-5 2 %
(docs/LOG.md). Here the product's own sums, which are fp32, begin with the term.

Shape legend: T tokens, I inputs, O outputs, R rank.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..kernels.kept import Again

NF4_LAYER = "peft.tuners.lora.bnb.Linear4bit"


def is_adapted(layer: nn.Module) -> bool:
    """Whether `one_pass` can stand for a layer's forward: PEFT's linear layer, also the one over NF4."""
    return type(layer) is Linear or f"{type(layer).__module__}.{type(layer).__name__}" == NF4_LAYER


def one_pass(layer: Any, x: Tensor, *args: Any, **named: Any) -> Tensor:
    """The forward of a linear layer with one adapter, whose dtype is x's or fp32.

    Weights that are cut for good (tensor parallel) or trained, and float8, keep PEFT's code.
    """
    adapters = layer.active_adapters
    if args or named or layer.merged or layer.disable_adapters or len(adapters) != 1:
        return type(layer).forward(layer, x, *args, **named)
    base = layer.get_base_layer()
    down, up = (cast(Tensor, part[adapters[0]].weight) for part in (layer.lora_A, layer.lora_B))
    held = [each for each in (base.weight, base.bias, down, up) if each is not None]
    if not _is_usual(base, x) or any(isinstance(each, DTensor) for each in held):
        return type(layer).forward(layer, x)
    if any(hasattr(each, "ds_id") for each in held):
        return _gathered(layer, base, adapters[0], x)
    compiled = torch.compiler.is_compiling()
    watched = compiled or is_in_torch_dispatch_mode()
    again = Again.found(x) if down.dtype == x.dtype and not compiled else None
    outer, kept = (again.outer, again.of) if again else (None, ())
    y: Any = LowRank.apply(x, base.weight, base.bias, down, up, layer.scaling[adapters[0]], watched, outer, *kept)
    return y


def _is_usual(base: Any, x: Tensor) -> bool:
    """Whether a layer under an adapter is frozen and multiplies in x's dtype."""
    dtype = base.compute_dtype if hasattr(base.weight, "quant_state") else base.weight.dtype
    plain = type(base) is nn.Linear or hasattr(base.weight, "quant_state")
    trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    return (
        plain and "forward" not in vars(base) and dtype == x.dtype and not trained
        and not torch.is_autocast_enabled(x.device.type)
    )  # fmt: skip


def _gathered(layer: Any, base: nn.Linear, name: str, x: Tensor) -> Tensor:
    """The same under ZeRO-3, which gathers the weights of a module when that is called: so each is, and the frozen one
    for this call adds to the term."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    term = up(down(x.to(down.weight.dtype))) * layer.scaling[name]
    base.forward = MethodType(_onto, base)
    try:
        return base(x, term.to(x.dtype))
    finally:
        del base.forward


def _onto(base: nn.Linear, x: Tensor, term: Tensor) -> Tensor:
    y: Any = Onto.apply(term, x, base.weight)
    return y if base.bias is None else y + base.bias


def dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A frozen weight as its layer multiplies with it, (O, I): NF4 dequantized."""
    if (state := getattr(weight, "quant_state", None)) is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state).to(dtype)


class LowRank(torch.autograd.Function):
    """x (..., I), W (O, I), b (O,) or None, A (R, I), B (O, R) -> (..., O), in x's dtype.

    Keeps x, or where `outer` is given the tensors from which that has A's gradient (`kernels.kept.Again`). `watched`:
    torch looks at single operations (compilation, selective checkpointing) and allows no sum in place.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_RI: Tensor, up_OR: Tensor, scaling: float,
        watched: bool, outer: Callable[..., Tensor] | None, *kept: Tensor,
    ) -> Tensor:  # fmt: skip
        x_TI = x.reshape(-1, x.shape[-1])
        low_TR = (x_TI.to(down_RI.dtype) @ down_RI.T) * scaling
        term_TO, weight_IO = (low_TR @ up_OR.T).to(x.dtype), dense(weight_OI, x.dtype).T
        y_TO = torch.addmm(term_TO, x_TI, weight_IO) if watched else term_TO.addmm_(x_TI, weight_IO)
        if bias_O is not None:  # not into the term, which would be lost in its rounding
            y_TO = y_TO + bias_O
        ctx.save_for_backward(low_TR, weight_OI, down_RI, up_OR, *(kept if outer else (x_TI,)))
        ctx.scaling, ctx.shape, ctx.outer = scaling, x.shape, outer or _outer
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    @staticmethod
    def backward(ctx, dy: Tensor):
        low_TR, weight_OI, down_RI, up_OR, *kept = ctx.saved_tensors
        dy_TO = dy.reshape(-1, dy.shape[-1])
        wide_TO = dy_TO.to(up_OR.dtype)
        dlow_TR = (wide_TO @ up_OR) * ctx.scaling
        dup_OR = wide_TO.T @ low_TR
        dx = None
        if ctx.needs_input_grad[0]:
            term_TI = (dlow_TR @ down_RI).to(dy.dtype)
            dx = torch.addmm(term_TI, dy_TO, dense(weight_OI, dy.dtype)).view(ctx.shape)
        return dx, None, None, ctx.outer(dlow_TR, *kept), dup_OR, None, None, None, *(None for _ in kept)


class Onto(torch.autograd.Function):
    """term (..., O), x (..., I), W (O, I), frozen -> term + x W^T. Keeps W alone, as the parameter that it is: in
    between ZeRO-3 puts other memory behind it."""

    @staticmethod
    def forward(ctx, term: Tensor, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OI)
        y_TO = torch.addmm(term.reshape(-1, term.shape[-1]), x.reshape(-1, x.shape[-1]), weight_OI.T)
        return y_TO.view(term.shape)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (weight_OI,) = ctx.saved_tensors
        return dy, dy @ weight_OI if ctx.needs_input_grad[1] else None, None


def _outer(left_TR: Tensor, x_TI: Tensor) -> Tensor:
    return left_TR.T @ x_TI.to(left_TR.dtype)
