"""New files, written past the page cache where the file system allows it.

A buffered write copies every byte into the cache, whose pages have to be found, and pushes out what was there: data
that training reads again, for a checkpoint that nobody does. With O_DIRECT the disk fetches the bytes from where they
lie. It takes whole blocks, in memory and in the file; what does not fit is put together in a buffer, and the file's
last bytes are written the usual way, as is everything where the file system or its disk refuses (open(2), O_DIRECT).
"""

import contextlib
import errno
import fcntl
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

PAGE_BYTES = 4096
"""What addresses and offsets are multiples of. Disks ask for 512 or this; one that wants more refuses."""
WRITE_BYTES = 1 << 24
REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.EFAULT)
"""What a write past the cache fails with that another may not: blocks, file systems, memory of a device's driver."""
O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


def aligned(memory: Any) -> memoryview:
    """All of an array of bytes but PAGE_BYTES, beginning at a multiple of these."""
    first = -_address(memory) % PAGE_BYTES
    return memory[first : first + len(memory) - PAGE_BYTES].data


@dataclass
class Pace:
    """How fast files are written: `bytes_per_s`, 0 for as fast as they can be; from `hurry` on without a limit."""

    bytes_per_s: int = 0
    hurry: threading.Event = field(default_factory=threading.Event)
    _next_s: float = 0.0

    def wait(self, count: int) -> None:
        """Return when `count` bytes more may be written. Idle time is not made up for."""
        if self.bytes_per_s and not self.hurry.is_set():
            now = time.monotonic()
            self.hurry.wait(max(0.0, self._next_s - now))
            self._next_s = max(now, self._next_s) + count / self.bytes_per_s


class DirectFile:
    """Written from its beginning to its end in a `with` block, whose good end syncs it.

    Raises OSError as writing does; a full disk is ENOSPC.
    """

    def __init__(self, path: Path, pace: Pace | None = None) -> None:
        self._pace = pace or Pace()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._stage, self._filled = memoryview(b""), 0
        self._direct = False
        with contextlib.suppress(OSError):  # by whatever name; if it cannot be written at all, a write says so
            self._set_direct(bool(O_DIRECT))

    def write(self, data: memoryview) -> None:
        """Append bytes. Those that begin on a page, after whole pages, are not copied."""
        while len(data):
            pages = len(data) - len(data) % PAGE_BYTES
            if not self._filled and pages and _address(np.frombuffer(data, np.uint8)) % PAGE_BYTES == 0:
                self._put(data[:pages])
                data = data[pages:]
                continue
            self._stage = self._stage or aligned(np.empty(WRITE_BYTES + PAGE_BYTES, np.uint8))
            piece = data[: len(self._stage) - self._filled]
            self._stage[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            data = data[len(piece) :]
            if self._filled == len(self._stage):
                self._put(self._stage)
                self._filled = 0

    def _put(self, data: memoryview) -> None:
        while len(data):
            self._pace.wait(len(data[:WRITE_BYTES]))
            try:
                written = os.write(self._descriptor, data[:WRITE_BYTES])
            except OSError as error:
                if not self._direct or error.errno not in REFUSALS:
                    raise
                self._set_direct(False)
                continue
            data = data[written:]

    def _set_direct(self, direct: bool) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~O_DIRECT
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | (O_DIRECT if direct else 0))
        self._direct = direct

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._set_direct(False)
                self._put(self._stage[: self._filled])
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


def _address(memory: Any) -> int:
    return memory.ctypes.data
