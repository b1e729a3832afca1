"""DeepSpeed's checkpoint directories: what any ZeRO stage saved is read, its universal layout is written.

Both are pickles because DeepSpeed's format is one. They are read with torch's `weights_only` and stand-ins for the few
classes that DeepSpeed puts into them, so none of its code runs or has to be there; a file that names anything else is
refused. What is written holds tensors and plain containers.

Read are `engine.save_checkpoint`'s files: every rank's flat fp32 partition of each group of parameters and Adam's
moments beside it. A partition becomes our fragments as it is. Written is what `ds_to_universal` makes (Lian et al.
2024, Universal Checkpointing): a directory per parameter with whole tensors, which an engine of any stage on any number
of ranks takes with `"checkpoint": {"load_universal": true}` in its configuration. Of buffers, both hold
routers' biases. Frozen weights and learning rates are in neither; they come from the model and the recipe.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from . import experts
from .checkpoint import METHOD, newest
from .manifest import Manifest, new_directory, verify
from .shard import INDEX, StoredFragments, key_of, write_shard

OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MOMENTS = ("exp_avg", "exp_avg_sq")
LAYOUT_VERSION = "0.19.8"
"""The version of DeepSpeed whose layout is written. Its readers ask for one, and refuse what is older than 0.3.17."""


class _Opaque:
    """Stands for a loss scaler, whose numbers nothing here needs."""


class _Stage(int):
    """Stands for ZeroStageEnum."""


class _Address:
    """Stands for fragment_address: where in a partition a parameter's range lies."""

    numel: int
    start: int


STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}


def _member(kind: type, name: str) -> _Stage:
    """Stands for getattr, by which early releases of Python 3.11 pickle an enum's member: of ZeroStageEnum alone."""
    if kind is not _Stage or name not in STAGES:
        raise ValueError(f"it asks for {name!r} of {kind!r}, which DeepSpeed's own checkpoints do not")
    return _Stage(STAGES[name])


KNOWN_CLASSES: dict[str, Callable[..., Any]] = {
    "builtins.getattr": _member,
    "deepspeed.runtime.zero.config.ZeroStageEnum": _Stage,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Opaque,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Opaque,
    "deepspeed.utils.tensor_fragment.fragment_address": _Address,
}


@dataclass(frozen=True)
class _Fragment:
    """A range of a flattened parameter, and where it begins in its group's flat partition."""

    name: str
    start: int
    length: int
    group: int
    at: int


def import_deepspeed(source: Path, run_dir: Path) -> Path:
    """Make a new run directory of a DeepSpeed checkpoint; return its one checkpoint, `run_dir/step-NNNNNN`.

    `source` is what `save_checkpoint` was given, or the directory of one tag in it. The first run that takes the
    checkpoint up makes it its own, whatever its recipe; it goes on with the batch after DeepSpeed's last step.
    Raises ValueError, with nothing left behind, for what is damaged, incomplete or not Adam's.
    """
    if run_dir.exists() and any(run_dir.iterdir()):
        raise ValueError(f"out: {run_dir} is not empty; name a new run directory")
    folder = _tag_directory(source)
    model, files = _model_states(folder), _optimizer_files(folder)
    shapes = {name: tuple(shape) for group in model["param_shapes"] for name, shape in group.items()}
    step = int(model["global_steps"])
    new = not run_dir.exists()
    about: dict[str, Any] = {
        "identity": None,
        "source": str(folder.resolve()),
        "step": step,
        "norms": [],
        "certificates": [],
    }
    ranges: dict[str, dict[str, list[tuple[str, int, int]]]] = {name: {} for name in shapes}
    reached = dict.fromkeys(shapes, 0)
    updates: set[int] = set()
    try:
        with new_directory(run_dir / f"step-{step:06d}", about) as scratch:
            if biases := experts.state_of_buffers(_buffers(model)):
                save_file(biases, scratch / METHOD)
            for rank, path in enumerate(files):
                state = _load(path)["optimizer_state_dict"]
                stage, flat, taken = _flat_groups(state, path, len(files))
                updates |= taken
                tensors: dict[str, Tensor] = {}
                pieces = (
                    _pieces_3(model["param_shapes"], rank, len(files)) if stage == 3 else _pieces_12(state, reached)
                )
                for piece in pieces:
                    for part, whole in flat[piece.group].items():
                        tensors[key_of(piece.name, part, piece.start)] = whole[piece.at : piece.at + piece.length]
                        entry = (f"rank-{rank:05d}.safetensors", piece.start, piece.length)
                        ranges[piece.name].setdefault(part, []).append(entry)
                    reached[piece.name] = piece.start + piece.length
                write_shard(scratch / f"rank-{rank:05d}.safetensors", tensors)
                about |= {"engine": f"zero{stage}", "world_size": len(files)}
            _refuse_holes(folder, shapes, ranges)
            if len(updates) != 1:
                raise ValueError(
                    f"model: {folder} counts {sorted(updates)} optimizer steps; ranks differ, save it again"
                )
            about["updates"] = updates.pop()
            (scratch / INDEX).write_text(json.dumps({"shapes": shapes, "ranges": ranges}), encoding="utf-8")
    except BaseException:
        if new:
            with suppress(OSError):
                run_dir.rmdir()
        raise
    return run_dir / f"step-{step:06d}"


def export_deepspeed(source: Path, out_dir: Path) -> Path:
    """Write a checkpoint, or a run's newest, as a new directory in DeepSpeed's universal layout; return it.

    The receiver's configuration decides learning rates and decay: no group of parameters brings its own. ZeRO-3 of
    DeepSpeed 0.19 makes all groups share the tensor that counts steps, whoever wrote the files: with torch's AdamW and
    several groups give each state a copy after `load_checkpoint`, or the count runs ahead. Routers' biases lie in
    `mp_rank_00_model_states.pt`, which `load_checkpoint` leaves alone: a line on stderr says so. Raises ValueError when
    the checkpoint is damaged or its optimizer's state is not Adam's.
    """
    manifest = _checkpoint(source)
    stored, step = StoredFragments(manifest.path), int(manifest.about["step"])
    for name, parts in stored.ranges.items():
        if parts.keys() != {"value", *MOMENTS}:
            other = ", ".join(sorted(parts.keys() - {"value"})) or "nothing"
            raise ValueError(f"to: deepspeed holds exp_avg and exp_avg_sq of each weight; {name} has {other}")
    about = {"kind": "export", "to": "deepspeed", "source": str(manifest.path.resolve()), "certificates": []}
    with new_directory(out_dir, {**about, "source_digest": manifest.digest}) as scratch:
        tag = scratch / f"global_step{step}_universal"
        updates = torch.tensor(float(manifest.about["updates"]))
        for name, shape in stored.shapes.items():
            (tag / "zero" / name).mkdir(parents=True)
            torch.save(updates, tag / "zero" / name / "step.pt")
            for part in ("value", *MOMENTS):
                tensor = stored.read(name, part, 0, math.prod(shape))
                assert tensor is not None
                file = tag / "zero" / name / f"{'fp32' if part == 'value' else part}.pt"
                torch.save({"param": tensor.reshape(shape), "cat_dim": 0}, file)
        # Readers walk their groups and these side by side and stop at the shorter list; no model has more groups.
        groups = [{"params": []} for _ in stored.shapes]
        inner = {"state": {0: {"step": updates}}, "param_groups": groups[:1]}
        torch.save(
            {"param_groups": groups, "optimizer_state_dict": inner, "ds_version": LAYOUT_VERSION},
            tag / "zero" / "optimizer_state.pt",
        )
        method = manifest.path / METHOD
        buffers = experts.buffers_of_state(load_file(method) if method.is_file() else {})
        states = {**_exported_states(manifest, stored, step), "buffer_names": [*buffers]}
        torch.save({**states, "module": {**stored.whole(), **buffers}}, tag / "mp_rank_00_model_states.pt")
        # what ZeRO-3 asks for
        torch.save({**states, "module": buffers}, tag / "zero_pp_rank_0_mp_rank_00_model_states.pt")
        if buffers:
            print(
                f"export: DeepSpeed takes no buffer from a universal checkpoint; load the {len(buffers)} in "
                f"{tag.name}/mp_rank_00_model_states.pt's module with load_state_dict(..., strict=False)",
                file=sys.stderr,
            )
        (scratch / "latest_universal").write_text(tag.name, encoding="utf-8")
    return out_dir


def _exported_states(manifest: Manifest, stored: StoredFragments, step: int) -> dict[str, Any]:
    shapes = {name: torch.Size(shape) for name, shape in stored.shapes.items()}
    return {
        "global_steps": step,
        "skipped_steps": step - int(manifest.about["updates"]),
        "dp_world_size": int(manifest.about["world_size"]),
        "mp_world_size": 1,
        "param_shapes": [shapes],
        "shared_params": {},
        "lr_scheduler": None,
        "optimizer": None,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
        "ds_version": LAYOUT_VERSION,
    }


def _checkpoint(source: Path) -> Manifest:
    if (source / INDEX).is_file():
        return verify(source)
    run_dir = source.parent if source.name == "model" else source
    found, complaints = newest(run_dir)
    if found is None:
        why = complaints[0] if complaints else "it holds no step-NNNNNN"
        raise ValueError(f"model: {run_dir} has no checkpoint to export ({why}); give a run or RUN/step-NNNNNN")
    return found


def _tag_directory(source: Path) -> Path:
    latest = source / "latest"
    folder = source / latest.read_text(encoding="utf-8").strip() if latest.is_file() else source
    if folder.is_dir() and any(OPTIMIZER_FILE.fullmatch(path.name) for path in folder.iterdir()):
        return folder
    raise ValueError(
        f"model: {folder} holds no *_optim_states.pt of DeepSpeed ZeRO; give the directory that save_checkpoint wrote"
    )


def _model_states(folder: Path) -> Mapping[str, Any]:
    path = next((p for p in sorted(folder.glob("*mp_rank_00_model_states.pt"))), None)
    if path is None:
        raise ValueError(f"model: {folder} holds no mp_rank_00_model_states.pt; copy it from where it was saved")
    model = _load(path)
    if int(model.get("mp_world_size", 1)) != 1 or list(folder.glob("*mp_rank_01_*")):
        raise ValueError(f"model: {folder} was saved with tensor or pipeline parallelism; only ZeRO alone is read")
    if odd := [name for name in _buffers(model) if not name.endswith(f".{experts.BIAS}")]:
        raise ValueError(f"model: {folder} holds the buffer {odd[0]}, for which we have no place; train without it")
    return model


def _buffers(model: Mapping[str, Any]) -> dict[str, Tensor]:
    """What DeepSpeed saved beside the parameters, by name."""
    return {name: model["module"][name] for name in model.get("buffer_names") or ()}


def _optimizer_files(folder: Path) -> list[Path]:
    """Every rank's file, in order of rank."""
    found = {int(m[1]): p for p in folder.iterdir() if (m := OPTIMIZER_FILE.fullmatch(p.name))}
    files = [path for _, path in sorted(found.items())]
    if sorted(found) != list(range(len(found))):
        missing = min(set(range(max(found))) - found.keys())
        raise ValueError(f"model: {folder} lacks the optimizer file of rank {missing}; copy it from where it was saved")
    return files


def _load(path: Path) -> dict[str, Any]:
    """Unpickle with nothing but tensors, containers and KNOWN_CLASSES. Raises ValueError that names any other class."""
    try:
        odd = sorted(set(get_unsafe_globals_in_checkpoint(str(path))) - KNOWN_CLASSES.keys())
        if not odd:
            with safe_globals([(stand_in, name) for name, stand_in in KNOWN_CLASSES.items()]):
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"model: {path} is damaged ({reason}); use another checkpoint") from error
    raise ValueError(
        f"model: {path} names the class {odd[0]}, which DeepSpeed's own checkpoints do not; save it again without it"
    )


def _flat_groups(state: Mapping[str, Any], path: Path, files: int) -> tuple[int, list[dict[str, Tensor]], set[int]]:
    """ZeRO's stage, for each group of parameters the flat partition of each part, and Adam's counts of steps."""
    stage, counts = int(state["zero_stage"]), state["partition_count"]
    if {*counts} != {files} if isinstance(counts, list) else counts != files:
        raise ValueError(f"model: {path} is one of {counts} partitions, {files} are here; copy the others too")
    if state.get("ds_zero_partition_groups"):
        raise ValueError(f"model: {path} partitions experts over groups of ranks, which is not read")
    inner = state["optimizer_state_dict"] if stage == 3 else state["base_optimizer_state"]
    values = state["fp32_flat_groups"] if stage == 3 else state["single_partition_of_fp32_groups"]
    moments = inner if isinstance(inner, list) else [inner["state"].get(group, {}) for group in range(len(values))]
    flat: list[dict[str, Tensor]] = []
    updates: set[int] = set()
    for group, (value, held) in enumerate(zip(values, moments, strict=True)):
        kept = {key: tensor for key, tensor in held.items() if isinstance(tensor, Tensor) and tensor.ndim}
        if kept.keys() != set(MOMENTS):
            raise ValueError(f"model: {path} has optimizer state {sorted(kept)} for group {group}; only Adam's is read")
        taken = held.get("step", state.get("base_optimizer_state_step"))
        if taken is None and isinstance(inner, dict):
            taken = inner["param_groups"][group].get("step")
        if taken is None:
            raise ValueError(f"model: {path} does not say how many steps Adam took, which its bias correction needs")
        updates.add(int(taken))
        flat.append({"value": value.detach().float(), **{part: kept[part].detach().float() for part in MOMENTS}})
    return stage, flat, updates


def _pieces_12(state: Mapping[str, Any], reached: Mapping[str, int]) -> Iterator[_Fragment]:
    """ZeRO-1 and 2 lay parameters end to end and cut that into equal partitions, the last one padded."""
    for group, addresses in enumerate(state["param_slice_mappings"]):
        for name, address in addresses.items():
            yield _Fragment(name, reached[name], address.numel, group, address.start)


def _pieces_3(shapes: list[Mapping[str, Any]], rank: int, ranks: int) -> Iterator[_Fragment]:
    """ZeRO-3 cuts every parameter into equal partitions, the last ones padded, and lays a rank's end to end."""
    for group, shapes_of_group in enumerate(shapes):
        at = 0
        for name, shape in shapes_of_group.items():
            width = -(-math.prod(shape) // ranks)
            length = max(0, min(width, math.prod(shape) - rank * width))
            if length:
                yield _Fragment(name, rank * width, length, group, at)
            at += width


def _refuse_holes(folder: Path, shapes: Mapping[str, tuple[int, ...]], ranges: Mapping[str, Any]) -> None:
    for name, shape in shapes.items():
        held = sum(length for _, _, length in ranges[name].get("value", ()))
        if held != math.prod(shape):
            raise ValueError(f"model: {folder} holds {held} of {math.prod(shape)} elements of {name}; save it again")
