"""Trainers that start in a moment, for drills: real processes forked from one that has imported everything already.

Python needs seconds to import what training imports, which would be nearly all of a drill's time. A fork server
imports once and forks; each trainer then runs `shipyard train` as the command line does, as one rank of a job, with
its output in a file. What is killed is a real process with real files open.
"""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = ("shipyard.launch.cli", "shipyard.training.loop", "shipyard.training.elastic", "shipyard.serving.parity")
POLL_S = 0.001
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(list(PRELOADED))


def wait_until(true: Callable[[], bool], alive: Callable[[], bool], limit_s: float) -> bool:
    """Whether something came true while a job was alive and before time was up; return as soon as that is known."""
    until = time.monotonic() + limit_s
    while not (found := true()) and alive() and time.monotonic() < until:
        time.sleep(POLL_S)
    return found


@dataclass
class Job:
    """The ranks of one `shipyard train`."""

    output: Path
    ranks: list[ForkServerProcess] = field(default_factory=list)

    def alive(self) -> bool:
        return any(rank.is_alive() for rank in self.ranks)

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some ranks, or to all."""
        for rank in range(len(self.ranks)) if ranks is None else ranks:
            pid = self.ranks[rank].pid
            assert pid is not None
            if self.ranks[rank].is_alive():
                os.kill(pid, number)

    def wait(self, limit_s: float) -> list[int | None]:
        """Exit codes of all ranks, minus the signal's number for those that died of one. Whoever is left is killed."""
        until = time.monotonic() + limit_s
        for rank in self.ranks:
            rank.join(max(0.0, until - time.monotonic()))
        codes = [rank.exitcode for rank in self.ranks]
        self.signal(signal.SIGKILL)
        for rank in self.ranks:
            rank.join()
        return codes

    def said(self) -> str:
        """What all ranks printed."""
        return self.output.read_text(encoding="utf-8", errors="replace")


def start(recipe: Path, overrides: Sequence[str], ranks: int, output: Path) -> Job:
    """Start a job of so many ranks on this machine."""
    job = Job(output)
    output.write_text("", encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {key: str(value) for key, value in place.items()} if ranks > 1 else {}
        arguments = ["train", str(recipe), *overrides]
        process = _forks.Process(target=_be_a_rank, args=(arguments, environment, str(output)))
        process.start()
        job.ranks.append(process)
    return job


def _be_a_rank(arguments: list[str], environment: dict[str, str], output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    if environment:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from shipyard.launch.cli import run_command

    raise SystemExit(run_command(arguments))
