"""What goes past the page cache is the same file, on every file system, and a full disk says so."""

import errno
import os
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from shipyard.training import direct
from shipyard.training.direct import PAGE_BYTES, WRITE_BYTES, DirectFile, Pace, aligned
from shipyard.training.manifest import BLOCK_BYTES, disk_is_full, hash_file
from shipyard.training.shard import ShardImage, write_shard

STAGE = 1 << 18
SIZES = (0, 1, 8, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, 3 * PAGE_BYTES + 512, STAGE + 5)


@pytest.fixture(params=["disk", "tmpfs", "ramfs"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where files are written past the cache, where that is said and not done, and where it is refused."""
    if request.param == "disk":
        yield tmp_path
    elif request.param == "tmpfs":
        if not Path("/dev/shm").is_dir():
            pytest.skip("no /dev/shm")
        with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
            yield Path(place)
    else:
        if subprocess.run(["mount", "-t", "ramfs", "shipyard", str(tmp_path)], capture_output=True).returncode:
            pytest.skip("mounting a ramfs needs root")
        yield tmp_path
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def memory(count: int, shift: int = 0) -> memoryview:
    """Random bytes, `shift` bytes after the beginning of a page."""
    whole = aligned(np.random.default_rng(0).integers(0, 256, count + shift + PAGE_BYTES, np.uint8))
    return whole[shift:]


def write(path: Path, *parts: memoryview) -> bytes:
    with DirectFile(path) as file:
        for part in parts:
            file.write(part)
    return path.read_bytes()


def is_cached(path: Path) -> bool:
    """Whether the file's first page is in memory: a read that may not wait finds it."""
    with path.open("rb", buffering=0) as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False


@pytest.mark.parametrize("shift", [0, 8, 511, 512])
def test_every_size_and_cut_is_the_same_file(shift: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "WRITE_BYTES", STAGE)
    (folder / "x").write_bytes(b"longer, from before" * STAGE)
    for size in SIZES:
        data = memory(size, shift)
        assert write(folder / "x", data) == data
    data = memory(2 * STAGE + 77, shift)
    for cuts in ((8, 9, 5000), (PAGE_BYTES,), (STAGE - 1, STAGE + 1), (PAGE_BYTES, 2 * PAGE_BYTES + 1)):
        parts = [data[low:high] for low, high in zip((0, *cuts), (*cuts, len(data)), strict=True)]
        assert write(folder / "x", *parts) == data


def test_a_file_is_synced_when_all_of_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    write(tmp_path / "x", memory(PAGE_BYTES + 7, 8), memory(9))
    assert synced == [PAGE_BYTES + 16]
    with pytest.raises(KeyError), DirectFile(tmp_path / "y") as file:
        file.write(memory(PAGE_BYTES))
        raise KeyError
    assert len(synced) == 1


def test_a_pace_is_kept_until_there_is_a_hurry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight pieces at twenty a second wait for seven of them; at one in a month nothing waits once there is a hurry."""
    monkeypatch.setattr(direct, "WRITE_BYTES", STAGE)
    data, began = memory(8 * STAGE), time.monotonic()
    with DirectFile(folder / "x", Pace(20 * STAGE)) as file:
        file.write(data)
    assert time.monotonic() - began >= 7 / 20
    assert (folder / "x").read_bytes() == data
    slow = Pace(1)
    threading.Timer(0.1, slow.hurry.set).start()
    with DirectFile(folder / "x", slow) as file:
        file.write(data)
    assert (folder / "x").read_bytes() == data


def test_what_is_written_stays_out_of_the_page_cache(tmp_path: Path) -> None:
    with (tmp_path / "plain").open("wb") as plain:
        plain.write(memory(PAGE_BYTES))
        plain.flush()
        os.fsync(plain.fileno())
        os.posix_fadvise(plain.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        told = not is_cached(tmp_path / "plain")
    except (OSError, AttributeError):
        told = False
    if not told:
        pytest.skip("this file system keeps everything in memory, or does not say")
    tensors = {"a": torch.randn(7), "b": torch.randn(3 * BLOCK_BYTES)}
    image = ShardImage({key: len(tensor) for key, tensor in tensors.items()})
    image.fill(tensors, threading.Event())
    image.write(tmp_path / "image")
    write_shard(tmp_path / "shard", {**tensors, "c": torch.randn(WRITE_BYTES // 4)})
    with DirectFile(tmp_path / "off a page") as file:
        file.write(memory(WRITE_BYTES, 8))
    assert not [name for name in ("image", "shard", "off a page") if is_cached(tmp_path / name)]


def test_blocks_that_a_disk_refuses_are_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 8 bytes: the kernel says EINVAL to the first write, or to one in the middle."""
    monkeypatch.setattr(direct, "PAGE_BYTES", 8)
    monkeypatch.setattr(direct, "WRITE_BYTES", STAGE)
    for shift, size in ((8, 5 * 4096), (0, 4096 + 8), (0, STAGE + 4096 + 8)):
        data = memory(size, shift)
        assert write(tmp_path / "x", data) == data
        assert write(tmp_path / "x", data[: size // 4096 * 4096], data[size // 4096 * 4096 :]) == data


def test_a_full_disk_is_an_error_of_its_own(tmp_path: Path) -> None:
    """From a device that takes nothing, and from a disk that takes half."""
    with pytest.raises(OSError) as raised, DirectFile(Path("/dev/full")) as file:
        file.write(memory(3 * PAGE_BYTES + 1))
    assert raised.value.errno == errno.ENOSPC
    disk, place = tmp_path / "disk", tmp_path / "place"
    place.mkdir()
    with disk.open("wb") as file:
        file.truncate(WRITE_BYTES + (8 << 20))
    mkfs = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/sbin:/usr/sbin")
    if not mkfs or subprocess.run([mkfs, "-q", "-F", str(disk)]).returncode:
        pytest.skip("no ext4 can be made here")
    if subprocess.run(["mount", "-o", "loop", str(disk), str(place)], capture_output=True).returncode:
        pytest.skip("mounting a disk in a file needs root")
    try:
        with pytest.raises(OSError) as raised:
            write(place / "x", memory(2 * WRITE_BYTES))
        assert disk_is_full(raised.value)
        (place / "x").unlink()
        data = memory(PAGE_BYTES + 1)
        assert write(place / "x", data) == data
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_write_that_is_cut_short_is_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel writes as much of the last piece as the limit allows, and says so only of what comes after."""
    monkeypatch.setattr(direct, "WRITE_BYTES", STAGE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (STAGE + PAGE_BYTES, hard))
    try:
        with pytest.raises(OSError) as raised, DirectFile(tmp_path / "x") as file:
            file.write(memory(2 * STAGE))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG


@pytest.mark.parametrize("hurried", [False, True])
def test_an_image_is_the_shard_that_is_written_from_tensors(hurried: bool, folder: Path) -> None:
    """The same bytes and hashes, also of a second save into the same memory, and from other numbers' formats."""
    lengths = {"a": 7, "none": 0, "b": BLOCK_BYTES + 5, "c": 1, "half": 1001, "d": 70_001}
    image = ShardImage(lengths)
    hurry = threading.Event()
    if hurried:
        hurry.set()
    for _ in range(2):
        tensors = {key: torch.randn(length) for key, length in lengths.items()}
        tensors["half"] = tensors["half"].bfloat16()
        image.fill(tensors, hurry)
        entry = image.write(folder / "image")
        tensors["half"] = tensors["half"].float()
        assert write_shard(folder / "shard", tensors) == entry == hash_file(folder / "image")
        assert (folder / "image").read_bytes() == (folder / "shard").read_bytes()
        read = load_file(folder / "image")
        assert all(read[key].equal(tensor) for key, tensor in tensors.items())


def test_a_hurry_in_the_middle_leaves_the_rest_of_the_hash_for_later(tmp_path: Path) -> None:
    class Later(threading.Event):
        asked = 0

        def is_set(self) -> bool:
            self.asked += 1
            return self.asked > 3

    tensors = {"a": torch.randn(BLOCK_BYTES), "b": torch.randn(BLOCK_BYTES + 1)}
    image = ShardImage({key: len(tensor) for key, tensor in tensors.items()})
    image.fill(tensors, Later())
    assert image.write(tmp_path / "image") == write_shard(tmp_path / "shard", tensors)
