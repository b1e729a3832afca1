"""A run that is killed on two ranks, goes on on four, is killed again and ends on one: the bits of one that was not.

Real processes through `shipyard train`, SIGKILL to all of them at once, `deterministic: elastic`.
"""

import os
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ..training.checkpoint import committed, weights_hash
from .lattice import Cell, recipe_tree
from .lattice_ranks import ranks_command, ranks_environment

STEPS = 60
POLL_S = 0.005


@dataclass(frozen=True)
class Link:
    """One life of the run: how many ranks, the last committed step when it was killed (or ended), its exit code."""

    ranks: int
    until_step: int
    exit_code: int


@dataclass(frozen=True)
class Chain:
    """The undisturbed run's hash, the killed run's, and its lives."""

    undisturbed: str
    killed: str
    links: tuple[Link, ...]

    @property
    def passed(self) -> bool:
        kills = [link.exit_code == -signal.SIGKILL for link in self.links]
        return self.undisturbed == self.killed and all(kills[:-1]) and self.links[-1].exit_code == 0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def run_chain(inputs: Path, folder: Path, worlds: tuple[int, ...] = (2, 4, 1), steps: int = STEPS) -> Chain:
    """Train one recipe undisturbed on one rank, and once more on `worlds` in turn with a kill between two of them."""
    tree = recipe_tree(Cell("sft", "elastic", 1, 2, True, "none", False), inputs, folder / "undisturbed")
    tree |= {"steps": steps, "resume": "auto", "checkpoints": {"every_steps": 1}}
    folder.mkdir(parents=True)
    recipe = folder / "chain.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    _live(recipe, folder / "undisturbed", 1, None)
    links = [
        _live(recipe, folder / "killed", world, steps * (number + 1) // len(worlds) if world != worlds[-1] else None)
        for number, world in enumerate(worlds)
    ]
    hashes = [weights_hash(folder / run / f"step-{steps:06d}") for run in ("undisturbed", "killed")]
    return Chain(hashes[0], hashes[1], tuple(links))


def _live(recipe: Path, run_dir: Path, world: int, kill_at: int | None) -> Link:
    """Run until the end, or until step `kill_at` is committed and every process is killed."""
    command = ranks_command(world, "shipyard.launch.cli", "train", str(recipe), f"run_dir={run_dir}")
    with (run_dir.parent / f"{run_dir.name}-{world}.log").open("w", encoding="utf-8") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, env=ranks_environment(), start_new_session=True)
        while job.poll() is None:
            if kill_at is not None and max(committed(run_dir), default=0) >= kill_at:
                os.killpg(job.pid, signal.SIGKILL)
                break
            time.sleep(POLL_S)
        code = job.wait()
    return Link(world, max(committed(run_dir), default=0), code)
