"""The code a rank of a job ends with, told to `shipyard launch`: the launcher between them makes a 1 of each."""

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDER = "SHIPYARD_EXIT_CODES"
EXIT_MISTAKE = 2
EXIT_BAD_STEP = 3
EXIT_SILENT = 4
EXIT_PREEMPTED = 143
CAUSES = (EXIT_BAD_STEP, EXIT_SILENT, EXIT_MISTAKE)
"""What else ranks end with follows from these, or is the launcher's own."""
FINAL = (EXIT_BAD_STEP, EXIT_MISTAKE)
"""What the same start would end with again: functions of data, weights and recipe."""


def tell(code: object) -> None:
    """Leave this rank's code where `shipyard launch`, if it started this job on this machine, looks for it."""
    if folder := os.environ.get(FOLDER):
        with contextlib.suppress(OSError):  # it has left
            Path(folder, os.environ.get("RANK", "0")).write_text(str(code), encoding="utf-8")


@contextlib.contextmanager
def told() -> Iterator[None]:
    """The last that a process does: with the code it leaves this scope with, 0 by default, it ends; a rank tells it.

    A rank ends without taking Python apart. After a collective has returned, gloo's thread drops the tensors and needs
    Python for that; if Python is being taken apart just then, the process dies of SIGABRT, its work done and its code
    lost (https://github.com/pytorch/pytorch/pull/179291). Nobody is waited for: others may have failed.
    """
    code: object = 0
    try:
        yield
    except SystemExit as left:
        code = left.code
        tell(code)
    if "RANK" in os.environ:
        _end(code)
    sys.exit(code)  # pyright: ignore[reportArgumentType]


def _end(code: object) -> None:
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def cause(folder: Path) -> int | None:
    """The code of the rank that ended a job; None if no rank said why."""
    codes = {path.read_text(encoding="utf-8") for path in folder.iterdir()}
    return next((code for code in CAUSES if str(code) in codes), None)
