"""Mixture of experts: loads kept even without an auxiliary loss (Wang et al. 2024; DeepSeek-V3, section 2.1.2).

A router adds a bias to its scores where it chooses experts, and only there. After each optimizer step the bias of an
expert that got more tokens than the mean goes down by `BIAS_STEP`, of one that got fewer up. Tokens are counted over
the *global* batch, padding and inert micro-batches left out, so the biases do not depend on how the batch was cut. They
are no parameters: no gradient, no optimizer state, in every checkpoint beside the method's own state.

Shape legend: T tokens, K experts of a token, L routers, E experts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ranks import Ranks

BIAS = "e_score_correction_bias"
BIAS_STEP = 1e-3
"""DeepSeek-V3, section 4.2."""
STATE_PREFIX = "router/"
_REAL: ContextVar[Tensor | None] = ContextVar("real tokens of the micro-batch in flight", default=None)


def routers(model: nn.Module) -> list[tuple[str, Any]]:
    """Routers with a balancing bias, by name, in order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(getattr(module, BIAS, None), Tensor)]


def watch(model: nn.Module) -> None:
    """Count what the routers of a model choose, inside `counting` only. The biases start where they are."""
    for _, router in routers(model):
        router.register_forward_pre_hook(keep_wide)
        router.register_forward_hook(_count)


@contextmanager
def counting(real_BT: Tensor) -> Iterator[None]:
    """The scope of one training forward pass. What activation checkpointing computes again lies outside."""
    token = _REAL.set(real_BT)
    try:
        yield
    finally:
        _REAL.reset(token)


def balance(model: nn.Module, ranks: Ranks, learn: bool) -> dict[str, float]:
    """After a step: move the biases by the global counts and forget these. Collective if there are routers.

    `learn` is false after a step that changed no weight. Returns what is logged: the load of the busiest expert of any
    layer over the mean (1 is even).
    """
    counted = [router for _, router in routers(model) if hasattr(router, "tokens_of_experts")]
    if not counted:
        return {}
    counts_LE = torch.stack([router.tokens_of_experts for router in counted]).to(ranks.device)
    if ranks.world_size > 1:
        dist.all_reduce(counts_LE)
    means_L1 = counts_LE.double().mean(1, keepdim=True)
    steps_LE = BIAS_STEP * torch.sign(means_L1 - counts_LE)
    for router, step_E in zip(counted, steps_LE, strict=True):
        del router.tokens_of_experts
        if learn:
            bias_E = getattr(router, BIAS)
            bias_E.add_(step_E.to(bias_E))
    return {"busiest_expert": float((counts_LE / means_L1).max())}


def state(model: nn.Module) -> dict[str, Tensor]:
    """The biases, for a checkpoint."""
    return {f"{STATE_PREFIX}{name}": getattr(router, BIAS).detach() for name, router in routers(model)}


def state_of_buffers(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `state` would say of biases by the names that they have in a model."""
    return {
        STATE_PREFIX + name.removesuffix(f".{BIAS}"): bias_E.float().contiguous() for name, bias_E in buffers.items()
    }


def buffers_of_state(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same way back, of what else is stored nothing."""
    found = {key.removeprefix(STATE_PREFIX): bias_E for key, bias_E in stored.items() if key.startswith(STATE_PREFIX)}
    return {f"{name}.{BIAS}": bias_E for name, bias_E in found.items()}


def load_state(model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take up what `state` returned; return the rest of what was stored."""
    for name, router in routers(model):
        keep_wide(router)
        bias_E = getattr(router, BIAS)
        bias_E.copy_(stored[f"{STATE_PREFIX}{name}"])
    return {key: tensor for key, tensor in stored.items() if not key.startswith(STATE_PREFIX)}


def keep_wide(router: Any, inputs: Any = None) -> None:
    """Keep the bias in fp32: DeepSpeed casts it to bf16 with all the rest, where a step of 0.001 is soon lost."""
    bias_E = getattr(router, BIAS)
    if bias_E.dtype != torch.float32:
        setattr(router, BIAS, bias_E.float())


@torch.compiler.disable
def _count(router: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    real_BT = _REAL.get()
    if real_BT is None or not torch.is_grad_enabled():
        return
    chosen_TK = output[-1]
    real_TK = real_BT.reshape(-1, 1).expand_as(chosen_TK)
    none_E = torch.zeros(len(getattr(router, BIAS)), dtype=torch.int64, device=chosen_TK.device)
    counts_E = none_E.scatter_add(0, chosen_TK.reshape(-1), real_TK.reshape(-1).long())  # of shapes known beforehand
    router.tokens_of_experts = getattr(router, "tokens_of_experts", 0) + counts_E
