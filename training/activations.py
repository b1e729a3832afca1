"""What a backward pass finds in memory and what it computes again, block by block.

`full` keeps the input of a block and computes the block again. `selective` keeps the matrix products too (attention is
two of them) and computes again what is cheap: norms, activations, rotations, casts (Korthikanti et al. 2022, by kind of
operation as in torchtitan). Compiled blocks do `selective` by themselves: the compiler keeps products and recomputes
what is cheap.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
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
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
