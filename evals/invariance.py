"""`shipyard verify invariance`: train every cell of the lattice, compare it with one rank, and certify the differences.

Three comparisons. In fp32, every logged loss and gradient norm and every weight after five steps lies within 1e-6 of
the one-rank reference. In bf16, losses lie within its tolerance and checkpoints hold fp32 master weights. With
`deterministic: elastic`, the weights' SHA-256 is equal on 1, 2 and 4 ranks, and across kills that change
their number.
"""

import itertools
import json
import platform
import shutil
import signal
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..training.checkpoint import weights_hash
from ..training.shard import StoredFragments
from . import lattice
from .elastic_chain import run_chain
from .lattice import Cell
from .lattice_inputs import write_inputs
from .lattice_ranks import Outcome, train_all
from .lattice_work import keep, open_work, sources_hash, versions

Cover = Literal["short", "standard", "full"]
TOLERANCE = 1e-6
BF16_TOLERANCE = 0.02
"""On the losses of five steps, relative: bf16 keeps 8 bits. Norms of gradients, sums of such numbers, get three times
it."""
NOWHERE = float("inf")
"""How far a cell without an outcome lies from its reference; null in the certificate."""
CERTIFICATE = "invariance-certificate.json"


@dataclass(frozen=True)
class Compared:
    """A cell beside its reference: the worst differences, and whether they are small enough.

    Losses and norms: of all steps, relative to the reference where that is above 1. Weights: of all elements, absolute.
    """

    cell: Cell
    seconds: float
    loss: float
    grad_norm: float
    weights: float
    sha256: str
    """Of the weights after the last step."""
    beyond_bf16: float
    """The part of the stored matrices that bf16 cannot hold: near 1 if master weights are fp32, 0 if they are not."""
    error: str = ""

    @property
    def passed(self) -> bool:
        if self.error or self.beyond_bf16 < 0.9:
            return False
        if self.cell.dtype == "bfloat16":
            return self.loss <= BF16_TOLERANCE and self.grad_norm <= 3 * BF16_TOLERANCE
        return max(self.loss, self.grad_norm, self.weights) <= TOLERANCE

    def as_dict(self) -> dict[str, Any]:
        measured = {key: value for key, value in vars(self).items() if key != "cell"}
        numbers = {key: None if value == NOWHERE else value for key, value in measured.items()}
        return {"name": self.cell.name, **asdict(self.cell), **numbers, "passed": self.passed}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Compared":
        """What `as_dict` said."""
        measured = {each.name: tree[each.name] for each in fields(cls) if each.name != "cell"}
        numbers: dict[str, Any] = {name: NOWHERE if value is None else value for name, value in measured.items()}
        return cls(Cell(**{each.name: tree[each.name] for each in fields(Cell)}), **numbers)


def verify_invariance(cover: Cover, out: Path, as_json: bool = False) -> bool:
    """Run the lattice, write `out`/invariance-certificate.json and `out`/invariance.md, and print the table.

    Interrupted and run again, it goes on: what is trained lies in `out`/work until the certificate is written. Raises
    ValueError where other code left it there.
    """
    from .invariance_page import print_table, write_page

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that no rank stays behind
    certificate = certify(cover, out / "work")
    (out / CERTIFICATE).write_text(_text(certificate), encoding="utf-8")
    write_page(out / "invariance.md", certificate)
    if as_json:
        print(json.dumps(certificate, indent=1))
    else:
        print_table(certificate, out)
    shutil.rmtree(out / "work")
    return certificate["passed"]


def certify(cover: Cover, folder: Path) -> dict[str, Any]:
    """Train what `cover` names under `folder`, but for what an earlier call has, and return the certificate."""
    earlier = open_work(folder, cover)
    inputs, worlds = folder / "inputs", lattice.WORLDS[:2] if cover == "short" else lattice.WORLDS
    if not earlier:
        shutil.rmtree(inputs, ignore_errors=True)
        write_inputs(inputs)
    cells, refused = choose(cover, worlds, inputs)
    compared = {item.cell: item for item in map(Compared.from_dict, (line for line in earlier if "name" in line))}
    costs = {line["ranks"]: line["cost"] for line in earlier if "cost" in line}
    for compiled, world in itertools.product((False, True), worlds):
        here = [cell for cell in cells if (cell.compiled, cell.world) == (compiled, world)]
        for item in _train([cell for cell in here if cell not in compared], folder):
            compared[item.cell] = item
            keep(folder, item.as_dict())
            _say(f"{len(compared)}/{len(cells)}", item)
        if cover != "short" and world not in costs:
            costs[world] = _cost(world, inputs, folder)
            keep(folder, {"ranks": world, "cost": costs[world]})
    elastic = {"hashes": _hashes(list(compared.values())), "cost": costs}
    if cover != "short":
        shutil.rmtree(folder / "chain", ignore_errors=True)
        elastic["chain"] = run_chain(inputs, folder / "chain").as_dict()
    return _certificate(cover, list(compared.values()), refused, elastic)


def _train(cells: Sequence[Cell], folder: Path) -> Iterator[Compared]:
    """Train cells of one number of ranks and compare each with its reference. Only references keep their weights."""
    if not cells:
        return
    runs = folder / "runs"
    for cell in cells:
        shutil.rmtree(runs / cell.name, ignore_errors=True)  # a kill may have left half of it
    trees = [lattice.recipe_tree(cell, folder / "inputs", runs / cell.name) for cell in cells]
    references: dict[Cell, tuple[list[dict[str, float]], dict[str, Tensor]]] = {}
    for cell, outcome in zip(cells, train_all(trees, cells[0].world, folder), strict=True):
        wanted = lattice.reference(cell)
        if outcome.error:
            shutil.rmtree(outcome.run_dir, ignore_errors=True)
        if wanted not in references and (runs / wanted.name).exists():
            references[wanted] = read_run(runs / wanted.name)
        yield compare(cell, outcome, references.get(wanted))
        if cell != wanted:
            shutil.rmtree(outcome.run_dir, ignore_errors=True)


def choose(cover: Cover, worlds: Sequence[int], inputs: Path) -> tuple[list[Cell], Counter[str]]:
    """The cells to train, references first, and how many cells of the whole lattice each recipe rule refuses."""
    reasons = {cell: lattice.refusal(cell, inputs) for cell in lattice.product()}
    allowed = [cell for cell, reason in reasons.items() if reason is None and cell.world in worlds]
    if cover == "short":
        wanted = lattice.pairwise(filter(lattice.is_short, allowed))
        wanted += [cell for cell in lattice.half_precision() if cell.engine in ("ddp", "fsdp2", "zero2", "zero3")]
        wanted += lattice.found()
    elif cover == "standard":
        wanted = lattice.engines_by_ranks(worlds)
        wanted += lattice.pairwise((cell for cell in allowed if not cell.compiled), wanted)
        wanted += [*lattice.half_precision(), *lattice.compiled(), *lattice.found()]
    else:
        wanted = [*allowed, *lattice.half_precision()]
    references = [lattice.reference(cell) for cell in wanted]
    same_bits = [lattice.same_bits(cell) for cell in wanted if cell.engine == "elastic"]
    return list(dict.fromkeys([*references, *same_bits, *wanted])), Counter(filter(None, reasons.values()))


def read_run(run_dir: Path) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The logged steps of a run, and the weights of its last checkpoint."""
    steps = [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return steps, StoredFragments(max(run_dir.glob("step-*"))).whole()


def compare(
    cell: Cell, outcome: Outcome, reference: tuple[list[dict[str, float]], dict[str, Tensor]] | None
) -> Compared:
    """Measure how far a cell's run lies from its reference's."""
    if outcome.error or reference is None:
        error = outcome.error or "its reference did not run"
        return Compared(cell, outcome.seconds, NOWHERE, NOWHERE, NOWHERE, "", 1.0, error)
    (steps, weights), (wanted_steps, wanted) = read_run(outcome.run_dir), reference
    if len(steps) != len(wanted_steps) or weights.keys() != wanted.keys():
        error = f"{len(steps)} steps and {len(weights)} weights, not {len(wanted_steps)} and {len(wanted)}"
        return Compared(cell, outcome.seconds, NOWHERE, NOWHERE, NOWHERE, "", 1.0, error)
    pairs = list(zip(steps, wanted_steps, strict=True))
    loss, norm = (
        max(abs(step[key] - want[key]) / max(1.0, abs(want[key])) for step, want in pairs)
        for key in ("loss", "grad_norm")
    )
    worst = max(float((weights[name] - wanted[name]).abs().max()) for name in wanted)
    trained = [tensor for name, tensor in weights.items() if tensor.ndim > 1]
    beyond = sum(int((tensor != tensor.bfloat16().float()).sum()) for tensor in trained)
    part = beyond / sum(tensor.numel() for tensor in trained)
    sha256 = weights_hash(max(outcome.run_dir.glob("step-*")))
    return Compared(cell, outcome.seconds, loss, norm, worst, sha256, part)


def _hashes(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """Elastic cells that must agree in every bit, and whether they do."""
    groups: dict[Cell, list[Compared]] = {}
    for item in compared:
        if item.cell.engine == "elastic" and item.cell.dtype == "float32":
            groups.setdefault(lattice.same_bits(item.cell), []).append(item)
    return [
        {
            "name": first.name,
            "worlds": sorted({item.cell.world for item in items}),
            "cells": len(items),
            "sha256": sorted({item.sha256 for item in items}),
            "passed": len({item.sha256 for item in items}) == 1 and bool(items[0].sha256),
        }
        for first, items in groups.items()
    ]


def _cost(world: int, inputs: Path, folder: Path) -> dict[str, float]:
    """Seconds a step of DDP and elastic, in turn, twice: the median of a run's steps but the first two, the better of
    two runs; and their ratio."""
    shutil.rmtree(folder / "cost", ignore_errors=True)
    names = ("ddp-a", "elastic-a", "ddp-b", "elastic-b")
    trees = [lattice.cost_tree(name[:-2], world, inputs, folder / "cost" / f"{name}-{world}") for name in names]
    seconds: dict[str, float] = {}
    for name, outcome in zip(names, train_all(trees, world, folder), strict=True):
        log = outcome.run_dir / "log.jsonl"
        steps = [json.loads(line)["seconds"] for line in log.read_text(encoding="utf-8").splitlines()]
        seconds[name[:-2]] = min(seconds.get(name[:-2], float("inf")), statistics.median(steps[2:]))
    return {**seconds, "ratio": seconds["elastic"] / seconds["ddp"]}


def _certificate(
    cover: Cover, compared: Sequence[Compared], refused: Counter[str], elastic: dict[str, Any]
) -> dict[str, Any]:
    failures = [f"{item.cell.name}: {item.error or _numbers(item)}" for item in compared if not item.passed]
    failures += [f"{group['name']}: bits differ between ranks" for group in elastic["hashes"] if not group["passed"]]
    if not elastic.get("chain", {"passed": True})["passed"]:
        failures.append("elastic chain: the killed run ends in other bits, or a kill came too late")
    return {
        "kind": "invariance",
        "subject": f"invariance lattice, {cover}, {len(compared)} cells",
        "passed": not failures,
        "failures": failures,
        "tolerance": TOLERANCE,
        "bf16_tolerance": BF16_TOLERANCE,
        "steps": lattice.STEPS,
        "versions": versions(),
        "sources": sources_hash(),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, CPU ranks over gloo",
        "cells": [item.as_dict() for item in compared],
        "refused": [{"cells": count, "reason": reason} for reason, count in refused.most_common()],
        "elastic": elastic,
    }


def _text(certificate: dict[str, Any]) -> str:
    """JSON with a line for each cell, of which the whole lattice has thousands."""
    rest = json.dumps({**certificate, "cells": []}, indent=1)
    cells = ",\n".join(f"  {json.dumps(cell)}" for cell in certificate["cells"])
    return rest.replace('"cells": []', f'"cells": [\n{cells}\n ]', 1) + "\n"


def _numbers(item: Compared) -> str:
    return f"loss {item.loss:.1e}, norm {item.grad_norm:.1e}, weights {item.weights:.1e} off"


def _say(where: str, item: Compared) -> None:
    verdict = "ok    " if item.passed else "FAILED"
    print(f"{verdict} {where}: {item.cell.name}, {item.error or _numbers(item)}, {item.seconds:.1f} s", file=sys.stderr)
