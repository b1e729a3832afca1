"""Ranks watch each other, so that one that stands still is named at once and not after a collective's time limit.

Every process has a thread that counts up its own entry in the job's key-value store and looks at the next rank's: a
ring, so the traffic grows with the ranks and not with their square. A process that was stopped (SIGSTOP, a frozen
machine, a driver that never returns with the GIL held) stops counting. Its watcher then says so in one line and ends
its own process; the launcher ends the others. A rank that is merely slow keeps counting.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from .exit_code import EXIT_SILENT, tell
from .ranks import Ranks

DONE = "done"
BEATS = 5
"""Beats in the time after which silence is an alarm."""


@contextlib.contextmanager
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
        self._heard, self._changed, self._failure = "", time.monotonic(), ""
        # A store whose process stands still does not even time out, so another thread does the talking.
        self._talking = threading.Thread(target=self._talk, daemon=True)
        self._beat()

    def note(self, step: int) -> None:
        self.step = step

    def stop(self) -> None:
        self._over.set()
        self.join()
        self._talking.join(self.limit_s)

    def _beat(self) -> None:
        self._count += 1
        self.store.set(f"beat/{self.rank}", f"{self._count} {self.step} {socket.gethostname()}:{os.getpid()}")

    def run(self) -> None:
        self._talking.start()
        while not self._over.wait(self.limit_s / BEATS):
            if self._heard != DONE and time.monotonic() - self._changed > self.limit_s:
                self._alarm(self._heard, self._failure)

    def _talk(self) -> None:
        key = f"beat/{self.neighbour}"
        with contextlib.suppress(RuntimeError, dist.DistError):
            self._heard = self.store.get(key).decode()  # waits for it, so that it has a name when it falls silent
        while not self._over.wait(self.limit_s / BEATS):
            self._failure = "; the job's store does not answer either"
            try:
                self._beat()
                said = self.store.get(key).decode() if self.store.check([key]) else ""
            except (RuntimeError, dist.DistError) as error:  # its own process is gone
                self._failure += f": {str(error).splitlines()[0][:120]}"
                continue
            self._failure = ""
            if said != self._heard:
                self._heard, self._changed = said, time.monotonic()
        with contextlib.suppress(RuntimeError, dist.DistError):  # nobody is left to hear it
            self.store.set(f"beat/{self.rank}", DONE)

    def _alarm(self, heard: str, failure: str) -> None:
        _, step, place = heard.split(" ", 2) if heard else ("", "0", "never heard")
        sys.stderr.write(
            f"shipyard: error: health: rank {self.neighbour} ({place}) has been silent for {self.limit_s} s, last at "
            f"step {int(step) + 1}{failure}; the job ends, and the same command goes on from its newest checkpoint\n"
        )
        sys.stderr.flush()
        tell(EXIT_SILENT)
        os._exit(EXIT_SILENT)  # the main thread waits in a collective that will not return
