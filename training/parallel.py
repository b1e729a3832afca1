"""Data-parallel engines behind one small interface: plain, DDP, DeepSpeed ZeRO-1, 2 and 3.

An engine is given losses that are already divided by the *global* denominator and returns the gradient norm of the
global batch. DDP and DeepSpeed both average over ranks, and DeepSpeed divides by the accumulation too; the engines undo
this, so every engine computes the same sum. Processes are started by `accelerate launch` (or torchrun).
"""

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from .batches import accumulation
from .recipe import Recipe


@dataclass(frozen=True)
class Ranks:
    """Who takes part. Made once, before anything is loaded."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add numbers up over all ranks, in fp64; every rank must pass the same keys."""
        if self.world_size == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world_size > 1:
            dist.barrier()

    def gather_rows(self, rows: list[list[int]]) -> list[list[list[int]]]:
        """Every rank's rows of integers, by rank. Plain tensors travel, no pickles."""
        if self.world_size == 1:
            return [rows]
        flat = [number for row in rows for number in (len(row), *row)]
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(flat)
        dist.all_reduce(sizes)
        padded = torch.zeros(int(sizes.max()), dtype=torch.int64, device=self.device)
        padded[: len(flat)] = torch.tensor(flat, dtype=torch.int64, device=self.device)
        everyone = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(everyone, padded)
        return [_unflatten(tensor[:size].tolist()) for tensor, size in zip(everyone, sizes.tolist(), strict=True)]


def _unflatten(flat: list[int]) -> list[list[int]]:
    rows, at = [], 0
    while at < len(flat):
        rows.append(flat[at + 1 : at + 1 + flat[at]])
        at += 1 + flat[at]
    return rows


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


def start(recipe: Recipe) -> Ranks:
    """Join the processes that the launcher started.

    Raises ValueError when the launcher's configuration asks for another ZeRO stage than the recipe.
    """
    asked = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if asked and recipe.parallel.engine != f"zero{asked}":
        raise ValueError(
            f"parallel.engine: {recipe.parallel.engine}, but the launch configuration asks for ZeRO stage {asked}; set "
            f"parallel.engine=zero{asked}, or launch with launch/accelerate/ranks.yaml"
        )
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # the engine is built from the recipe, below
    if recipe.parallel.engine != "ddp":
        _rendezvous_alone()
    limits = InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.parallel.timeout_s))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[limits])
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    assert accelerator.num_processes == world_size, "processes were started but did not find each other"
    return Ranks(accelerator.process_index, world_size, accelerator.device)


def build_engine(ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> Engine:
    """Wrap model and optimizer in the recipe's engine."""
    kind = Engine if recipe.parallel.engine == "ddp" else ZeroEngine
    return kind(ranks, model, optimizer, recipe)


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


def _rendezvous_alone() -> None:
    """Give a process that no launcher started the variables that DeepSpeed wants even for a world of one."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in alone.items()})
