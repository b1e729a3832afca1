"""Checkpoints: what was trained and its Adam moments, whole, in safetensors and JSON, committed last.

A checkpoint does not know the engine, the number of ranks or the ZeRO stage that wrote it: parameters are stored whole
by name, so any other cut of the job reads it. Batches and sampling are functions of (seed, step), so a step number is
all the rest of the state. Frozen weights are not stored but named by the hash of their source.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .engine import Engine
from .manifest import Manifest, new_directory, verify

STEP_DIRECTORY = re.compile(r"step-(\d{6,})")
PARTS = ("value", "exp_avg", "exp_avg_sq")


def save(
    engine: Engine, run_dir: Path, step: int, extra: dict[str, Tensor], about: dict[str, Any], keep_last: int
) -> Path:
    """Write `run_dir/step-NNNNNN` after `step` finished steps; `extra` is the method's own state. Collective; the first
    rank writes.

    The checkpoint before is deleted only after this one is committed. A full disk raises ValueError on every rank and
    leaves the earlier checkpoints as they were.
    """
    path = run_dir / f"step-{step:06d}"
    tensors: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, parts in engine.read():
        if engine.ranks.first:
            for part in PARTS:
                tensors[part][name] = parts[part].contiguous()
    failure = ""
    if engine.ranks.first:
        try:
            with new_directory(path, {**about, "step": step}) as scratch:
                for part in PARTS:
                    save_file(tensors[part], scratch / f"{part}.safetensors")
                save_file(extra, scratch / "method.safetensors")
            for old in sorted(_steps(run_dir).items())[:-keep_last]:
                shutil.rmtree(old[1])
        except Exception as error:
            failure = str(error) or type(error).__name__
    if engine.ranks.sum({"failed": float(bool(failure))})["failed"]:
        raise ValueError(failure or "checkpoints: the first rank could not write the checkpoint; see its message")
    return path


def newest(run_dir: Path) -> tuple[Manifest | None, list[str]]:
    """Return the newest intact checkpoint and a sentence for each damaged one that was passed over."""
    complaints: list[str] = []
    for _, path in sorted(_steps(run_dir).items(), reverse=True):
        try:
            return verify(path), complaints
        except ValueError as error:
            complaints.append(f"{error}; {path.name} is passed over")
    return None, complaints


def restore(engine: Engine, manifest: Manifest, load_method: Callable[[dict[str, Tensor]], None]) -> int:
    """Load a verified checkpoint into the engine and the method; return the number of finished steps. Collective."""
    loaded = {part: load_file(manifest.path / f"{part}.safetensors") for part in PARTS}
    wanted = {name for name, _ in engine.named_trainable()}
    if wanted != set(loaded["value"]):
        odd = sorted(wanted ^ set(loaded["value"]))[0]
        raise ValueError(f"resume: {manifest.path} was written for another model ({odd}); set another run_dir")
    step = int(manifest.about["step"])
    engine.write({name: {part: loaded[part][name] for part in PARTS} for name in wanted}, step)
    load_method(load_file(manifest.path / "method.safetensors"))
    return step


def weights_hash(engine: Engine) -> str:
    """SHA-256 over the trained weights in fp32, in order of name. Collective."""
    import hashlib

    digest = hashlib.sha256()
    for name, parts in sorted(engine.read(), key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(parts["value"].to(torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _steps(run_dir: Path) -> dict[int, Path]:
    found = ((STEP_DIRECTORY.fullmatch(path.name), path) for path in run_dir.glob("step-*"))
    return {int(match[1]): path for match, path in found if match and path.is_dir()}
