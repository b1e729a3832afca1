"""One line a step: on the terminal, in log.jsonl, and where the recipe asks in TensorBoard or Weights & Biases."""

import json
import os
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from .recipe import Recipe, dump_recipe

COLUMNS = {
    "loss": "{:.4f}",
    "lr": "{:.2e}",
    "grad_norm": "{:.3f}",
    "tokens_per_s": "{:.0f} tok/s",
    "mfu": "mfu {:.1%}",
    "memory_gib": "{:.2f} GiB",
}
DENSE_BF16_FLOPS = {
    "H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10": 125e12, "4090": 165e12, "3090": 71e12, "MI300X": 1307e12,
}  # fmt: skip


class StepLog:
    """Writes steps. Only the first rank makes one that writes; the others' say nothing."""

    def __init__(self, recipe: Recipe, run_dir: Path, steps: int, first: bool, console: Console | None = None) -> None:
        self.first, self.steps, self.every = first, steps, recipe.log.every_steps
        self.console = console or Console(highlight=False)
        self.path = run_dir / "log.jsonl"
        self.tensorboard = self.wandb = None
        if first and recipe.log.tensorboard:
            self.tensorboard = _tensorboard(run_dir)
        if first and recipe.log.wandb:
            self.wandb = _wandb(recipe, run_dir)

    def forget_from(self, step: int) -> None:
        """Drop logged steps after `step`: a run that resumes does them again."""
        if self.first and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            draft = self.path.with_suffix(".tmp")
            draft.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            draft.replace(self.path)

    def say(self, text: str) -> None:
        """Print one line on the first rank."""
        if self.first:
            self.console.print(text, soft_wrap=True, markup=False)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Log finished step `step` (from 1)."""
        if not self.first:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if step % self.every == 0 or step == self.steps:
            named = [f"{_title(key)}{form.format(values[key])}" for key, form in COLUMNS.items() if key in values]
            extra = [f"{key} {values[key]:.3f}" for key in values if key not in COLUMNS and key not in _UNPRINTED]
            self.say(f"step {step:>{len(str(self.steps))}}/{self.steps}  " + "  ".join(named + extra))
        if self.tensorboard:
            for key, value in values.items():
                self.tensorboard.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(dict(values), step=step)

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


_UNPRINTED = ("seconds", "tokens", "supervised")


def _title(key: str) -> str:
    return f"{key} " if key in ("loss", "lr", "grad_norm") else ""


@contextmanager
def progress(title: str, total: int, console: Console | None = None, first: bool = True) -> Iterator[Any]:
    """Show a bar on a terminal; yield a function that advances it by n (1). Says nothing elsewhere."""
    console = console or Console()
    if not first or not console.is_terminal:
        yield lambda n=1: None
        return
    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*parts, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n=1: bar.advance(task, n)


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank so far, in GiB: the GPU's where there is one, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Dense matrix-multiply FLOP/s of this rank: a GPU's published bf16 figure, or a CPU's, timed for a moment."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((value for key, value in DENSE_BF16_FLOPS.items() if key in name), 312e12)
    side = 1024
    a, b = torch.ones(side, side, dtype=dtype), torch.ones(side, side, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def flops_per_token(model: nn.Module) -> float:
    """Forward and backward FLOPs of one token: 2 a weight forward, 2 for the gradient of its input, 2 more for its own
    gradient if it is trained (attention's quadratic part is left out, so MFU is understated on long documents)."""
    total = 0.0
    for name, parameter in model.named_parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        if hasattr(parameter, "quant_state") and parameter.quant_state is not None:  # pyright: ignore
            count = parameter.quant_state.shape.numel()  # pyright: ignore
        if "embed_tokens" not in name:
            total += count * (6 if parameter.requires_grad else 4)
    return total


def _tensorboard(run_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("log.tensorboard: tensorboard is not installed; pip install 'shipyard-llm[track]'") from None
    return SummaryWriter(str(run_dir / "tensorboard"))


def _wandb(recipe: Recipe, run_dir: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError("log.wandb: wandb is not installed; pip install 'shipyard-llm[track]'") from None
    os.environ.setdefault("WANDB_SILENT", "true")
    return wandb.init(project=recipe.log.wandb, dir=str(run_dir), config={"recipe": dump_recipe(recipe)})
