"""Files of flat fp32 ranges, in the safetensors format: written and hashed in one pass, read by range.

safetensors' own writer copies every tensor into one more buffer, and the file would have to be read again for its hash;
a checkpoint is the largest thing that a run writes, so this writer streams. Any safetensors reader reads what it wrote.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from .direct import PAGE_BYTES, DirectFile, Pace, aligned
from .manifest import Damage, FileHash, fsync_path
from .syndrome import PIECE_BYTES

INDEX = "index.json"
COPIED = PIECE_BYTES // 4
"""Numbers to copy at a time, of 4 bytes."""


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write 1-D fp32 CPU tensors to a new file and sync it; return its entry for the manifest."""
    assert all((t.dtype, t.ndim, t.is_contiguous()) == (torch.float32, 1, True) for t in tensors.values())
    header = memoryview(_header({key: len(tensor) for key, tensor in tensors.items()}))
    digest = FileHash()
    with DirectFile(path) as file:
        for data in (header, *(_bytes(tensor) for tensor in tensors.values())):
            for start in range(0, len(data), PIECE_BYTES):
                piece = data[start : start + PIECE_BYTES]
                digest.update(piece)
                file.write(piece)
    fsync_path(path.parent)
    return digest.entry()


class ShardImage:
    """A shard in memory as it will be in its file, for tensors of these lengths: it is written from where it lies.

    Where it is `pinned`, a GPU writes into it beside other work.
    """

    def __init__(self, lengths: Mapping[str, int], pinned: bool = False) -> None:
        self.lengths = dict(lengths)
        header = _header(lengths)
        count = len(header) + 4 * sum(lengths.values())
        self._memory = aligned(torch.empty(count + PAGE_BYTES, dtype=torch.uint8, pin_memory=pinned).numpy())
        self._memory[: len(header)] = header
        self._header_bytes, self._digest = len(header), FileHash()
        self.tensors: dict[str, Tensor] = {}
        """Views of the file's tensors, 1-D, fp32; to be filled."""
        at = len(header)
        for key, length in lengths.items():
            self.tensors[key] = torch.from_numpy(np.frombuffer(self._memory[at : at + 4 * length], np.float32))
            at += 4 * length

    def fill(self, tensors: Mapping[str, Tensor], hurry: threading.Event) -> None:
        """Copy all tensors, but those that are its own, and hash what was copied while a cache holds it.

        Once one is in a `hurry` hashing is left to `write`. So it has to be where a GPU copies: that is begun only, in
        the current stream.
        """
        self._digest, end = FileHash(), self._header_bytes
        for key, place in self.tensors.items():
            tensor = tensors[key]
            if tensor.is_cuda or tensor.dtype != place.dtype:
                place.copy_(tensor, non_blocking=True)
            elif tensor.data_ptr() != place.data_ptr():
                to, of = place.numpy(), tensor.numpy()
                for start in range(0, len(to), COPIED):  # on one core; torch would start as many threads as train
                    copied = slice(start, min(start + COPIED, len(to)))
                    to[copied] = of[copied]
                    if not hurry.is_set():
                        self._hash_until(end + 4 * copied.stop)
            end += 4 * len(place)

    def _hash_until(self, end: int) -> None:
        self._digest.update(self._memory[self._digest.bytes : end - end % PIECE_BYTES])

    def write(self, path: Path, pace: Pace | None = None) -> dict[str, Any]:
        """Write it to a new file and sync that; return its entry for the manifest."""
        self._digest.update(self._memory[self._digest.bytes :])
        with DirectFile(path, pace) as file:
            file.write(self._memory)
        fsync_path(path.parent)
        return self._digest.entry()


def _header(lengths: Mapping[str, int]) -> bytes:
    header: dict[str, Any] = {}
    at = 0
    for key, length in lengths.items():
        header[key] = {"dtype": "F32", "shape": [length], "data_offsets": [at, at + 4 * length]}
        at += 4 * length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(cast(Any, tensor.numpy())).cast("B") if len(tensor) else memoryview(b"")


class StoredFragments:
    """What a directory of shards holds, by parameter and part. Files are mapped, and read where asked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        tree = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in tree["shapes"].items()}
        self.ranges: Mapping[str, Mapping[str, Sequence[tuple[str, int, int]]]] = tree["ranges"]
        self._files: dict[str, Any] = {}

    def read(self, name: str, part: str, start: int, length: int) -> Tensor | None:
        """A flat range of a part of a parameter, fp32; None if the parameter was stored without that part."""
        if part not in self.ranges[name]:
            return None
        found = torch.empty(length, dtype=torch.float32)
        filled = 0
        for file, first, count in self.ranges[name][part]:
            low, high = max(start, first), min(start + length, first + count)
            if low < high:
                source = self._file(file).get_slice(key_of(name, part, first))
                found[low - start : high - start] = source[low - first : high - first]
                filled += high - low
        assert filled == length, f"{self.directory}: {name} {part} has a hole"
        return found

    def whole(self, part: str = "value") -> dict[str, Tensor]:
        """Every parameter's part, whole, in order of name."""
        found = {}
        for name in sorted(self.shapes):
            shape = self.shapes[name]
            tensor = self.read(name, part, 0, torch.Size(shape).numel())
            if tensor is not None:
                found[name] = tensor.reshape(shape)
        return found

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self.directory / name, framework="pt")  # pyright: ignore[reportCallIssue]
        return self._files[name]


def key_of(name: str, part: str, start: int) -> str:
    """The key of a fragment in its file."""
    return f"{part}/{name}@{start}"


def damaged_tensors(damage: Damage) -> list[str]:
    """The tensors of a damaged safetensors file that the damage may lie in; empty if its header is not readable.

    One flipped bit also names the element.
    """
    return list(_damaged_tensors(damage)) if damage.path.suffix == ".safetensors" and damage.spans else []


def _damaged_tensors(damage: Damage) -> Iterator[str]:
    spans = ((damage.flipped[0], damage.flipped[0]),) if damage.flipped else damage.spans
    with damage.path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length < damage.path.stat().st_size else {}
            offsets = {key: (entry["data_offsets"], entry["shape"]) for key, entry in header.items() if key[:2] != "__"}
        except (ValueError, TypeError, KeyError, AttributeError):
            return
    for key, ((start, end), shape) in offsets.items():
        first, after = 8 + length + start, 8 + length + end
        if not any(low < after and high >= first for low, high in spans):
            continue
        numbers = torch.Size(shape).numel()
        element = f" element {(spans[0][0] - first) * numbers // (end - start)}" if damage.flipped and numbers else ""
        yield f"{key}{element}"
