"""Checkpoints: what was trained and the optimizer's state, in flat fragments, written by every rank at once.

A checkpoint is a directory `step-NNNNNN` of safetensors and JSON: a file of fragments per rank, an index of which range
of which parameter lies where, the method's own state, and the manifest, which is renamed into place last. Readers ask
for ranges, so any engine on any number of ranks reads what any other wrote. Batches are functions of (seed, step), so a
step number is all the rest of the state. Frozen weights are not stored.

All ranks must see one file system. They do not talk while they write: each leaves its file and then a note of its hash,
and the first rank, which waits for every note, commits. So a checkpoint can be written while training goes on. Nothing
writes weights and moments between two updates, so even the copy that is written is made while the next step's passes
run, and only its update waits for that (Mohan et al. 2021, CheckFreq, section 4.2).
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .direct import Pace
from .engine import Engine
from .manifest import Manifest, commit, disk_is_full, publish, read_manifest, verify
from .ranks import Ranks
from .recipe import Checkpoints
from .shard import INDEX, ShardImage, StoredFragments, key_of

STEP_DIRECTORY = re.compile(r"step-(\d{6,})")
METHOD = "method.safetensors"
POLL_S = 0.01
RESERVED_BYTES = 4096
APPEAR_S = 60.0


@dataclass
class _Note:
    """What one rank has to say of its file: the ranges in it, the shapes of their parameters, its hash."""

    file: str
    entry: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    ranges: dict[str, dict[str, list[tuple[str, int, int]]]] = field(default_factory=dict)


class Saver:
    """Writes the checkpoints of a run, one at a time, in the background if the recipe says so."""

    def __init__(self, ranks: Ranks, run_dir: Path, knobs: Checkpoints, timeout_s: float) -> None:
        self.ranks, self.run_dir, self.knobs, self.timeout_s = ranks, run_dir, knobs, timeout_s
        self.held_s = 0.0
        """Seconds for which training stood still for the last save, in `save` and `settle`; `took_s`: how long that
        save took in all; `writer_cpu_s`: what its thread used of a processor."""
        self.took_s = self.writer_cpu_s = 0.0
        self._thread: threading.Thread | None = None
        self._copied: futures.Future[ShardImage] | None = None
        self._failure, self._passes = "", False
        self._image: ShardImage | None = None
        self._hurry, self._pace = threading.Event(), Pace()
        # One name for all ranks that no earlier process used: leftovers of a killed save are not taken for this one's.
        self._attempt = int(ranks.sum({"attempt": float(time.time_ns() >> 10) if ranks.first else 0.0})["attempt"])
        if ranks.first:
            for stale in (*run_dir.glob(".step-*.tmp"), *run_dir.glob(".step-*.old")):
                shutil.rmtree(stale, ignore_errors=True)
        ranks.wait()

    @property
    def on_its_way(self) -> bool:
        """Whether this rank is writing."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, engine: Engine, step: int, extra: dict[str, Tensor], about: Mapping[str, Any]) -> None:
        """Begin to write `run_dir/step-NNNNNN` after `step` finished steps. Collective.

        `extra` is the method's own state. In the background it returns at once: call `settle` before anything writes
        weights or moments; `finish` says how it went. Raises what that does on every rank if this save or the one
        before failed; earlier checkpoints stay.
        """
        called = time.perf_counter()
        self.finish()
        began = time.perf_counter()
        note = _Note(_file_of(self.ranks.rank))
        held: dict[str, Tensor] = {}
        for fragment in engine.fragments():
            note.shapes[fragment.name] = list(fragment.shape)
            for part, tensor in fragment.tensors.items():
                key = key_of(fragment.name, part, fragment.start)
                held[key] = self._taken_off(key, tensor) if tensor.is_cuda and not fragment.live else tensor
                spans = note.ranges.setdefault(fragment.name, {}).setdefault(part, [])
                spans.append((note.file, fragment.start, len(tensor)))
        copy = partial(self._copy, held, _updated(self.ranks.device))
        whole = {**about, "step": step, "updates": engine.updates}
        extra = {key: tensor.detach().cpu().clone() for key, tensor in extra.items()}
        self._copied, self._hurry = futures.Future(), threading.Event()
        self._pace = Pace(self.knobs.max_mb_per_s * 1_000_000)
        self._thread = threading.Thread(
            target=self._write, args=(step, copy, self._copied, note, extra, whole, began), daemon=True
        )
        self._thread.start()
        if not self.knobs.background:
            self.finish()
        self.held_s = time.perf_counter() - called

    def settle(self) -> None:
        """Return when the save that is on its way, if any, has its copy: weights and moments may change from then on.

        The copy's failure is the save's, which `finish` tells.
        """
        if self._copied is not None:
            began = time.perf_counter()
            self._hurry.set()
            futures.wait([self._copied])
            self._copied = None
            self.held_s += time.perf_counter() - began

    def finish(self) -> None:
        """Return when the save that is on its way, if any, is committed. Collective.

        Raises ValueError if it failed, and OSError where a disk or the way to it failed a rank, which may pass: a job
        that ends so is started again, and goes on from the save before."""
        if self._thread is None:
            return
        self._pace.hurry.set()
        self._thread.join()
        self._thread = self._copied = None
        failure, self._failure = self._failure, ""
        all_ranks = self.ranks.sum({"failed": float(bool(failure)), "passes": float(self._passes)})
        self._passes = False
        if all_ranks["failed"]:
            kind = OSError if all_ranks["passes"] else ValueError
            raise kind(failure or "checkpoints: another rank could not write its part; see its message")

    def _taken_off(self, key: str, tensor: Tensor) -> Tensor:
        """A copy on the host of what the GPU has no room to keep: in the last save's image, which will be this one's,
        and begun only; the first time anywhere."""
        place = self._image.tensors.get(key) if self._image else None
        if place is None or len(place) != len(tensor):
            return tensor.to("cpu", torch.float32)
        return place.copy_(tensor, non_blocking=True)

    def _copy(self, held: dict[str, Tensor], updated: torch.cuda.Event | None) -> ShardImage:
        """All that is `held`, in memory that the next save will use again; on a GPU taken after `updated`, in a stream
        beside training's."""
        lengths = {key: len(tensor) for key, tensor in held.items()}
        if self._image is None or self._image.lengths != lengths:
            self._image = None  # makes room for the next
            self._image = ShardImage(lengths, pinned=updated is not None)
        if updated is None:
            self._image.fill(held, self._hurry)
        else:
            self._hurry.set()  # nothing is there to be hashed yet
            beside = torch.cuda.Stream(self.ranks.device)
            with torch.cuda.stream(beside):
                beside.wait_event(updated)
                self._image.fill(held, self._hurry)
            beside.synchronize()
        held.clear()  # what was made for the asking goes now, not when all is written
        return self._image

    def _write(
        self, step: int, copy: Callable[[], ShardImage], copied: futures.Future[ShardImage], note: _Note,
        extra: dict[str, Tensor], about: Any, began: float,
    ) -> None:  # fmt: skip
        try:
            copied.set_result(copy())
        except Exception as error:
            copied.set_exception(error)
        path = self.run_dir / f"step-{step:06d}"
        scratch = self.run_dir / f".{path.name}.{self._attempt}.tmp"
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            _reserve(scratch, self.ranks.rank)
            note.entry = copied.result().write(scratch / note.file, self._pace)
            _leave(scratch, self.ranks.rank, vars(note))
            if self.ranks.first:
                save_file(extra, scratch / METHOD)
                self._commit(scratch, path, about)
        except Exception as error:
            full = f"disk: no space left while writing {path}; free some, or set another run_dir"
            self._failure = full if disk_is_full(error) else str(error) or type(error).__name__
            broken = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            self._passes = (broken or "(os error " in str(error)) and not disk_is_full(error)
            with contextlib.suppress(OSError):  # the first rank took the directory away: it failed, too
                _leave(scratch, self.ranks.rank, {"failure": self._failure})
            if self.ranks.first:
                shutil.rmtree(scratch, ignore_errors=True)
        self.took_s, self.writer_cpu_s = time.perf_counter() - began, time.thread_time()

    def _commit(self, scratch: Path, path: Path, about: Mapping[str, Any]) -> None:
        """Wait for every rank's note, write the index, commit, and drop checkpoints that need not be kept."""
        known, shapes, ranges = {}, {}, {}
        for rank in range(self.ranks.world_size):
            said = _await_note(scratch, rank, self.timeout_s)
            if "failure" in said:
                raise ValueError(f"checkpoints: rank {rank}: {said['failure']}")
            known[said["file"]] = said["entry"]
            shapes |= said["shapes"]
            for name, parts in said["ranges"].items():
                for part, spans in parts.items():
                    ranges.setdefault(name, {}).setdefault(part, []).extend(spans)
        for note in scratch.glob("*.note"):
            note.unlink()
        (scratch / INDEX).write_text(json.dumps({"shapes": shapes, "ranges": ranges}), encoding="utf-8")
        commit(scratch, about, known)
        publish(scratch, path)
        self._drop(int(about["step"]))

    def _drop(self, newest: int) -> None:
        """Take away checkpoints up to the `newest` that need not be kept. What lies after it was damaged and passed
        over, and is no reason to drop what is whole. A bad step may go back to the last one of the schedule, so those
        that SIGTERM left do not push it out."""
        found = {step: path for step, path in committed(self.run_dir).items() if step <= newest}
        knobs = self.knobs
        kept = set(sorted(found)[-knobs.keep_last :])
        if knobs.every_steps:
            kept.add(newest - newest % knobs.every_steps)
        for step, path in found.items():
            if step not in kept and (not knobs.keep_every or step % knobs.keep_every):
                gone = path.with_name(f".{path.name}.{self._attempt}.old")  # half gone, it would still be read
                path.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)


def _updated(device: torch.device) -> torch.cuda.Event | None:
    """What to wait for before a GPU's weights are read from another stream."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _reserve(scratch: Path, rank: int) -> None:
    """Take the space in which a rank says that the disk is full, while there is some; without it the first rank, which
    waits for that note, would wait for all of its time limit. A rank that cannot even do this leaves an empty note."""
    draft = scratch / f"{rank}.draft"
    try:
        with draft.open("wb") as file:
            file.write(b" " * RESERVED_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            draft.rename(scratch / f"{rank}.note")
        raise


def _leave(scratch: Path, rank: int, said: Mapping[str, Any]) -> None:
    draft = scratch / f"{rank}.draft"
    with draft.open("r+b") as file:  # over what was reserved, so that a short note needs no room
        file.write(json.dumps(said).encode().ljust(RESERVED_BYTES))
        file.truncate()
    draft.rename(scratch / f"{rank}.note")


def _file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _await_note(scratch: Path, rank: int, timeout_s: float) -> dict[str, Any]:
    """What a rank has to say in the end, which may be late (`max_mb_per_s`) while its file grows."""
    path, file, until, seen = scratch / f"{rank}.note", scratch / _file_of(rank), 0.0, -1
    while not path.is_file():
        written = file.stat().st_size if file.is_file() else 0
        if written != seen:
            seen, until = written, time.monotonic() + timeout_s
        if time.monotonic() > until:
            raise ValueError(
                f"checkpoints: rank {rank} wrote nothing into {scratch.parent} for {timeout_s:g} s; "
                "run_dir must be on a file system that all ranks share"
            )
        time.sleep(POLL_S)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:  # what it had to say did not fit on the disk
        return {"failure": f"no space left while writing {scratch}"}


def newest(run_dir: Path) -> tuple[Manifest | None, list[str]]:
    """Return the newest intact checkpoint and a sentence for each damaged one that was passed over."""
    complaints: list[str] = []
    for _, path in sorted(_steps(run_dir).items(), reverse=True):
        try:
            return verify(path), complaints
        except ValueError as error:
            complaints.append(f"{error}; {path.name} is passed over")
    return None, complaints


def newest_for_all(ranks: Ranks, run_dir: Path) -> tuple[Manifest | None, list[str]]:
    """The same for every rank: the first one looks and hashes, the others wait until they see what it found.

    Collective. Raises ValueError on a rank that does not see the directory within a minute.
    """
    found, complaints = newest(run_dir) if ranks.first else (None, [])
    step = int(ranks.sum({"step": float(found.about["step"]) if found else 0.0})["step"])
    if ranks.first or not step:
        return found, complaints
    return _appeared(ranks, run_dir / f"step-{step:06d}"), complaints


def _appeared(ranks: Ranks, path: Path) -> Manifest:
    """The manifest of a checkpoint that the first rank has seen: a shared file system may show it later elsewhere."""
    until = time.monotonic() + APPEAR_S
    while time.monotonic() < until:
        try:
            return read_manifest(path)
        except ValueError:
            time.sleep(0.1)
    raise ValueError(
        f"run_dir: rank {ranks.rank} does not see {path}; put run_dir on a file system that all ranks share"
    )


def at_for_all(ranks: Ranks, run_dir: Path, step: int) -> Manifest | None:
    """The checkpoint after `step` steps if it is intact, the same for every rank. Collective."""
    found = None
    if ranks.first and (path := committed(run_dir).get(step)) is not None:
        with contextlib.suppress(ValueError):
            found = verify(path)
    there = ranks.sum({"there": float(found is not None)})["there"]
    return _appeared(ranks, run_dir / f"step-{step:06d}") if there else None


def restore(engine: Engine, manifest: Manifest, load_method: Callable[[dict[str, Tensor]], None]) -> int:
    """Load a checkpoint into the engine and the method, this rank's ranges only; return the number of finished steps.

    Raises ValueError when it was written for another model.
    """
    stored, wanted = StoredFragments(manifest.path), engine.shapes()
    if wanted != stored.shapes:
        odd = sorted(set(wanted.items()) ^ set(stored.shapes.items()))[0][0]
        raise ValueError(f"resume: {manifest.path} was written for another model ({odd}); set another run_dir")
    engine.load(stored.read, int(manifest.about["updates"]))
    if (path := manifest.path / METHOD).is_file():  # what was imported may have none
        load_method(load_file(path))
    return int(manifest.about["step"])


def weights_hash(directory: Path) -> str:
    """SHA-256 over a checkpoint's weights, fp32, in order of name: equal for equal weights, however they were cut."""
    digest = hashlib.sha256()
    for name, tensor in StoredFragments(directory).whole().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def committed(run_dir: Path) -> dict[int, Path]:
    """Checkpoints that were finished, by step; their hashes are not looked at."""
    return {step: path for step, path in _steps(run_dir).items() if (path / "manifest.json").is_file()}


def _steps(run_dir: Path) -> dict[int, Path]:
    found = ((STEP_DIRECTORY.fullmatch(path.name), path) for path in run_dir.glob("step-*"))
    return {int(match[1]): path for match, path in found if match and path.is_dir()}
