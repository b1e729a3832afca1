"""Jobs of several ranks under a real launcher, for drills and tests: `shipyard launch` or torchrun, and who is who."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .trainers import wait_until

Launcher = Literal["shipyard launch", "torchrun"]


@dataclass(frozen=True)
class Launched:
    """A job of two ranks that trains into `run`; what it prints goes to `output`."""

    process: subprocess.Popen[bytes]
    run: Path
    output: Path

    def wait(self, limit_s: float) -> int:
        """The exit code. Raises subprocess.TimeoutExpired; the job is ended then."""
        try:
            return self.process.wait(limit_s)
        finally:
            self.process.terminate()

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, true: Callable[[], bool], limit_s: float) -> None:
        """Return when something is true. Raises TimeoutError if the job ends first, or time is up."""
        if not wait_until(true, lambda: self.process.poll() is None, limit_s):
            self.process.terminate()
            raise TimeoutError(f"{self.run} is at {self.process.poll()}: {self.said()[-2000:]}")

    def rank(self, rank: int) -> int:
        """The process id of one of the ranks."""
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                words = (directory / "cmdline").read_bytes().split(b"\0")
                environment = (directory / "environ").read_bytes().split(b"\0")
            except OSError:  # gone, or not ours
                continue
            if f"run_dir={self.run}".encode() in words and f"RANK={rank}".encode() in environment and b"train" in words:
                return int(directory.name)
        raise AssertionError(f"rank {rank} is not running")


def launch(launcher: Launcher, recipe: Path, run: Path, overrides: Sequence[str], restarts: int) -> Launched:
    """Start a job of two ranks that may be started again so often."""
    arguments = [str(recipe), f"run_dir={run}", *overrides]
    command = [sys.executable, "-m", "shipyard.launch.cli", "launch", *arguments]
    command += ["--gpus", "2", "--restarts", str(restarts)]
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        command += ["--max-restarts", str(restarts), "-m", "shipyard.launch.cli", "train", *arguments]
    output = run.with_suffix(".out")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    return Launched(process, run, output)
