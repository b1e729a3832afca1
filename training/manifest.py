"""Directories that are whole or absent: every file hashed, everything synced, the manifest renamed into place last.

A directory is *committed* when it holds `manifest.json`. A process killed at any instant leaves either no manifest (the
directory does not count) or a manifest whose hashes match what is on disk. Hashes are XXH3-128: they detect accidents
at memory speed; they are no defence against somebody who forges files.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 22
BLOCK_BYTES = 1 << 26
"""Large files also have a hash per 64 MiB, so that damage can be named as a range of bytes."""


@dataclass(frozen=True)
class Manifest:
    """What a committed directory holds. `about` is free: recipe hash, step, parent, certificate."""

    path: Path
    files: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Hash over every file's hash: equal digests mean equal directories."""
        lines = [f"{name} {entry['xxh3_128']}" for name, entry in sorted(self.files.items())]
        return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


class FileHash:
    """XXH3-128 of a file's bytes and XXH3-64 of each of its blocks, in one pass."""

    def __init__(self) -> None:
        self.bytes = 0
        self._whole, self._block = xxhash.xxh3_128(), xxhash.xxh3_64()
        self._blocks: list[str] = []

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes."""
        view = memoryview(data)
        self._whole.update(view)
        while len(view):
            room = BLOCK_BYTES - self.bytes % BLOCK_BYTES
            self._block.update(view[:room])
            self.bytes += len(view[:room])
            if self.bytes % BLOCK_BYTES == 0:
                self._blocks.append(self._block.hexdigest())
                self._block.reset()
            view = view[room:]

    def entry(self) -> dict[str, Any]:
        """What the manifest says of the file."""
        entry: dict[str, Any] = {"bytes": self.bytes, "xxh3_128": self._whole.hexdigest()}
        if self.bytes > BLOCK_BYTES:
            rest = [self._block.hexdigest()] if self.bytes % BLOCK_BYTES else []
            entry["blocks_xxh3_64"] = [*self._blocks, *rest]
        return entry


def hash_file(path: Path) -> dict[str, Any]:
    """Return the manifest's entry for a file: its size and hashes."""
    digest = FileHash()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.entry()


def fsync_path(path: Path) -> None:
    """Force a file or a directory entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(directory: Path, about: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]] | None = None) -> Manifest:
    """Hash and sync everything under `directory`, then rename its manifest into place.

    `known` has the entries of files that their writers have hashed and synced already.
    """
    names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    files: dict[str, Mapping[str, Any]] = {}
    for name in names:
        if name in (MANIFEST, MANIFEST + ".tmp"):
            continue
        if known and name in known:
            files[name] = known[name]
            continue
        fsync_path(directory / name)
        files[name] = hash_file(directory / name)
    draft = directory / (MANIFEST + ".tmp")
    with draft.open("w", encoding="utf-8") as file:
        json.dump({"files": files, "about": dict(about)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for folder in {directory, *(p for p in directory.rglob("*") if p.is_dir())}:
        fsync_path(folder)
    draft.rename(directory / MANIFEST)
    fsync_path(directory)
    return Manifest(directory, files, dict(about))


@contextmanager
def new_directory(path: Path, about: dict[str, Any]) -> Iterator[Path]:
    """Yield a scratch directory that becomes `path`, committed, when the block ends well; on any error nothing is left.

    `about` may be filled in inside the block. An existing directory at `path` is replaced only after the new one is
    committed. A full disk raises ValueError with the path and what to do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        commit(scratch, about)
        publish(scratch, path)
    except Exception as error:
        if disk_is_full(error):
            raise ValueError(f"disk: no space left while writing {path}; free some, or set another run_dir") from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def publish(scratch: Path, path: Path) -> None:
    """Give a committed directory its name; what had the name before goes only then."""
    previous = scratch.with_suffix(".old")
    if path.exists():
        path.rename(previous)
    scratch.rename(path)
    fsync_path(path.parent)
    shutil.rmtree(previous, ignore_errors=True)


def disk_is_full(error: Exception) -> bool:
    """safetensors reports a full disk in an exception of its own, with the kernel's number in its text."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full)


def read_manifest(directory: Path) -> Manifest:
    """Read a committed directory's manifest without hashing. Raises ValueError if it is not committed."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"manifest: {directory} holds no {MANIFEST}, so it was never finished; write it again")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(directory, tree["files"], tree["about"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"manifest: {path} is damaged; use the copy before it") from None


def verify(directory: Path) -> Manifest:
    """Re-hash a committed directory. Raises ValueError that names the first file which is not what was written."""
    manifest = read_manifest(directory)
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"manifest: {path} is missing; use the copy before it")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(f"manifest: {path} has {path.stat().st_size} bytes, {entry['bytes']} were written")
        found = hash_file(path)
        if found["xxh3_128"] != entry["xxh3_128"]:
            raise ValueError(
                f"manifest: {path} has changed since it was written (its hash differs{_where(found, entry)})"
            )
    return manifest


def _where(found: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """Which bytes differ, where blocks were hashed by themselves."""
    pairs = zip(found.get("blocks_xxh3_64", ()), entry.get("blocks_xxh3_64", ()), strict=True)
    spans = [f"{n * BLOCK_BYTES}-{(n + 1) * BLOCK_BYTES - 1}" for n, (is_, was) in enumerate(pairs) if is_ != was]
    return f" in bytes {', '.join(spans[:3])}" if spans else ""
