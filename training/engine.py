"""The interface that every parallel engine has, and its simplest form: one process, or DDP.

An engine is given losses that are already divided by the *global* denominator and returns the gradient norm of the
global batch. DDP and DeepSpeed both average over ranks, and DeepSpeed divides by the accumulation too; the engines undo
this, so every engine computes the same sum.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .ranks import Ranks
from .recipe import Recipe


class Engine:
    """One process or DDP: torch's optimizer, gradients averaged over ranks by DDP's all-reduce."""

    def __init__(self, ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        self.ranks = ranks
        self.module = model.to(ranks.device)
        self.model: nn.Module = self.module
        if ranks.world_size > 1:
            devices = [ranks.device] if ranks.device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(self.module, device_ids=devices)
        self.optimizer = optimizer
        self.max_grad_norm = recipe.optim.max_grad_norm
        self.autocast = recipe.model.dtype == "bfloat16" and recipe.lora.rank == 0
        self.trainable = [p for p in model.parameters() if p.requires_grad]

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of one micro-batch, whose loss is already divided by the global denominator."""
        (loss * self.ranks.world_size).backward()

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """The scope of one micro-batch's forward and backward: ranks talk to each other in the last one of a step."""
        with contextlib.ExitStack() as scope:
            if isinstance(self.model, nn.parallel.DistributedDataParallel) and not last:
                scope.enter_context(self.model.no_sync())
            if self.autocast:
                scope.enter_context(torch.autocast(self.ranks.device.type, torch.bfloat16))
            yield

    def step(self, lr: float) -> float:
        """Clip, update, clear; return the global norm before clipping. One that is not finite updates nothing."""
        norm = float(nn.utils.clip_grad_norm_(self.trainable, self.max_grad_norm))
        if norm == norm and norm != float("inf"):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """The scope in which `module` holds every weight whole on every rank. Collective."""
        yield

    def read(self) -> Iterable[tuple[str, dict[str, Tensor]]]:
        """Yield each trained parameter's fp32 value and Adam moments, whole, on the CPU. Collective."""
        for name, parameter in self.named_trainable():
            state = self.optimizer.state.get(parameter, {})
            yield (
                name,
                {
                    "value": parameter.detach().float().cpu(),
                    "exp_avg": state["exp_avg"].cpu() if state else torch.zeros_like(parameter, device="cpu"),
                    "exp_avg_sq": state["exp_avg_sq"].cpu() if state else torch.zeros_like(parameter, device="cpu"),
                },
            )

    def write(self, tensors: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Set every trained parameter and its Adam moments from whole tensors. Collective."""
        for name, parameter in self.named_trainable():
            stored = tensors[name]
            parameter.data.copy_(stored["value"])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": stored["exp_avg"].to(parameter),
                "exp_avg_sq": stored["exp_avg_sq"].to(parameter),
            }
