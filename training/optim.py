"""The optimizer and the learning rate, the latter a pure function of the step."""

import math
from typing import Any

import torch
from torch import nn

from .init import kinds, lr_factor, width_ratio
from .muon import Muon
from .recipe import Optim, Recipe


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then what the schedule says.

    constant; linear and cosine decay to `final_lr_fraction`; wsd (Hu et al. 2024, MiniCPM): constant until the last
    `decay_fraction` of the run, in which it decays linearly.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    first = optim.warmup_steps
    if optim.schedule == "wsd":
        first = max(first, steps - round(optim.decay_fraction * steps))
    progress = max(0, step - first) / max(1, steps - first)
    floor = optim.final_lr_fraction
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule in ("linear", "wsd"):
        return optim.lr * (floor + (1 - floor) * (1 - progress))
    return optim.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate: `lr`, times the factor that muP gives its weights."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def moment_names(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[str, ...]:
    """The parts that the optimizer keeps of a parameter, besides its value."""
    for group in optimizer.param_groups:
        if group.get("muon") and any(parameter is member for member in group["params"]):
            return ("momentum_buffer",)
    return ("exp_avg", "exp_avg_sq")


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.AdamW:
    """The recipe's optimizer over trainable parameters; matrices decay, vectors (norms, biases) do not.

    AdamW (Loshchilov and Hutter 2019), or Muon for hidden matrices and AdamW for the rest; learning rates of their own
    under muP. Raises ValueError when nothing would train.
    """
    optim, ratio = recipe.optim, width_ratio(model, recipe.model)
    groups: dict[tuple[bool, float, bool], dict[str, Any]] = {}
    for (_, kind), parameter in zip(kinds(model).items(), model.parameters(), strict=True):
        if not parameter.requires_grad:
            continue
        muon = optim.name == "muon" and kind == "hidden"
        factor, decays = lr_factor(kind, ratio, muon), kind != "vector"
        group = {"params": [], "weight_decay": optim.weight_decay / factor if decays else 0.0}
        group |= {"lr_factor": factor, "lr": optim.lr * factor} | ({"muon": True} if muon else {})
        groups.setdefault((not decays, factor, muon), group)["params"].append(parameter)
    if not groups:
        raise ValueError("lora.rank: the model has no trainable weight; set lora.rank above 0 or model.quantize: none")
    ordered = [groups[key] for key in sorted(groups)]
    adamw: dict[str, Any] = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if optim.name == "muon":
        return Muon(ordered, getattr(torch, recipe.model.dtype), **adamw)
    return torch.optim.AdamW(ordered, **adamw)
