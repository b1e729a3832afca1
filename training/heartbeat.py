"""Ranks watch each other, so that one that stands still is named at once and not after a collective's time limit.

Every process has a thread that counts up its own entry in the job's key-value store and looks at the next rank's: a
ring, so the traffic grows with the ranks and not with their square. A process that was stopped (SIGSTOP, a frozen
machine, a driver that never returns with the GIL held) stops counting. Its watcher then says so in one line and ends
its own process; the launcher ends the others. A rank that is merely slow keeps counting.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from .ranks import Ranks

EXIT_SILENT = 4
DONE = "done"
BEATS = 5
"""Beats in the time after which silence is an alarm."""


@contextmanager
def watch(ranks: Ranks, limit_s: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that notes the step this rank is at; watch the next rank meanwhile. Nothing for `limit_s` 0."""
    if ranks.world_size == 1 or not limit_s:
        yield lambda step: None
        return
    watcher = _Watcher(ranks, limit_s)
    watcher.start()
    try:
        yield watcher.note
    finally:
        watcher.stop()


class _Watcher(threading.Thread):
    def __init__(self, ranks: Ranks, limit_s: int) -> None:
        super().__init__(daemon=True)
        self.rank, self.limit_s, self.step = ranks.rank, limit_s, 0
        self.neighbour = (ranks.rank + 1) % ranks.world_size
        # A connection of its own: the process group's is held by whoever waits on it.
        self.store: Any = cast(Any, dist.distributed_c10d._get_default_store()).clone()
        self.store.set_timeout(timedelta(seconds=limit_s))
        self._over = threading.Event()
        self._count = 0
        self._beat()

    def note(self, step: int) -> None:
        self.step = step

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _beat(self) -> None:
        self._count += 1
        self.store.set(f"beat/{self.rank}", f"{self._count} {self.step} {socket.gethostname()}:{os.getpid()}")

    def run(self) -> None:
        heard, changed = "", time.monotonic()
        while not self._over.wait(self.limit_s / BEATS):
            try:
                self._beat()
                key = f"beat/{self.neighbour}"
                said = self.store.get(key).decode() if self.store.check([key]) else ""
            except (RuntimeError, dist.DistError) as error:  # the store's own process is gone or stands still
                said, failure = heard, f"; the job's store does not answer either: {str(error).splitlines()[0][:120]}"
            else:
                failure = ""
            if said != heard or said == DONE:
                heard, changed = said, time.monotonic()
            elif time.monotonic() - changed > self.limit_s:
                self._alarm(heard, failure)
        try:
            self.store.set(f"beat/{self.rank}", DONE)
        except (RuntimeError, dist.DistError):
            return  # nobody is left to hear it

    def _alarm(self, heard: str, failure: str) -> None:
        _, step, place = heard.split(" ", 2) if heard else ("", "0", "never heard")
        sys.stderr.write(
            f"shipyard: error: health: rank {self.neighbour} ({place}) has been silent for {self.limit_s} s, last at "
            f"step {int(step) + 1}{failure}; the job ends, and the same command goes on from its newest checkpoint\n"
        )
        sys.stderr.flush()
        os._exit(EXIT_SILENT)  # the main thread waits in a collective that will not return
