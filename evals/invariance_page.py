"""The invariance certificate as a person reads it: a table in the terminal, and docs/invariance.md."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = tuple[str, ...]


def print_table(certificate: Mapping[str, Any], out: Path) -> None:
    """Print worst differences by engine and by method, what was refused, and the verdict."""
    from rich.table import Table

    from ..launch.tables import console

    for axis in ("engine", "method"):
        table = Table()
        for column in (axis, "cells", "ranks", "loss", "gradient norm", "weights", "verdict"):
            table.add_column(column, justify="left" if column == axis else "right")
        for row in worst_by(certificate, axis):
            table.add_row(*row)
        console.print(table)
    for line in (*_elastic_lines(certificate), *_refused_lines(certificate)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for failure in certificate["failures"]:
        console.print(f"[red]FAILED[/] {failure}", soft_wrap=True, highlight=False)
    verdict = "[green]passed[/]" if certificate["passed"] else "[red]FAILED[/]"
    console.print(f"{certificate['subject']}: {verdict}; {out}/invariance-certificate.json", soft_wrap=True)


def worst_by(certificate: Mapping[str, Any], axis: str, dtype: str = "float32") -> Iterator[Row]:
    """A row for each value of an axis: cells, ranks, the worst differences of them all, the verdict."""
    cells = [cell for cell in certificate["cells"] if cell["dtype"] == dtype]
    for value in dict.fromkeys(cell[axis] for cell in cells):
        here = [cell for cell in cells if cell[axis] == value]
        ranks = ", ".join(map(str, sorted({cell["world"] for cell in here})))
        worst = [f"{max(cell[key] or 0.0 for cell in here):.1e}" for key in ("loss", "grad_norm", "weights")]
        failed = sum(not cell["passed"] for cell in here)
        yield str(value), str(len(here)), ranks, *worst, f"{failed} failed" if failed else "passed"


def write_page(path: Path, certificate: Mapping[str, Any]) -> None:
    """Write the certificate as a Markdown page."""
    columns = ("cells", "ranks", "loss", "gradient norm", "weights", "")
    axes: Sequence[tuple[str, str, Callable[[Any], str]]] = (
        ("engine", "By engine", str),
        ("method", "By method", str),
        ("micro", "By samples in a forward pass", str),
        ("packing", "By layout", lambda value: "packed" if value == "True" else "padded"),
        ("checkpointing", "By activation checkpointing", str),
        ("compiled", "By torch.compile", lambda value: "compiled" if value == "True" else "as written"),
    )
    parts = [INTRODUCTION.format(**{**certificate, "verdict": "passed" if certificate["passed"] else "FAILED"})]
    for axis, title, word in axes:
        rows = [(word(row[0]), *row[1:]) for row in worst_by(certificate, axis)]
        parts.append(f"## {title}\n\n{_table((axis, *columns), rows)}")
    if half := list(worst_by(certificate, "engine", "bfloat16")):
        parts.append(f"{HALF.format(**certificate)}\n\n{_table(('engine', *columns), half)}")
    parts.append(ELASTIC + "\n\n" + "\n".join(f"- {line}" for line in _elastic_lines(certificate)))
    if certificate["elastic"]["cost"]:
        parts.append(_cost_table(certificate))
    parts.append("## What recipe rules refuse\n\n" + "\n".join(f"- {line}" for line in _refused_lines(certificate)))
    parts.append("## What failed\n\n" + ("\n".join(f"- {line}" for line in certificate["failures"]) or "Nothing."))
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _elastic_lines(certificate: Mapping[str, Any]) -> Iterator[str]:
    elastic = certificate["elastic"]
    for group in elastic["hashes"]:
        if len(group["worlds"]) > 1:
            verdict = f"SHA-256 {group['sha256'][0][:16]}..." if group["passed"] else "DIFFERENT BITS"
            ranks = ", ".join(map(str, group["worlds"]))
            yield f"elastic: {group['name']} on {ranks} ranks, {group['cells']} cells: {verdict}"
    for world, cost in elastic["cost"].items():
        yield f"elastic: a step on {world} ranks takes {cost['ratio']:.2f} times as long as under DDP"
    if chain := elastic.get("chain"):
        lives = ", then ".join(
            f"{link['ranks']} ranks until step {link['until_step']}" + (" (SIGKILL)" if link["exit_code"] == -9 else "")
            for link in chain["links"]
        )
        verdict = f"SHA-256 {chain['killed'][:16]}..., as undisturbed" if chain["passed"] else "FAILED"
        yield f"elastic: a run on {lives}: {verdict}"


def _cost_table(certificate: Mapping[str, Any]) -> str:
    rows = [
        (str(world), f"{cost['ddp']:.3f}", f"{cost['elastic']:.3f}", f"{cost['ratio']:.2f}")
        for world, cost in certificate["elastic"]["cost"].items()
    ]
    return _table(("ranks", "DDP, s a step", "elastic, s a step", "ratio"), rows)


def _refused_lines(certificate: Mapping[str, Any]) -> Iterator[str]:
    for entry in certificate["refused"]:
        yield f"refused ({entry['cells']} of the lattice's cells): {entry['reason']}"


def _table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


INTRODUCTION = """# Invariance

The loss, the gradient norm and the updated weights of a job do not depend on how it is cut up. `shipyard verify
invariance` trains one job in many cuts, with real processes, through the loop that `shipyard train` runs, and compares
every cut with one process that computes each global batch at once, padded. This page is what it wrote; the same run
left [a certificate](invariance-certificate.json), which `shipyard verify docs` checks.

{subject}: **{verdict}**. {steps} optimizer steps a cell (AdamW, ragged last windows, rows of very different lengths,
ranks without a share), fp32, {machine}. Tolerance {tolerance:.0e}: on every logged loss and gradient norm (relative
where the reference is above 1), on every weight (absolute). Adam's epsilon is 1e-5: where a gradient is smaller than
its default, 1e-8, an update is the sign of a rounding error."""

HALF = """## In bf16

Two ranks beside one, bf16 on both sides; tolerance {bf16_tolerance:g} on losses, three times that on norms. At least
90 % of the matrix weights in a checkpoint are numbers that bf16 cannot hold: every engine keeps fp32 master weights."""

ELASTIC = """## The same bits

With `deterministic: elastic` gradients are added in one binary tree over micro-batches, so the weights' SHA-256 is
equal on any power of two of ranks. Its cost, beside plain DDP in the same processes:"""
