"""DeepSpeed ZeRO-1, 2 and 3 behind the engine interface."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batches import accumulation
from .engine import Engine
from .ranks import Ranks
from .recipe import Recipe


class ZeroEngine(Engine):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020): optimizer state, gradients, weights partitioned over ranks."""

    def __init__(self, ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        import deepspeed

        self.ranks, self.stage = ranks, int(recipe.parallel.engine[-1])
        self.rounds = accumulation(recipe.batch.size, recipe.batch.micro, ranks.world_size)
        config = deepspeed_config(recipe, self.rounds)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)  # pyright: ignore
        self.deepspeed: Any = engine
        self.model: nn.Module = engine
        self.module = model

    def backward(self, loss: Tensor, last: bool) -> None:
        self.deepspeed.set_gradient_accumulation_boundary(is_boundary=last)
        self.deepspeed.backward(loss * self.ranks.world_size * self.rounds)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        yield

    def step(self, lr: float) -> float:
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            yield

    def read(self) -> Iterable[tuple[str, dict[str, Tensor]]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link_state()
        for name, parameter in self.named_trainable():
            value = safe_get_full_fp32_param(parameter)
            first = safe_get_full_optimizer_state(parameter, "exp_avg")
            second = safe_get_full_optimizer_state(parameter, "exp_avg_sq")
            assert value is not None, f"DeepSpeed holds no fp32 copy of {name}"
            zeros = torch.zeros_like(value, device="cpu")
            yield (
                name,
                {
                    "value": value.detach().float().cpu().clone(),
                    "exp_avg": zeros if first is None else first.detach().float().cpu().clone(),
                    "exp_avg_sq": zeros if second is None else second.detach().float().cpu().clone(),
                },
            )

    def write(self, tensors: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._create_state()
        self._link_state()
        for name, parameter in self.named_trainable():
            stored = tensors[name]
            safe_set_full_fp32_param(parameter, stored["value"].to(self.ranks.device))
            for moment in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(parameter, stored[moment].to(self.ranks.device), moment)
        for state in self._inner().state.values():
            state["step"].fill_(float(step))

    def _inner(self) -> torch.optim.Optimizer:
        return self.deepspeed.optimizer.optimizer

    def _link_state(self) -> None:
        """DeepSpeed 0.19 ties parameters to their moments after the first group's first step, when those of later
        groups do not exist yet, and never again; without this, reading a norm's moments fails under ZeRO-1 and 2."""
        if self.stage < 3:
            self.deepspeed.optimizer._hp_optimizer_states_linked = False
            self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def _create_state(self) -> None:
        """AdamW makes its moments in its first step; a run that resumes needs them before."""
        inner = self._inner()
        for group in inner.param_groups:
            for flat in group["params"]:
                if not inner.state.get(flat):
                    inner.state[flat] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(flat),
                        "exp_avg_sq": torch.zeros_like(flat),
                    }


def deepspeed_config(recipe: Recipe, rounds: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a recipe: `rounds` micro-batches a step, the optimizer ours."""
    stage = int(recipe.parallel.engine[-1])
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": torch.cuda.is_available()}
    if recipe.parallel.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": recipe.batch.micro,
        "gradient_accumulation_steps": rounds,
        "gradient_clipping": recipe.optim.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": recipe.model.dtype == "bfloat16"},
        "steps_per_print": 1 << 30,
    }
