"""A flipped bit is found, and nothing else is taken for one."""

import contextlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shipyard.training.manifest import BLOCK_BYTES, MANIFEST, commit, damages, new_directory, read_manifest
from shipyard.training.shard import damaged_tensors, write_shard
from shipyard.training.syndrome import CHUNK_BYTES, Syndrome, flipped_bit


def syndrome(data: bytes, cuts: tuple[int, ...] = ()) -> str:
    found = Syndrome()
    for low, high in zip((0, *cuts), (*cuts, len(data)), strict=True):
        found.update(memoryview(data)[low:high])
    return found.text()


@settings(deadline=None, max_examples=50)
@given(st.binary(min_size=1, max_size=99), st.integers(0), st.integers(0, 2))
def test_one_flip_is_named_and_two_are_not(data: bytes, where: int, chunks: int) -> None:
    data = bytes(chunks * CHUNK_BYTES) + data
    byte, bit = where // 8 % len(data), where % 8
    damaged = bytearray(data)
    damaged[byte] ^= 1 << bit
    assert flipped_bit(syndrome(damaged), syndrome(data, (len(data) // 3,))) == (byte, bit)
    damaged[(byte + 1) % len(data)] ^= 1 << (bit + 3) % 8
    assert flipped_bit(syndrome(damaged), syndrome(data)) is None


def test_manifests_written_before_hold_the_same_numbers() -> None:
    data = (np.arange(1_500_000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).tobytes() + b"odd"
    for cuts in ((), (3, 300_000, 5_000_000)):
        assert syndrome(data, cuts) == "8761acc0423b732f-7d12f-2"


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    """A committed directory: a shard of three tensors over several blocks, and JSON."""
    directory = tmp_path_factory.mktemp("shard")
    torch.manual_seed(0)
    tensors = {name: torch.randn(size) for name, size in (("a", 7), ("b", BLOCK_BYTES // 2), ("c", 1000))}
    entry = write_shard(directory / "x.safetensors", tensors)
    (directory / "index.json").write_text(json.dumps({"shapes": {"w": [3]}}))
    commit(directory, {"step": 8, "updates": 8}, {"x.safetensors": entry})
    return directory


def flip(path: Path, byte: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 1 << bit]))


def test_every_flip_in_a_file_is_located(shard: Path) -> None:
    rng = random.Random(0)
    for name in ("x.safetensors", "index.json"):
        size = (shard / name).stat().st_size
        for _ in range(60):
            byte, bit = rng.randrange(size), rng.randrange(8)
            flip(shard / name, byte, bit)
            (damage,) = damages(read_manifest(shard))
            assert damage.flipped == (byte, bit)
            flip(shard / name, byte, bit)
    assert list(damages(read_manifest(shard))) == []


def test_every_flip_in_a_manifest_is_seen(tmp_path: Path) -> None:
    with new_directory(tmp_path / "d", {"step": 8, "updates": 8}) as scratch:
        (scratch / "data").write_bytes(b"x")
    path = tmp_path / "d" / MANIFEST
    before = read_manifest(path.parent)
    for byte in range(path.stat().st_size):
        for bit in range(8):
            flip(path, byte, bit)
            with contextlib.suppress(ValueError):
                assert read_manifest(path.parent) == before  # a space became another white one, say
            flip(path, byte, bit)


def test_damage_is_named_by_tensor_and_element(shard: Path) -> None:
    path = shard / "x.safetensors"
    start = path.stat().st_size - 4 * 1000
    flip(path, start + 4 * 17 + 3, 6)
    (damage,) = damages(read_manifest(shard))
    assert damaged_tensors(damage) == ["c element 17"]
    assert f"bit 6 of byte {start + 71} was flipped, and nothing else" in str(damage)
    flip(path, start, 1)  # two flips: the block is named, and every tensor that reaches into it
    (damage,) = damages(read_manifest(shard))
    assert damage.flipped is None
    assert damaged_tensors(damage) == ["b", "c"]
    assert f"bytes {2 * BLOCK_BYTES}-{path.stat().st_size - 1})" in str(damage)
    flip(path, start + 4 * 17 + 3, 6)
    flip(path, start, 1)
    flip(path, 12, 0)
    (damage,) = damages(read_manifest(shard))
    assert damage.flipped == (12, 0)
    flip(path, 12, 0)
