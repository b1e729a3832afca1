"""One node's launcher, ended with the code of its ranks: `python -m shipyard.launch.node COMMAND [ARGUMENT ...]`.

Accelerate's launcher, and torch's, end with 1 whatever their ranks end with, so that nobody above could tell a bad step
or a mistake, which come out the same again, from a crash. Nothing heavy is imported here.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

from ..training.exit_code import EXIT_PREEMPTED, FINAL, FOLDER, cause

TRY_AGAIN = 75
"""What `--crashes` ends with, after sysexits.h: a temporary failure."""


class Relay:
    """While it is entered, SIGTERM to this process goes on to the command that it runs, once: a second one would make a
    launcher leave before its ranks have saved."""

    def __init__(self) -> None:
        self.received = False
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Relay":
        self._before = signal.signal(signal.SIGTERM, self._pass_on)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if not self.received and self._child is not None:
            self._child.terminate()
        self.received = True

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run a command to its end; return its exit code, 128 and the signal's number for one that a signal ended."""
        self._child = subprocess.Popen(command, env=environment)
        if self.received:  # before there was a child
            self._child.terminate()
        try:
            code = self._child.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the ranks too
            self._child.wait()
            raise
        return code if code >= 0 else 128 - code


def run_node(command: Sequence[str]) -> int:
    """Run a node's launcher; return the code of a rank that said why it ended, 143 after SIGTERM, or its own."""
    with tempfile.TemporaryDirectory(prefix="shipyard-exit-") as told, Relay() as relay:
        code = relay.run(command, {**os.environ, FOLDER: told})
        said = cause(Path(told))
    if code == 0 or said in FINAL:
        return said if code and said else code
    return EXIT_PREEMPTED if relay.received else said or code


def counted(code: int, crashes: Path, restarts: int) -> int:
    """TRY_AGAIN in place of a crash's code, as long as `crashes`, a file that outlives the node, counts no more than
    `restarts` of them: for schedulers that know only which codes to start again after, SkyPilot for one."""
    if code in (0, EXIT_PREEMPTED, *FINAL):
        return code
    try:
        before = len(crashes.read_bytes()) if crashes.is_file() else 0
        crashes.parent.mkdir(parents=True, exist_ok=True)
        crashes.write_bytes(b"x" * (before + 1))
    except OSError as error:
        print(f"node: {crashes} cannot count crashes ({error.strerror}), so this one is final", file=sys.stderr)
        return code
    return TRY_AGAIN if before < restarts else code


def main(arguments: Sequence[str]) -> int:
    """`[--crashes FILE RESTARTS] COMMAND [ARGUMENT ...]`."""
    counts = arguments[0] == "--crashes"
    try:
        code = run_node(arguments[3:] if counts else arguments)
    except KeyboardInterrupt:
        return 130
    return counted(code, Path(arguments[1]), int(arguments[2])) if counts else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
