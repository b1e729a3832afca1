"""A plan as a person reads it, and as JSON."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from .plan import GIB, Plan, Refused
from .search import describe, verdict
from .tables import console


def as_tree(asked: Plan, others: Sequence[Plan | Refused] | None) -> dict[str, Any]:
    """A plan and its alternatives, for JSON."""
    tree = asked.as_dict()
    if others is not None:
        best = _best(others)
        tree["alternatives"] = [
            {"verdict": verdict(other, best), **other.as_dict()}
            if isinstance(other, Plan)
            else {"verdict": other.reason, "fits": False, "what": other.what}
            for other in others
        ]
    return tree


def print_plan(asked: Plan, others: Sequence[Plan | Refused] | None) -> None:
    """Print what was asked for, then the alternatives, the best first, one line each."""
    console.print(f"[bold]{asked.cluster}[/]: {describe(asked.workload)}", soft_wrap=True)
    _print_memory(asked)
    _print_time(asked)
    if others is None:
        return
    best = _best(others)
    table = Table(title="ways to cut the same global batch, the best micro-batch of each", title_justify="left")
    table.add_column("how")
    for column in ("GiB", "tokens/s/GPU", "MFU"):
        table.add_column(column, justify="right")
    table.add_column("why")
    for other in others:
        if isinstance(other, Plan):
            how = f"[bold]{describe(other.workload)}[/]" if other is best and other.fits else describe(other.workload)
            speed = (f"{other.tokens_per_s_per_gpu:,.0f}", f"{other.mfu:.1%}") if other.fits else ("", "")
            table.add_row(how, f"{other.memory.total / GIB:.1f}", *speed, verdict(other, best))
        else:
            table.add_row(other.what, "", "", "", other.reason)
    console.print(table)
    if not best.fits:
        console.print("[yellow]nothing fits[/]: take more GPUs, a larger card, or offload=cpu", soft_wrap=True)


def _best(others: Sequence[Plan | Refused]) -> Plan:
    plans = [other for other in others if isinstance(other, Plan)]
    if not plans:
        reasons = "; ".join(f"{other.what}: {other.reason}" for other in others if isinstance(other, Refused))
        raise ValueError(f"--gpus: no way to cut this step fits ({reasons}); take more GPUs or a larger card")
    return plans[0]


def _print_memory(plan: Plan) -> None:
    table = Table(title="memory of the fullest rank", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for name, size in plan.memory.rows():
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    lacking = plan.memory.total - plan.limit_bytes
    note = "fits" if plan.fits else f"[red]too much by {lacking / GIB:.1f} GiB[/]"
    table.add_row(f"total, of {plan.cluster.card.memory_gib:g}: {note}", f"{plan.memory.total / GIB:.2f}")
    console.print(table)


def _print_time(plan: Plan) -> None:
    step, work = plan.step, plan.workload
    sent = f"{step.nvlink_bytes / 1e9:,.1f} GB on NVLink, {step.network_bytes / 1e9:,.1f} GB on the network"
    spent = (
        f"compute {step.compute_s:.2f}, communication that nothing hides {step.exposed_s:.2f}, slowed by the rest of "
    )
    spent += f"it {step.slowed_s:.2f}, optimizer {step.optimizer_s:.2f}"
    day = f"{plan.tokens_per_day / 1e9:,.2f} billion a day"
    rows = [
        ("tokens a step", f"{work.step_tokens:,}"),
        ("FLOPs a step", f"{plan.model_flops:.3g} by the model, {step.flops * plan.cluster.gpus:.3g} computed"),
        ("sent by one GPU a step", sent),
        ("step", f"{step.total_s:.2f} s: {spent}"),
        ("MFU", f"{plan.mfu:.1%} of {plan.cluster.card.bf16_tflops:g} bf16 TFLOP/s"),
        ("tokens", f"{plan.tokens_per_s_per_gpu:,.0f} a second and GPU, {day}"),
    ]
    if plan.days is not None and plan.energy_kwh is not None:
        rows.append(("the whole run", f"{plan.days:,.2f} days, {plan.energy_kwh:,.0f} kWh"))
        if plan.cost is not None:
            rows.append(("cost", f"{plan.cost:,.0f} at {plan.price:g} a GPU hour"))
    else:
        rows.append(("the whole run", "epochs of data that is not counted here: set steps for days and cost"))
    table = Table(show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
