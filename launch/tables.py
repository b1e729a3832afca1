"""Tables for a person: results of evaluations, certificates, memory."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console()


def plain(value: Any) -> Any:
    """Turn dataclasses and paths into what JSON can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def print_memory(rows: Sequence[tuple[str, int]], world_size: int) -> None:
    """Print bytes by category for one rank, in GB of 10^9 bytes."""
    console.print(f"memory of one rank of {world_size}, estimated:", style="bold")
    table = Table()
    table.add_column("what")
    table.add_column("GB", justify="right")
    for name, size in rows:
        table.add_row(name, f"{size / 1e9:.2f}")
    table.add_section()
    table.add_row("total", f"{sum(size for name, size in rows if 'host' not in name) / 1e9:.2f}")
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
