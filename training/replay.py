"""Compute a bad step again, in one process: which micro-batch, which row, and is it bad still?"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import checkpoint
from .engine import Engine
from .health import name_of
from .loop import assemble, restore
from .manifest import Manifest, verify
from .method import Method
from .ranks import start
from .recipe import Recipe, parse_recipe


@dataclass(frozen=True)
class Again:
    """A micro-batch computed again, or one of its rows alone (`row`): loss then and now, gradient norm."""

    rank: int
    micro_batch: int
    row: str | None
    loss_then: str | None
    loss: float
    norm: float

    @property
    def bad(self) -> bool:
        return not (math.isfinite(self.loss) and math.isfinite(self.norm))


@dataclass(frozen=True)
class Replay:
    """What computing a bad step (from 1) again gave; `weights` says how many finished steps its weights have."""

    step: int
    weights: int
    parts: list[Again]

    @property
    def bad(self) -> bool:
        return any(part.bad for part in self.parts)

    @property
    def exact(self) -> bool:
        return self.weights == self.step - 1


def replay(run_dir: Path, step: int | None = None) -> Replay:
    """Compute the micro-batches that a run named at `step` (the last one named, by default) again.

    The weights are those of the checkpoint before the step; `exact` says whether steps lie between. Raises ValueError,
    one line, when there is nothing to replay, or when the data has changed since.
    """
    notes = _notes(run_dir, step)
    number = int(notes[0]["step"])
    tree = yaml.safe_load(notes[0]["recipe"]) | {"parallel": {}, "resume": "auto"}
    recipe = parse_recipe(tree | {"run_dir": str(run_dir)})
    ranks = start(recipe)
    _, _, engine, method = assemble(recipe, ranks, run_dir)
    found = _weights_before(run_dir, number)
    weights = restore(engine, method, found) if found is not None else 0
    items = method.batch(number - 1)
    parts = [again for note in notes for again in _compute(recipe, engine, method, items, note)]
    return Replay(number, weights, parts)


def _notes(run_dir: Path, step: int | None) -> list[dict[str, Any]]:
    files = sorted((run_dir / "replay").glob("step-*-rank-*.json"))
    if not files:
        raise ValueError(f"replay: {run_dir} has no replay files; runs leave them when a step goes bad")
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    steps = sorted({int(note["step"]) for note in notes})
    if step is not None and step not in steps:
        raise ValueError(f"--step: {step} was no bad step of {run_dir}; choose from {', '.join(map(str, steps))}")
    return [note for note in notes if note["step"] == (steps[-1] if step is None else step)]


def _weights_before(run_dir: Path, step: int) -> Manifest | None:
    for done, path in sorted(checkpoint.committed(run_dir).items(), reverse=True):
        if done < step:
            return verify(path)
    return None


def _compute(
    recipe: Recipe, engine: Engine, method: Method, items: Sequence[Any], note: dict[str, Any]
) -> Iterator[Again]:
    """Each micro-batch of a rank's note, and, if it is bad, each of its rows alone."""
    totals = method.totals(items)
    for number, part in enumerate(note["micro_batches"]):
        chosen = [items[index] for index in part["items"]]
        if [name_of(item) for item in chosen] != part["rows"]:
            raise ValueError(
                f"replay: step {note['step']} now holds other rows than it did; data or recipe has changed"
            )
        whole = Again(note["rank"], number, None, part["loss"], *_loss_and_norm(engine, method, chosen, totals))
        yield whole
        if whole.bad and len(chosen) > 1:
            for item in chosen:
                yield Again(note["rank"], number, name_of(item), None, *_loss_and_norm(engine, method, [item], totals))


def _loss_and_norm(engine: Engine, method: Method, items: Sequence[Any], totals: Any) -> tuple[float, float]:
    with engine.micro_batch(last=True):
        loss, numbers = method.loss(engine.model, items, totals)
        loss.backward()
    squares = [float(p.grad.double().square().sum()) for p in engine.trainable if p.grad is not None]
    for parameter in engine.trainable:
        parameter.grad = None
    return numbers["loss"], math.sqrt(sum(squares)) if all(map(math.isfinite, squares)) else math.nan


def report(found: Replay) -> list[str]:
    """The replay as lines for a person."""
    exact = "the same weights" if found.exact else f"the weights after step {found.weights}: the outcome may differ"
    lines = [f"step {found.step} again, with {exact}"]
    for part in found.parts:
        verdict = "BAD" if part.bad else "fine"
        if part.row is None:
            then = f"loss then {part.loss_then}, now"
            lines.append(f"rank {part.rank}, micro-batch {part.micro_batch}: {then} {part.loss:.6g}, "
                         f"gradient norm {part.norm:.6g}: {verdict}")  # fmt: skip
        else:
            lines.append(f"    {part.row} alone: loss {part.loss:.6g}, gradient norm {part.norm:.6g}: {verdict}")
    return lines
