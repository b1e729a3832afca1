"""What a person sees: tables of results, certificates and memory, and a spinner while something takes long."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from ..evals.tasks import Result

PATIENCE_S = 2.0
console = Console(width=None if sys.stdout.isatty() else 140)


@contextlib.contextmanager
def spinner(message: str, quiet: bool = False) -> Iterator[None]:
    """Show a spinner with the time passed on stderr, once two seconds have; a line where stderr is no terminal."""
    if quiet or os.environ.get("RANK", "0") != "0":
        yield
        return
    errors = Console(file=sys.stderr)
    parts = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    bar = Progress(*parts, console=errors, transient=True)
    bar.add_task(message, total=None)
    timer = threading.Timer(PATIENCE_S, bar.start if errors.is_terminal else lambda: errors.print(message))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        if bar.live.is_started:
            bar.stop()


def plain(value: Any) -> Any:
    """Turn dataclasses and paths into what JSON can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def print_results(results: Sequence["Result"]) -> None:
    """Print scores with their 95 % intervals, a row each."""
    table = Table()
    for column in ("stage", "suite", "metric"):
        table.add_column(column)
    for column in ("score", "95 %", "rows", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("note")
    for result in results:
        form = "{:.3f}" if result.metric == "bits per byte" else "{:.1%}"
        interval = f"{form.format(result.low)} - {form.format(result.high)}"
        numbers = (form.format(result.value), interval, str(result.n), f"{result.seconds:.0f}")
        table.add_row(result.stage, result.suite, result.metric, *numbers, result.note)
    console.print(table)


def print_memory(rows: Sequence[tuple[str, int]], world_size: int) -> None:
    """Print bytes by category for one rank, in GiB of 2^30 bytes."""
    console.print(f"memory of one rank of {world_size}, planned:", style="bold")
    table = Table()
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for name, size in rows:
        table.add_row(name, f"{size / 2**30:.2f}")
    table.add_section()
    table.add_row("total", f"{sum(size for name, size in rows if 'host' not in name) / 2**30:.2f}")
    console.print(table)


def print_certificates(target: Path, certificates: Sequence[Mapping[str, Any]]) -> None:
    """Print where an export went, and what its certificates say."""
    console.print(f"wrote {target}", soft_wrap=True)
    for entry in certificates:
        if entry.get("checked") is False:
            console.print(f"[yellow]not checked[/]: {'; '.join(entry['limits'])}", soft_wrap=True)
            continue
        verdict = "[green]passed[/]" if entry["passed"] else f"[red]FAILED[/]: {'; '.join(entry['failures'])}"
        console.print(f"{certificate_line(entry)}: {verdict}", soft_wrap=True)


def certificate_line(entry: Mapping[str, Any]) -> str:
    """Say in a line what a certificate compared. Parity certificates have a KL, template ones a count."""
    if "mean_kl" not in entry:
        return f"template against the Jinja one, {entry['conversations']} conversations"
    return (
        f"{entry['subject']} against {entry['reference']}: KL {entry['mean_kl']:.1e} "
        f"(budget {entry['budget']:.0e}), {entry['positions']} positions"
    )
