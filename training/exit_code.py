"""The code a rank of a job ends with, told to `shipyard launch`: the launcher between them makes a 1 of each."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

FOLDER = "SHIPYARD_EXIT_CODES"
EXIT_BAD_STEP = 3
EXIT_SILENT = 4
CAUSES = (EXIT_BAD_STEP, EXIT_SILENT, 2)
"""A bad step, a silent neighbour, a mistake. What else ranks end with follows from these, or is the launcher's own."""


def tell(code: object) -> None:
    """Leave this rank's code where `shipyard launch`, if it started this job on this machine, looks for it."""
    if folder := os.environ.get(FOLDER):
        with contextlib.suppress(OSError):  # it has left
            Path(folder, os.environ.get("RANK", "0")).write_text(str(code), encoding="utf-8")


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Tell the code with which what is inside leaves this process, if it does."""
    try:
        yield
    except SystemExit as left:
        tell(left.code)
        raise


def cause(folder: Path) -> int | None:
    """The code of the rank that ended a job; None if no rank said why."""
    codes = {path.read_text(encoding="utf-8") for path in folder.iterdir()}
    return next((code for code in CAUSES if str(code) in codes), None)
