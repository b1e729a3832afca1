"""What a backward pass finds in memory and what it computes again, block by block.

`full` keeps the input of a block and computes the block again. `selective` keeps the matrix products too (attention is
two of them) and computes again what is cheap: norms, activations, rotations, casts (Korthikanti et al. 2022, by kind of
operation as in torchtitan). Compiled blocks do `selective` by themselves: the compiler keeps products and recomputes
what is cheap.
"""

from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel

aten = torch.ops.aten
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._grouped_mm.default,
    aten._scaled_mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
}


def recompute(model: nn.Module, how: Literal["none", "selective", "full"], compiled: bool) -> None:
    """Set up activation checkpointing on every block of a model, in place."""
    if how == "none" or (how == "selective" and compiled):
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = _first_and_again
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _first_and_again() -> tuple["_Products", "_Products"]:
    """What is around a block's first pass, and around the one that computes it again."""
    first, again = create_selective_checkpoint_contexts(list(KEPT))
    return _Products(first), _Products(again)


class _Products(TorchDispatchMode):
    """torch's selective checkpointing, which sees `KEPT` only.

    It finds what it keeps by counting calls of each operation, and the second pass may make no call more than the
    first. An engine's hooks do: ZeRO-3 gathers weights in a block where they are not there, and they were there the
    first time if a pass between (DPO's reference, whose layers are others) let go of them.
    """

    def __init__(self, of_torch: Any) -> None:
        super().__init__()
        self.of_torch = of_torch

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in KEPT:
            return func(*args, **(kwargs or {}))
        return self.of_torch.__torch_dispatch__(func, types, args, kwargs)
