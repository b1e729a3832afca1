"""DeepSpeed ZeRO-1, 2 and 3 behind the engine interface."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .batches import accumulation
from .engine import Engine, Fragment, Read
from .fsdp2 import standing_in, without_weights
from .models import compute_dtype
from .optim import set_learning_rate
from .ranks import Ranks
from .recipe import Recipe


class ZeroEngine(Engine):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020): optimizer state, gradients, weights partitioned over ranks."""

    def __init__(self, ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        import deepspeed

        self.ranks, self.stage = ranks, int(recipe.parallel.engine[-1])
        self.rounds = accumulation(recipe.batch.size, recipe.batch.micro, ranks.world_size)
        config = deepspeed_config(recipe, self.rounds)
        self._skeleton = without_weights(model) if self.stage == 3 else model
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)  # pyright: ignore
        self.deepspeed: Any = engine
        self.model: nn.Module = engine
        self.module = model
        self.updates = 0
        for number, group in enumerate(self._inner().param_groups):
            if group.get("muon"):
                group["places"] = self._places(number)

    def _places(self, group: int) -> list[tuple[int, tuple[int, ...]]]:
        """Where each matrix of a group begins in what DeepSpeed cuts into one equal piece a rank, and its shape."""
        inner = self.deepspeed.optimizer
        first = inner.bit16_groups_flat[group].storage_offset()
        return [(p.storage_offset() - first, tuple(p.shape)) for p in inner.bit16_groups[group]]

    def backward(self, loss: Tensor, last: bool) -> None:
        self.deepspeed.set_gradient_accumulation_boundary(is_boundary=last)
        self.deepspeed.backward(loss * self.ranks.world_size * self.rounds)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        yield

    def step(self, lr: float, largest: float = math.inf) -> float:
        set_learning_rate(self.deepspeed.optimizer, lr)
        norm = self._spoil_beyond(largest) if largest < math.inf else math.nan
        self.deepspeed.step()
        taken = self.deepspeed.get_global_grad_norm()
        if taken is not None and math.isfinite(taken):
            self.updates += 1
            return float(taken)
        return norm

    def _spoil_beyond(self, largest: float) -> float:
        """Return the norm that DeepSpeed is about to clip; beyond `largest`, make it discard the step.

        DeepSpeed's own way to leave weights alone is an overflow, so a gradient is made one.
        """
        from deepspeed.runtime.utils import combine_grad_norm_groups

        inner = self.deepspeed.optimizer
        inner_norm = (
            inner.scaled_global_norm() if self.stage < 3 else combine_grad_norm_groups(inner._get_norm_groups())
        )
        norm = float(inner_norm)
        if not norm <= largest:
            for gradients in inner.averaged_gradients.values():
                for gradient in gradients:
                    gradient.fill_(math.nan)
        return norm if norm >= 0 else math.nan  # DeepSpeed's word for a norm that is not finite is -1

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """What was trained is then in fp32 on the first rank, which is more than what computes in bf16.

        Under ZeRO-3 `module` is an ordinary model there: DeepSpeed's hooks would gather weights, collectively, in
        forward passes that this rank makes alone."""
        from deepspeed.utils import safe_get_full_fp32_param

        trained: dict[str, Tensor] = {}
        for name, parameter in self.named_trainable():
            whole = safe_get_full_fp32_param(parameter)
            if self.ranks.first:
                trained[name] = cast(Tensor, whole).view(_shape(parameter))
        if self.stage < 3:
            with _instead(self.module, trained):
                yield
            return
        import deepspeed

        frozen = {name: p for name, p in self.module.named_parameters() if not p.requires_grad}
        weights = {name: nn.Parameter(whole) for name, whole in trained.items()}
        with deepspeed.zero.GatheredParameters(list(frozen.values())):
            if self.ranks.first:
                weights |= {name: nn.Parameter(p.detach().clone(), False) for name, p in frozen.items()}
        with standing_in(self, self._skeleton, weights):
            yield
        self._skeleton = without_weights(self._skeleton)

    def fragments(self) -> Iterator[Fragment]:
        """DeepSpeed's own partitions: flat fp32 ranges of parameters, which cut where its buffers end."""
        self._create_state()
        for name, parameter in self.named_trainable():
            start, tensors = self._partition(parameter)
            if tensors:
                yield Fragment(name, _shape(parameter), start, tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: _shape(parameter) for name, parameter in self.named_trainable()}

    def load(self, read: Read, updates: int) -> None:
        self.updates = updates
        self._create_state()
        for name, parameter in self.named_trainable():
            start, tensors = self._partition(parameter)
            for part, tensor in tensors.items():
                stored = read(name, part, start, len(tensor))
                self._set_part(parameter, part, tensor, torch.zeros_like(tensor) if stored is None else stored)
            self._set_weight(name, parameter, read)
        for state in self._inner().state.values():
            if "step" in state:
                state["step"] = torch.tensor(float(updates))

    def _set_part(self, parameter: nn.Parameter, part: str, held: Tensor, stored: Tensor) -> None:
        if self.stage < 3:
            held.copy_(stored)
            return
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        whole: Any = parameter
        padded = torch.zeros(whole.ds_tensor.ds_numel, dtype=torch.float32)
        padded[: len(stored)] = stored
        if part == "value":
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, part)

    def _set_weight(self, name: str, parameter: nn.Parameter, read: Read) -> None:
        """Set the copy that computes: DeepSpeed renews it from the fp32 partitions after a step only."""
        if self.stage < 3:
            value = read(name, "value", 0, parameter.numel())
            assert value is not None
            parameter.data.copy_(value.view_as(parameter))
            return
        _, tensors = self._partition(parameter)
        if tensors:
            shard: Any = parameter.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
            shard.data.view(-1)[: len(tensors["value"])].copy_(tensors["value"])

    def _partition(self, parameter: nn.Parameter) -> tuple[int, dict[str, Tensor]]:
        """Where this rank's range of a parameter starts, and views of it by part; no parts if it holds none."""
        if self.stage < 3:
            mapping: Any = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
            if mapping is None:
                return 0, {}
            parts = {"value": mapping.hp_fragment, **mapping.optim_fragment}
            return mapping.lp_fragment_address.start, {key: part.detach() for key, part in parts.items()}
        shard: Any = parameter  # DeepSpeed pads the last partitions to one size
        start = shard.ds_tensor.ds_numel * self.ranks.rank
        length = max(0, min(shard.ds_tensor.ds_numel, shard.ds_numel - start))
        if not length:
            return 0, {}
        # DeepSpeed's safe_get_local_* would move what is offloaded to the device, whole
        view = self.deepspeed.optimizer._get_fp32_opt_state_partition
        keys = {"value": None, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
        parts = {part: view(parameter, True, optim_state_key=key)[0] for part, key in keys.items()}
        return start, {part: tensor.detach()[:length] for part, tensor in parts.items()}

    def _inner(self) -> torch.optim.Optimizer:
        return self.deepspeed.optimizer.optimizer

    def _create_state(self) -> None:
        """Make moments that AdamW would make in its first step, and tie them to their parameters.

        DeepSpeed 0.19 ties them after the first group's first step, when those of later groups do not exist yet, and
        never again; without this, a norm's moments cannot be found under ZeRO-1 and 2.
        """
        inner = self._inner()
        if self.stage == 3:  # its groups are empty between steps
            partitions = [(flat, False) for flat in self.deepspeed.optimizer.fp32_partitioned_groups_flat]
        else:
            partitions = [(flat, group.get("muon")) for group in inner.param_groups for flat in group["params"]]
        for flat, muon in partitions:
            if not inner.state.get(flat):
                parts = ("momentum_buffer",) if muon else ("exp_avg", "exp_avg_sq")
                inner.state[flat] = {part: torch.zeros_like(flat) for part in parts}
                if not muon:
                    inner.state[flat]["step"] = torch.tensor(0.0)
        if self.stage < 3:
            self.deepspeed.optimizer._hp_optimizer_states_linked = False
            self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()


@contextlib.contextmanager
def _instead(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The scope in which some parameters of a module have other values, and another dtype."""
    held = {name: parameter.data for name, parameter in module.named_parameters() if name in weights}
    for name in held:
        module.get_parameter(name).data = weights[name]
    try:
        yield
    finally:
        for name, data in held.items():
            module.get_parameter(name).data = data


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


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
        "bf16": {"enabled": compute_dtype(recipe) == torch.bfloat16},
        "steps_per_print": 1 << 30,
    }
