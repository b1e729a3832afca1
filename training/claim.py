"""A run folder belongs to one job at a time: two that write into one would take each other's checkpoints away."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from .ending import starts_again
from .ranks import Ranks

FILE = "recipe.yaml"
"""The first file of a run, which is locked while the run goes on. The kernel takes the lock back with the process."""
WAIT_S, POLL_S = 30.0, 0.1
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system without locks says."""


@contextlib.contextmanager
def claimed(run_dir: Path, ranks: Ranks) -> Iterator[bool]:
    """The scope in which no other job writes into `run_dir`, and whether one did when this one came. Collective.

    A job that was just killed may need a moment to leave. Where another one stays, raises ValueError on every rank; if
    somebody would start these ranks again, BlockingIOError, so that they are: the other may be the attempt before.
    """
    with contextlib.ExitStack() as scope:
        taken = waited = 0.0
        if ranks.first:
            run_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(run_dir / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            scope.callback(os.close, descriptor)
            began = time.monotonic()
            taken = float(not _locks(descriptor))
            waited = float(time.monotonic() - began >= POLL_S)
        everyone = ranks.sum({"taken": taken, "waited": waited})
        if everyone["taken"]:
            said = f"run_dir: another job trains into {run_dir}; wait for its end, or set another run_dir"
            raise BlockingIOError(said) if starts_again() else ValueError(said)
        yield everyone["waited"] > 0


def _locks(descriptor: int) -> bool:
    until = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return True
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        if time.monotonic() > until:
            return False
        time.sleep(POLL_S)
