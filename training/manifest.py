"""Directories that are whole or absent: every file hashed, everything synced, the manifest renamed into place last.

A directory is *committed* when it holds `manifest.json`. A process killed at any instant leaves either no manifest (the
directory does not count) or a manifest whose hashes match what is on disk. Hashes are XXH3-128: they detect accidents
at memory speed; they are no defence against somebody who forges files. Beside each hash stand hashes of the file's
blocks and a syndrome, so that damage is named as a range of bytes, and one flipped bit as that bit.
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

from .syndrome import PIECE_BYTES, Syndrome, flipped_bit

MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 22
BLOCK_BYTES = 1 << 20


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


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file that a manifest lists. `spans` are ranges of bytes, first and last, that differ."""

    path: Path
    reason: str
    spans: tuple[tuple[int, int], ...] = ()
    flipped: tuple[int, int] | None = None
    """The byte and its bit that were flipped: proven, with it flipped back the file has its hash again."""

    def __str__(self) -> str:
        if self.flipped:
            where = f": bit {self.flipped[1]} of byte {self.flipped[0]} was flipped, and nothing else"
        else:
            spans = ", ".join(f"{first}-{last}" for first, last in self.spans[:3])
            more = f" and {len(self.spans) - 3} more ranges" if len(self.spans) > 3 else ""
            where = f" (its hash differs in bytes {spans}{more})" if spans else ""
        return f"manifest: {self.path} {self.reason}{where}"


class FileHash:
    """XXH3-128 of a file's bytes, XXH3-64 of each of its blocks, and its syndrome, in one pass over memory."""

    def __init__(self) -> None:
        self.bytes = 0
        self._syndrome = Syndrome()
        self._whole, self._block = xxhash.xxh3_128(), xxhash.xxh3_64()
        self._blocks: list[str] = []

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes."""
        view = memoryview(data)
        while len(view):
            piece = view[: PIECE_BYTES - self.bytes % PIECE_BYTES]
            for digest in (self._whole, self._block, self._syndrome):
                digest.update(piece)
            self.bytes += len(piece)
            if self.bytes % BLOCK_BYTES == 0:
                self._blocks.append(self._block.hexdigest())
                self._block.reset()
            view = view[len(piece) :]

    def entry(self) -> dict[str, Any]:
        """What the manifest says of the file."""
        entry: dict[str, Any] = {"bytes": self.bytes, "xxh3_128": self._whole.hexdigest()}
        entry["syndrome"] = self._syndrome.text()
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


def _hash_of_bytes(path: Path, flip: tuple[int, int] | None = None) -> str:
    """XXH3-128 of a file, or what it would be with one bit, (byte, bit), flipped."""
    digest, at = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := bytearray(file.read(CHUNK_BYTES)):
            if flip and at <= flip[0] < at + len(chunk):
                chunk[flip[0] - at] ^= 1 << flip[1]
            digest.update(chunk)
            at += len(chunk)
    return digest.hexdigest()


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
        tree = {"files": files, "about": dict(about)}
        json.dump({**tree, "xxh3_128": _hash_of(tree)}, file, indent=1)
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
        if disk_is_full(error) or _has_no_room(scratch, error):
            raise ValueError(f"disk: no space left while writing {path}; free some, or write elsewhere") from error
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


def _has_no_room(scratch: Path, error: Exception) -> bool:
    """numpy's tofile and torch.save name no number of the kernel's, so the disk itself is asked."""
    return isinstance(error, OSError | RuntimeError) and shutil.disk_usage(scratch).free < PIECE_BYTES


def read_manifest(directory: Path) -> Manifest:
    """Read a committed directory's manifest without hashing. Raises ValueError if it is not committed."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"manifest: {directory} holds no {MANIFEST}, so it was never finished; write it again")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        own = tree.pop("xxh3_128", None)  # manifests of older versions have none
        if tree.keys() == {"files", "about"} and own in (None, _hash_of(tree)):
            return Manifest(directory, tree["files"], tree["about"])
    except (ValueError, AttributeError, TypeError):
        pass
    raise ValueError(f"manifest: {path} is damaged; use the copy before it")


def _hash_of(tree: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(tree, sort_keys=True).encode())


def verify(directory: Path) -> Manifest:
    """Re-hash a committed directory. Raises ValueError that names the first file which is not what was written."""
    manifest = read_manifest(directory)
    for damage in damages(manifest):
        raise ValueError(str(damage))
    return manifest


def damages(manifest: Manifest) -> Iterator[Damage]:
    """Re-hash every file of a committed directory; what is wrong, where, one by one."""
    for name, entry in manifest.files.items():
        path = manifest.path / name
        if not path.is_file():
            yield Damage(path, "is missing; use the copy before it")
        elif path.stat().st_size != entry["bytes"]:
            yield Damage(path, f"has {path.stat().st_size} bytes, {entry['bytes']} were written")
        elif _hash_of_bytes(path) != entry["xxh3_128"]:
            found = hash_file(path)
            flipped = flipped_bit(found["syndrome"], entry["syndrome"]) if "syndrome" in entry else None
            if flipped and _hash_of_bytes(path, flipped) != entry["xxh3_128"]:
                flipped = None
            yield Damage(path, "has changed since it was written", tuple(_spans(found, entry)), flipped)


def _spans(found: Mapping[str, Any], entry: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Which ranges of bytes differ; the whole file where blocks were not hashed by themselves."""
    known = entry.get("blocks_xxh3_64", ())
    if len(known) != -(-entry["bytes"] // BLOCK_BYTES) or len(known) < 2:
        yield 0, entry["bytes"] - 1
        return
    for number, (is_, was) in enumerate(zip(found["blocks_xxh3_64"], known, strict=True)):
        if is_ != was:
            yield number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, entry["bytes"]) - 1
