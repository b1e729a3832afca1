"""Files of flat fp32 ranges, in the safetensors format: written and hashed in one pass, read by range.

safetensors' own writer copies every tensor into one more buffer, and the file would have to be read again for its hash;
a checkpoint is the largest thing that a run writes, so this writer streams. Any safetensors reader reads what it wrote.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from .manifest import Damage, FileHash, fsync_path

INDEX = "index.json"
WRITE_BYTES = 1 << 24


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write 1-D fp32 CPU tensors to a new file and sync it; return its entry for the manifest."""
    header: dict[str, Any] = {}
    at = 0
    for key, tensor in tensors.items():
        assert (tensor.dtype, tensor.ndim, tensor.is_contiguous()) == (torch.float32, 1, True)
        header[key] = {"dtype": "F32", "shape": [len(tensor)], "data_offsets": [at, at + 4 * len(tensor)]}
        at += 4 * len(tensor)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = FileHash()
    with path.open("wb") as file:
        for data in (len(text).to_bytes(8, "little"), text, *(_bytes(tensor) for tensor in tensors.values())):
            for start in range(0, len(data), WRITE_BYTES):
                piece = data[start : start + WRITE_BYTES]
                file.write(piece)
                digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    fsync_path(path.parent)
    return digest.entry()


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
