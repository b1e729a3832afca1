"""`shipyard plan`: what a recipe needs and does on a cluster that is not there yet: memory, time, tokens, energy,
price.

Nothing is computed and nothing allocated: state is counted (launch/state.py), activations and operations are
measured on the real model under FakeTensorMode (launch/footprint.py), time follows from the cards' published numbers
(launch/step_time.py). docs/planner.md holds predictions beside what others published.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..training.recipe import Recipe, load_recipe
from .cards import Cluster, parse_cluster
from .footprint import Footprint, measure
from .memory import Memory, memory_of, rollout_cache
from .step_time import StepTime, step_time
from .workload import Workload, from_recipe

GIB = 1 << 30
MACHINE = 1.5
"""Power of a machine over that of its cards at their limits: a DGX H100 is rated for 10.2 kW with 5.6 kW of cards,
1.8."""


@dataclass(frozen=True)
class Plan:
    """One workload on one cluster. Energy and cost are of the whole run, None if its length is not known."""

    workload: Workload
    cluster: Cluster
    memory: Memory
    step: StepTime
    model_flops: float
    """Of one step on all cards, without recomputation, attention counted in full (Chowdhery et al. 2022, appendix
    B)."""
    steps: int | None
    price: float | None

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit_bytes

    @property
    def limit_bytes(self) -> float:
        return self.cluster.card.memory_gib * GIB

    @property
    def mfu(self) -> float:
        peak = self.cluster.card.bf16_tflops * 1e12 * self.cluster.gpus
        return self.model_flops / self.step.total_s / peak

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.workload.step_tokens / self.step.total_s / self.cluster.gpus

    @property
    def tokens_per_day(self) -> float:
        return self.tokens_per_s_per_gpu * self.cluster.gpus * 86400

    @property
    def days(self) -> float | None:
        return None if self.steps is None else self.steps * self.step.total_s / 86400

    @property
    def energy_kwh(self) -> float | None:
        if self.days is None:
            return None
        return self.days * 24 * self.cluster.gpus * self.cluster.card.watts * MACHINE / 1000

    @property
    def cost(self) -> float | None:
        return None if self.days is None or self.price is None else self.days * 24 * self.cluster.gpus * self.price

    def as_dict(self) -> dict[str, Any]:
        """Everything, with units in the names, for JSON."""
        work = asdict(self.workload)
        work.pop("config")
        names = ("mfu", "tokens_per_s_per_gpu", "tokens_per_day", "days", "energy_kwh", "cost", "fits")
        return {
            "gpus": str(self.cluster),
            "workload": work,
            "path": self.workload.path,
            "memory_bytes": dict(self.memory.rows()) | {"total": self.memory.total, "limit": self.limit_bytes},
            "step_s": {**asdict(self.step), "total_s": self.step.total_s},
            "step_tokens": self.workload.step_tokens,
            "model_flops": self.model_flops,
            **{name: getattr(self, name) for name in names},
        }


def make_plan(
    work: Workload,
    cluster: Cluster,
    *,
    footprint: Footprint | None = None,
    rollout_bytes: int = 0,
    steps: int | None = None,
    price: float | None = None,
) -> Plan:
    """Plan one workload. Raises ValueError, one line, for what the cards cannot do or the model does not allow."""
    if work.float8 and not cluster.card.float8_tflops:
        raise ValueError(f"model.float8: {cluster.card.name} has no float8 arithmetic; set model.float8=false")
    config = json.loads(work.config)
    heads = config["num_attention_heads"]
    if has_experts(config) and work.tensor > 1:
        raise ValueError(
            f"parallel.tensor: {config['model_type']}'s experts cannot be shared by ranks here; set tensor: 1"
        )
    if heads % work.tensor:
        raise ValueError(f"parallel.tensor: {work.tensor} ranks cannot share {heads} attention heads evenly")
    footprint = footprint or measured(work)
    memory = memory_of(work, footprint, rollout_bytes)
    return Plan(work, cluster, memory, step_time(work, cluster, footprint), model_flops(work), steps, price)


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a model's blocks choose among experts."""
    return bool(config.get("n_routed_experts"))


def measured(work: Workload) -> Footprint:
    """Measure a workload's pass. Raises ValueError, one line, for a model whose operations depend on its numbers."""
    from torch._subclasses.fake_tensor import DynamicOutputShapeException, UnsupportedOperatorException

    try:
        return measure(work.one_pass())
    except (DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise ValueError(
            f"model.shape: this model cannot be measured without its numbers ({type(error).__name__} in {error}); its "
            "plan would be a guess"
        ) from None


def model_flops(work: Workload) -> float:
    """FLOPs that the model needs for one step, on all cards: forward, and twice that backward (less where weights are
    frozen), whatever is recomputed."""
    one = measured(replace(work, micro=1, checkpointing="none", tensor=1, context=1, kernels="stock"))
    total = 0.0
    for ops, times in ((one.block_ops, one.layers), (one.rest_ops, 1)):
        products = sum(op.flops for op in ops if op.kind == "matmul")
        attention = sum(op.flops for op in ops if op.kind == "attention") * 6 / 7  # backward recomputes the scores
        total += times * (products + attention)
    return total * work.step_tokens / work.tokens


def config_of(recipe: Recipe) -> dict[str, Any]:
    """The config of a recipe's model: its shape, or config.json of a directory. Raises ValueError if not known here."""
    from ..training.models import locate, shape_config

    if recipe.model.shape:
        return shape_config(recipe.model.shape)
    path = Path(locate(recipe.model.name)) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model.shape: the shape of {recipe.model.name} is not known here; set model.shape to a name of "
            "launch/shapes"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def dry_memory(recipe: Recipe, ranks: int) -> list[tuple[str, int]]:
    """The memory table of `--dry-run`: one rank of `ranks`, with the path of this machine's GPU."""
    import torch

    from ..kernels.jit import architecture

    config = config_of(recipe)
    arch = architecture(torch.device("cuda")) if torch.cuda.is_available() else ""
    work = from_recipe(recipe, config, ranks, arch, ragged=True)
    return memory_of(work, measured(work), rollout_cache(recipe, config, ranks)).rows()


def plan_recipe(
    path: str, overrides: Sequence[str], gpus: str, price: float | None, search: bool
) -> tuple[Plan, "list[Plan | Refused] | None"]:
    """Plan a recipe file on `gpus`, and all the ways to cut it if `search`, the best first."""
    from .search import alternatives

    cluster = parse_cluster(gpus)
    recipe = load_recipe(path, overrides)
    if price is not None and not 0 <= price < math.inf:
        raise ValueError(f"--price: {price} is below zero or no number; give the price of one GPU for an hour")
    config = config_of(recipe)
    work = from_recipe(recipe, config, cluster.gpus, cluster.card.arch)
    rollouts = rollout_cache(recipe, config, cluster.gpus)
    plan = make_plan(work, cluster, rollout_bytes=rollouts, steps=recipe.steps, price=price)
    return plan, alternatives(recipe, plan, rollouts) if search else None


@dataclass(frozen=True)
class Refused:
    """A way to cut a recipe that training would refuse, and its reason."""

    what: str
    reason: str
