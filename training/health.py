"""Steps that must not count: a loss or a gradient that is no number, or a spike.

Such a step changes no weight on any rank. It is named with its ranks and rows, and each of those ranks leaves a replay
file. What follows is the recipe's choice: stop, skip the step, or rewind to the last checkpoint and leave out every
step from there to this one (Chowdhery et al. 2022, PaLM, section 5.1). All three are functions of the data and the
weights, so a run that is killed in between and resumed decides alike.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .ranks import Ranks
from .recipe import Recipe, dump_recipe

HISTORY = 32
FEWEST = 8
"""Norms before which nothing is called a spike: a median of less says little."""
NAMED = 3


class BadStep(Exception):
    """A step that changed nothing. Raised on every rank; the text is one sentence."""


class Norms:
    """The last gradient norms, which say what a spike is."""

    def __init__(self, spike_factor: float, known: Iterable[float] = ()) -> None:
        self.spike_factor = spike_factor
        self.known = deque(known, maxlen=HISTORY)

    def largest(self) -> float:
        """The largest norm that is no spike."""
        if not self.spike_factor or len(self.known) < FEWEST:
            return math.inf
        return self.spike_factor * statistics.median(self.known)


@dataclass(frozen=True)
class Evidence:
    """What is known of a bad step: `items` is the global batch, `micro_batches` and their `losses` are this rank's,
    `norm` is the global gradient's and `largest` what it may be."""

    step: int
    items: Sequence[Any]
    micro_batches: Sequence[Sequence[Any]]
    losses: Sequence[float]
    norm: float
    largest: float


def bad_step(recipe: Recipe, ranks: Ranks, seen: Evidence) -> BadStep:
    """Find the ranks and rows, leave a replay file on each of those ranks, return what to raise. Collective."""
    bad = [number for number, loss in enumerate(seen.losses) if not math.isfinite(loss)]
    on_ranks = [rank for rank, rows in enumerate(ranks.gather_rows([bad])) if rows[0]]
    suspects = [
        (part, loss)
        for number, (part, loss) in enumerate(zip(seen.micro_batches, seen.losses, strict=True))
        if part and (number in bad or not on_ranks)
    ]
    if suspects:
        _write_replay(recipe, ranks, seen, suspects)
    rows = _rows_of_all(ranks, [item for part, _ in suspects for item in part])
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return BadStep(
        f"health: step {seen.step + 1}: {_what(recipe, on_ranks, seen)}, and no weight was changed; rows "
        f"{', '.join(rows[:NAMED])}{more}; `shipyard replay {recipe.run_dir}` computes it again"
    )


def _what(recipe: Recipe, on_ranks: Sequence[int], seen: Evidence) -> str:
    if on_ranks:
        return f"the loss is no number on rank {', '.join(map(str, on_ranks))}"
    if not math.isfinite(seen.norm):
        return "the gradient is no number"
    factor = recipe.health.spike_factor
    return (
        f"the gradient norm {seen.norm:.3g} is more than {factor:g} times the median of the last {HISTORY} steps "
        f"({seen.largest / factor:.3g})"
    )


def replay_path(run_dir: Path, step: int, rank: int) -> Path:
    """Where a rank leaves the micro-batches of step `step` (from 0)."""
    return run_dir / "replay" / f"step-{step + 1:06d}-rank-{rank}.json"


def _write_replay(
    recipe: Recipe, ranks: Ranks, seen: Evidence, suspects: Sequence[tuple[Sequence[Any], float]]
) -> None:
    path = replay_path(Path(recipe.run_dir), seen.step, ranks.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    place = {id(item): index for index, item in enumerate(seen.items)}
    parts = [
        {
            "loss": str(loss),
            "items": [place[id(item)] for item in part],
            "rows": [name_of(item) for item in part],
            "ids": [item.ids.tolist() for item in part if hasattr(item, "ids")],
        }
        for part, loss in suspects
    ]
    about = {"step": seen.step + 1, "rank": ranks.rank, "world_size": ranks.world_size, "norm": str(seen.norm)}
    tree = {**about, "micro_batches": parts, "recipe": dump_recipe(recipe)}
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    draft.replace(path)


def name_of(item: Any) -> str:
    """Where an item came from, file:line for rows."""
    return str(getattr(item, "source", None) or type(item).__name__.lower())


def _rows_of_all(ranks: Ranks, items: Sequence[Any]) -> list[str]:
    encoded = [list(name_of(item).encode()) for item in items]
    return [bytes(row).decode() for rows in ranks.gather_rows(encoded) for row in rows]
