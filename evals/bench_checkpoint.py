"""What a checkpoint costs the loop: seconds it stands still, beside torch.save of the same state.

`python -m shipyard.evals.bench_checkpoint [SHAPE]`: the weights and both Adam moments of a model of launch/shapes, from
random numbers, saved three times in the background, once by torch.save. The first save also makes the host's copy.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

from ..training.checkpoint import Saver
from ..training.engine import Engine
from ..training.manifest import fsync_path
from ..training.models import load_model
from ..training.optim import build_optimizer
from ..training.ranks import start
from ..training.recipe import Recipe, parse_recipe

SAVES = 3


def bench_checkpoint(shape: str) -> str:
    """Time saves of a shape's whole training state on one rank; return a line per save."""
    recipe = parse_recipe(
        {"method": "sft", "steps": 1, "data": {"train": "none"}, "model": {"name": "scratch", "shape": shape}}
    )
    engine = _engine(recipe)
    state = {
        f"{part}/{fragment.name}": tensor
        for fragment in engine.fragments()
        for part, tensor in fragment.tensors.items()
    }
    size = sum(4 * tensor.numel() for tensor in state.values())
    lines = [f"{shape}: {size / 1e9:.2f} GB of fp32 weights and moments"]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        saver = Saver(engine.ranks, Path(folder), recipe.checkpoints, 600)
        for number in range(SAVES):
            saver.save(engine, number + 1, {}, {})
            held_s = saver.held_s
            saver.finish()
            lines.append(f"save {number + 1}: the loop stood still {held_s:.2f} s, the save took {saver.took_s:.2f} s")
        began = time.perf_counter()
        torch.save(state, Path(folder) / "state.pt")
        fsync_path(Path(folder) / "state.pt")
        peer_s = time.perf_counter() - began
    lines.append(f"torch.save and fsync: {peer_s:.2f} s, all of it standing still: {peer_s / held_s:.0f} times as long")
    lines.append(f"under 5 % of the loop if saves are {20 * held_s:.0f} s apart or more")
    return "\n".join(lines)


def _engine(recipe: Recipe) -> Engine:
    """An engine after one optimizer step, whose gradients are the weights themselves."""
    model = load_model(recipe.model, trains_all=True, seed=recipe.seed)
    engine = Engine(start(recipe), model, build_optimizer(recipe, model), recipe)
    for parameter in engine.trainable:
        parameter.grad = parameter.detach().clone()
    engine.step(1e-3)
    return engine


if __name__ == "__main__":
    print(bench_checkpoint(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"))
