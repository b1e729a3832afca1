"""The ways to cut a recipe's step: engine, micro-batch, checkpointing, tensor parallel. What fits and is fastest,
and why each of the others is not it.

The recipe's own rules decide what may be tried, so nothing is proposed that training would refuse. The global batch
never changes: what is learned stays the same.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..training.recipe import Recipe, parse_recipe
from .footprint import extrapolate
from .plan import GIB, Plan, Refused, has_experts, make_plan
from .state import state_of
from .workload import Workload

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
CHECKPOINTING = ("none", "selective", "full")
MAX_MICRO = 64


def alternatives(recipe: Recipe, asked: Plan, rollout_bytes: int) -> list[Plan | Refused]:
    """Every way to cut the step, best first: those that fit by speed, those that do not by how much they lack, then
    those that training refuses. One of each engine, checkpointing and tensor width: its best micro-batch."""
    found: list[Plan] = []
    refused: list[Refused] = []
    for tensor in _tensor_widths(asked):
        if tensor > 1 and any(plan.fits for plan in found):
            break  # sharing layers costs messages in every block: only for what does not fit otherwise
        for engine, checkpointing in itertools.product(ENGINES, CHECKPOINTING):
            changes = {"engine": engine, "checkpointing": checkpointing, "tensor": tensor}
            reason = refusal(recipe, changes) or _state_too_big(recipe, asked, changes)
            if reason is not None:
                refused.append(Refused(engine + (f", tensor {tensor}" if tensor > 1 else ""), reason))
                continue
            plans = list(_micro_batches(recipe, asked, changes, rollout_bytes))
            if plans:
                found.append(min(plans, key=_rank))
    found.sort(key=_rank)
    once = {(one.what, one.reason): one for one in refused}
    return [*found, *once.values()]


def _state_too_big(recipe: Recipe, asked: Plan, changes: dict[str, Any]) -> str | None:
    """Why nothing needs to be measured: what lies on a rank between passes is already too much. Micro-batches as large
    as a rank's share, without accumulation, need the least."""
    base = replace(asked.workload, **changes)
    if base.ranks % (base.tensor * base.context) or recipe.batch.size % base.data:
        return f"{base.data} data-parallel ranks do not divide {recipe.batch.size} samples"
    state = state_of(replace(base, rounds=1))
    held = state.weights + state.gradients + state.optimizer
    if held <= asked.limit_bytes:
        return None
    lacking = (held - asked.limit_bytes) / GIB
    return f"out of memory by {lacking:.1f} GiB before any activation: weights, gradients and optimizer state alone"


def _rank(plan: Plan) -> tuple[bool, float]:
    return not plan.fits, plan.step.total_s if plan.fits else plan.memory.total


def _tensor_widths(asked: Plan) -> list[int]:
    widths = {asked.workload.tensor}
    if supports_tensor() and not has_experts(json.loads(asked.workload.config)):
        widths |= {width for width in (2, 4, 8) if width <= asked.cluster.per_machine}
    return sorted(widths)


def supports_tensor() -> bool:
    """Whether training can share layers over ranks: what it refuses is not proposed."""
    tree = {"method": "sft", "steps": 1, "model": {"name": "x"}, "data": {"train": "x"}, "parallel": {"tensor": 2}}
    try:
        parse_recipe(tree)
    except ValueError:
        return False
    return True


def refusal(recipe: Recipe, changes: dict[str, Any]) -> str | None:
    """Why training would refuse the recipe with these changes; None if it would not."""
    tree = recipe.model_dump(mode="json")
    tree["parallel"] |= {"engine": changes["engine"], "tensor": changes["tensor"]}
    tree["model"]["activation_checkpointing"] = changes["checkpointing"]
    try:
        parse_recipe(tree)
    except ValueError as error:
        return str(error)
    return None


def _micro_batches(recipe: Recipe, asked: Plan, changes: dict[str, Any], rollout_bytes: int) -> Iterator[Plan]:
    """Plans with micro-batches of 1, 2, 4 ... samples that divide a rank's share of the global batch."""
    pair = 2 if recipe.method == "dpo" else 1
    base = replace(asked.workload, **changes)
    share = recipe.batch.size // base.data
    micro = 1
    while micro <= min(share, MAX_MICRO):
        if share % micro == 0:
            work = replace(base, micro=micro * pair, rounds=share // micro)
            plan = _extrapolated(work, asked, rollout_bytes)
            yield plan
            if not plan.fits:
                return
        micro *= 2


def _extrapolated(work: Workload, asked: Plan, rollout_bytes: int) -> Plan:
    footprint = extrapolate(work.one_pass(), work.micro)
    return make_plan(
        work, asked.cluster, footprint=footprint, rollout_bytes=rollout_bytes, steps=asked.steps, price=asked.price
    )


def verdict(plan: Plan, best: Plan) -> str:
    """One line: why a plan is not the best one."""
    if not plan.fits:
        lacking = (plan.memory.total - plan.limit_bytes) / GIB
        name, size = max(plan.memory.rows(), key=lambda row: row[1] if "host" not in row[0] else 0)
        return f"out of memory by {lacking:.1f} GiB, most of it {name} ({size / GIB:.1f} GiB)"
    if plan is best:
        return "fastest that fits"
    slower = plan.step.total_s / best.step.total_s - 1
    if slower < 5e-4:
        return "as fast"
    return f"slower by {slower:.1%}: {_reason(plan, best)}"


def _reason(plan: Plan, best: Plan) -> str:
    reasons = {
        "compute_s": "more arithmetic and memory traffic" if plan.step.flops <= best.step.flops * 1.001 else (
            f"{plan.step.flops / best.step.flops - 1:.0%} more FLOPs, recomputed"
        ),
        "exposed_s": "more communication that nothing hides",
        "slowed_s": "more communication beside the compute",
        "bubble_s": "more waiting between stages",
        "optimizer_s": "every rank updates more weights",
    }  # fmt: skip
    worse = {name: getattr(plan.step, name) - getattr(best.step, name) for name in reasons}
    return reasons[max(worse, key=lambda name: worse[name])]


def describe(work: Workload) -> str:
    """A way to cut a step, in few words."""
    shared = f", tensor {work.tensor}" if work.tensor > 1 else ""
    shared += f", context {work.context}" if work.context > 1 else ""
    return f"{work.engine}{shared}, micro-batch {work.micro} x {work.rounds}, {work.checkpointing} checkpointing"
