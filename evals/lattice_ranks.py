"""Real ranks that train many recipes one after the other, because starting processes costs more than five steps.

    python -m shipyard.evals.lattice_ranks RECIPES.jsonl      what each rank runs

Each line is a recipe; each is trained through the loop that `shipyard train` runs, from freshly loaded weights. Only
the process group is kept. The first rank says what is done, a JSON line each; a recipe that fails ends the processes,
and the caller starts new ones for those that are left.
"""

import contextlib
import gc
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training.exit_code import told

FRESH_CELLS = 4
"""Compiled models whose programs a process keeps: half of each is the same again, and torch allows a layer 32."""
CELLS_OF_A_PROCESS = 64
"""Then new ones take over: after some 200 compiled cells, collecting what they left takes longer than the next."""
RANKS_YAML = Path(__file__).parent.parent / "launch" / "accelerate" / "ranks.yaml"


@dataclass(frozen=True)
class Outcome:
    """What became of one recipe; `error` is the end of what the ranks had to say, empty if all went well."""

    run_dir: Path
    seconds: float
    error: str = ""


def train_all(trees: Sequence[dict[str, Any]], world: int, folder: Path) -> Iterator[Outcome]:
    """Train recipes on `world` processes, in order; yield each as it is done. A list and a log go into `folder`."""
    left = list(trees)
    while left:
        here = min(len(left), CELLS_OF_A_PROCESS)
        recipes, log = folder / f"recipes-{world}.jsonl", folder / f"ranks-{world}.log"
        recipes.write_text("".join(json.dumps(tree) + "\n" for tree in left[:here]), encoding="utf-8")
        command = ranks_command(world, "shipyard.evals.lattice_ranks", str(recipes))
        with log.open("w", encoding="utf-8") as errors:
            ranks = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=ranks_environment())
            assert ranks.stdout is not None
            began = time.perf_counter()
            try:
                for line in ranks.stdout:
                    if line.startswith("{"):
                        said = json.loads(line)
                        yield Outcome(Path(said["run_dir"]), said["seconds"])
                        left.pop(0)
                        here -= 1
                        began = time.perf_counter()
                code = ranks.wait()
            finally:
                ranks.terminate()
        if here:
            error = _last_words(log) or f"the ranks ended with exit code {code}"
            yield Outcome(Path(left.pop(0)["run_dir"]), time.perf_counter() - began, error)


def ranks_command(world: int, module: str, *arguments: str) -> list[str]:
    """A command line that starts `world` processes of a module; a single one without a launcher."""
    if world == 1:
        return [sys.executable, "-m", module, *arguments]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(RANKS_YAML)]
    return [*launcher, "--num_processes", str(world), "--main_process_port", "0", "-m", module, *arguments]


def ranks_environment() -> dict[str, str]:
    """One thread a rank: more ranks than cores is usual here, and the order of sums must not hang on the cores.

    torch keeps compiled adapters, too: what another cell left and does not fit would show in the comparison.
    """
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD": "1",
    }


def _last_words(log: Path) -> str:
    """The last exception that a rank printed, or the last line."""
    lines = [re.sub(r"^\[rank\d+\]: *", "", line) for line in log.read_text("utf-8", errors="replace").splitlines()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (raised or lines or [""])[-1][:400]


def main() -> None:
    """Train every recipe of the file, as one of its ranks."""
    import torch
    import torch.distributed as dist
    from torch._dynamo.utils import counters

    from ..launch.cli import _quiet_libraries
    from ..training.loop import train
    from ..training.recipe import parse_recipe

    _quiet_libraries()
    for number, line in enumerate(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines(), start=1):
        recipe = parse_recipe(json.loads(line))
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            run_dir = train(recipe)
        if recipe.model.compile:
            assert counters["stats"]["unique_graphs"], "nothing was compiled"
            counters.clear()
            if number % FRESH_CELLS == 0:
                torch._dynamo.reset()
        gc.collect()
        if number == 1:
            gc.freeze()  # the libraries, which take a third of a second to look through
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(json.dumps({"run_dir": str(run_dir), "seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    with told():
        main()
