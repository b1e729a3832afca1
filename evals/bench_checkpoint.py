"""`shipyard bench checkpoint`: what a save costs the training beside it, and what `torch.save` of the same state costs.

One rank trains a model of launch/shapes from random weights on random rows, with the loop's own parts. Blocks of plain
steps and blocks of steps during which a save is on its way take turns, so that what else the machine does shows in
both: a save's extra time is its block's, less that of as many steps at the mean pace of the blocks before and after.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..training.checkpoint import Saver
from ..training.dataset import Sample
from ..training.manifest import fsync_path
from ..training.models import load_model
from ..training.optim import build_optimizer
from ..training.parallel import build_engine
from ..training.ranks import start
from ..training.recipe import parse_recipe
from ..training.sft import SupervisedTuning
from ..training.step import run_step
from .bench_train import machine, put_section, versions

BAR = 0.05
PLAIN_STEPS = 5
BATCHES = {"cpu": (4, 4, 128), "cuda": (16, 8, 1024)}
"""Rows in a step, rows in a forward pass, tokens in a row."""
LIMITS_MB_PER_S = (0, 64)
"""Of `checkpoints.max_mb_per_s`: none, and one at which two cores that train spare what writing takes."""


@dataclass(frozen=True)
class Block:
    """Steps in a row: seconds by the clock, and of processors that a virtual machine's host took for itself."""

    steps: int
    wall_s: float
    stolen_s: float


@dataclass(frozen=True)
class Save:
    """A save, and the steps during which it was on its way beside as many plain ones."""

    held_s: float
    took_s: float
    steps: int
    extra_s: float
    writer_cpu_s: float
    stolen_s: float


@dataclass(frozen=True)
class Costs:
    """What was measured of one shape; the first save also gets the memory for its copy."""

    title: str
    state_gb: float
    tokens: int
    plain_s: Sequence[float]
    saves: Sequence[Save]
    peer_s: Sequence[float]
    loads: Sequence[float]


class Training:
    """One rank that trains, and its saver."""

    def __init__(self, shape: str, folder: Path, max_mb_per_s: int) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        size, micro, self.row_tokens = BATCHES[device]
        dtype = "bfloat16" if device == "cuda" else "float32"
        model = {"name": "scratch", "shape": shape, "dtype": dtype}
        tree = {"method": "sft", "steps": 1 << 20, "data": {"train": "none"}, "batch": {"size": size, "micro": micro}}
        self.recipe = parse_recipe({**tree, "model": model, "checkpoints": {"max_mb_per_s": max_mb_per_s}})
        scratch = load_model(self.recipe.model, trains_all=True, seed=self.recipe.seed)
        self.engine = build_engine(start(self.recipe), scratch, build_optimizer(self.recipe, scratch), self.recipe)
        self.method = SupervisedTuning(self.recipe, _rows(4 * size, self.row_tokens, scratch.config.vocab_size))
        self.saver = Saver(self.engine.ranks, folder, self.recipe.checkpoints, 600)
        self.step = 0

    def train(self, more: Callable[[int], bool]) -> Block:
        """Take steps for as long as `more` says of their number that one more is due."""
        wall, stolen, first = time.perf_counter(), _stolen_s(), self.step
        while more(self.step - first):
            run_step(self.recipe, self.engine, self.method, self.step, 1 << 20, before_update=self.saver.settle)
            self.step += 1
        return Block(self.step - first, time.perf_counter() - wall, _stolen_s() - stolen)

    def train_beside_save(self) -> Block:
        """Begin a save and take steps until it is written; `saver` has its numbers."""
        wall, stolen = time.perf_counter(), _stolen_s()
        self.saver.save(self.engine, self.step, {}, {})
        steps = self.train(lambda done: done == 0 or self.saver.on_its_way).steps
        self.saver.finish()
        return Block(steps, time.perf_counter() - wall, _stolen_s() - stolen)

    def state(self) -> dict[str, torch.Tensor]:
        """What a save writes."""
        fragments = self.engine.fragments()
        return {f"{part}/{f.name}": tensor for f in fragments for part, tensor in f.tensors.items()}


def bench_checkpoint(out: Path, shape: str = "smollm2-135m", rounds: int = 3) -> str:
    """Measure, put the shape's sections into the page `out`, return them. Raises ValueError for an unknown shape."""
    setting, sections = f"{machine()}; {versions(None)}", list[str]()
    for limit in LIMITS_MB_PER_S:
        sections.append(_section(measure(shape, rounds, limit), setting))
        put_section(out, INTRODUCTION, sections[-1])
    return "\n".join(sections)


def measure(shape: str, rounds: int, max_mb_per_s: int) -> Costs:
    """One first save and `rounds` more, plain steps between them, then `rounds` times torch.save."""
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=".") as folder:
        training = Training(shape, Path(folder), max_mb_per_s)
        training.train(lambda done: done < 2)  # the first steps get memory for all later ones
        loads = [os.getloadavg()[0]]
        before = training.train(lambda done: done < PLAIN_STEPS)
        plain, saves = [before], []
        for _ in range(rounds + 1):
            block = training.train_beside_save()
            after = training.train(lambda done, wanted=max(PLAIN_STEPS, block.steps): done < wanted)
            saves.append(_save(training.saver, block, before, after))
            plain.append(after)
            before = after
            loads.append(os.getloadavg()[0])
        state = training.state()
        peer_s = [_torch_save(state, Path(folder) / "state.pt") for _ in range(rounds)]
    device = training.engine.ranks.device
    limit = f", at most {max_mb_per_s} MB/s" if max_mb_per_s else ""
    card = f" on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return Costs(
        title=f"{shape}{card}{limit}",
        state_gb=sum(4 * tensor.numel() for tensor in state.values()) / 1e9,
        tokens=training.recipe.batch.size * training.row_tokens,
        plain_s=[block.wall_s / block.steps for block in plain],
        saves=saves,
        peer_s=peer_s,
        loads=loads,
    )


def _save(saver: Saver, block: Block, before: Block, after: Block) -> Save:
    wall_s, stolen_s = (
        statistics.mean(getattr(plain, clock) / plain.steps for plain in (before, after)) * block.steps
        for clock in ("wall_s", "stolen_s")
    )
    extra_s, extra_stolen_s = block.wall_s - wall_s, block.stolen_s - stolen_s
    return Save(saver.held_s, saver.took_s, block.steps, extra_s, saver.writer_cpu_s, extra_stolen_s)


def _stolen_s() -> float:
    """Seconds of all processors since the machine's start (proc(5), /proc/stat: steal)."""
    path = Path("/proc/stat")
    return int(path.read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK") if path.is_file() else 0.0


def _torch_save(state: dict[str, torch.Tensor], path: Path) -> float:
    began = time.perf_counter()
    torch.save(state, path)
    fsync_path(path)
    return time.perf_counter() - began


def _rows(count: int, tokens: int, vocabulary: int) -> list[Sample]:
    ids = np.random.default_rng(0).integers(0, vocabulary, (count, tokens), dtype=np.int32)
    targets = np.arange(tokens) > 0
    return [Sample(f"row {number}", row, targets) for number, row in enumerate(ids)]


INTRODUCTION = f"""# What a save costs the training beside it

Written by `shipyard bench checkpoint`; do not edit. One rank trains a model of launch/shapes in fp32 (on a GPU: bf16
with fp32 weights) and saves weights and both Adam moments in the background. Plain steps and steps during which a save
is on its way take turns.

- *Took* is from the call to the committed checkpoint: copied, hashed, written, synced to disk.
- *Stood still* is what the loop waited for: the call, and before the next update the rest of the copy.
- *Extra* is how much longer the steps took than as many plain ones: the standing still, and what copying, hashing and
  writing took from training. A GPU's host has cores to spare for these; training on a CPU uses every core, and the
  writer competes with it.
- *CPU* is what the writer's thread used. *Stolen* is what the host of a virtual machine took of its processors beyond
  plain steps: where the disk is a program on that host, what is written to it costs this, whoever writes.

The bar is {BAR:.0%} of the save's own time. Where training leaves no core to the writer, `checkpoints.max_mb_per_s`
spreads what it takes over more steps; the run's last save, one before an exit and one that another waits for are
written without that limit. The first save also gets the memory for the copy.
"""


def _section(costs: Costs, setting: str) -> str:
    later = costs.saves[1:]
    plain_s = statistics.median(costs.plain_s)
    peer_s = statistics.median(costs.peer_s)
    lines = [
        f"## {costs.title}",
        "",
        f"{costs.state_gb:.2f} GB in a save; {costs.tokens} tokens in a step. {setting}. Load of the machine "
        f"{min(costs.loads):.1f} to {max(costs.loads):.1f}. A plain step: {plain_s:.3g} s, medians of blocks from "
        f"{min(costs.plain_s):.3g} to {max(costs.plain_s):.3g}.",
        "",
        "| save | took s | stood still s | share | steps meanwhile | extra s | share | CPU s | stolen s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_row("first" if not number else str(number + 1), save) for number, save in enumerate(costs.saves)),
        f"| `torch.save`, fsync | {peer_s:.2f} | {peer_s:.2f} | 100.0 % | 0 | {peer_s:.2f} | 100.0 % | | |",
        "",
        verdict(later),
        "",
    ]
    return "\n".join(lines)


def _row(name: str, save: Save) -> str:
    return (
        f"| {name} | {save.took_s:.2f} | {save.held_s:.3f} | {save.held_s / save.took_s:.1%} | {save.steps} | "
        f"{save.extra_s:.2f} | {save.extra_s / save.took_s:.1%} | {save.writer_cpu_s:.2f} | "
        f"{save.stolen_s:.2f} |"
    )


def verdict(saves: Sequence[Save]) -> str:
    """Both halves of the bar, medians over saves."""
    held, extra = (
        statistics.median(getattr(save, number) / save.took_s for save in saves) for number in ("held_s", "extra_s")
    )
    met = {share: "met" if share < BAR else "missed" for share in (held, extra)}
    return (
        f"Saves after the first, medians: the loop stood still for {held:.1%} of a save's own time (the bar is "
        f"{BAR:.0%}: {met[held]}), all it lost was {extra:.1%} ({met[extra]})."
    )
