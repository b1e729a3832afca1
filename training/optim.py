"""The optimizer and the learning rate, the latter a pure function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from .recipe import Optim


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then constant, linear or cosine decay."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    floor = optim.final_lr_fraction
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "linear":
        return optim.lr * (floor + (1 - floor) * (1 - progress))
    return optim.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def build_optimizer(optim: Optim, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over trainable parameters; matrices decay, vectors (norms, biases) do not."""
    trainable = [parameter for _, parameter in named if parameter.requires_grad]
    if not trainable:
        raise ValueError("lora.rank: the model has no trainable weight; set lora.rank above 0 or model.quantize: none")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    kept = [group for group in groups if group["params"]]
    return torch.optim.AdamW(kept, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
