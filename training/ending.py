"""Word in the run folder that a job which is started again would end the same: by a bad step, or by a mistake.

Who starts ranks again after any failure (torchrun, a JobSet, SkyPilot) cannot tell these from a crash. The rank that
decides to stop leaves the file; ranks of the same start that come later read it before anything heavy, and end by the
same code and sentence. What a person begins is a start, and takes the word of an older one away.

The file's first line is the exit code and the name of the start, which a shell reads with `read`; then the sentence.
"""

import contextlib
import os
from pathlib import Path

from .exit_code import FINAL

START = "SHIPYARD_START"
"""The variable that names a start. Generated scripts set it to what their scheduler calls the job; ranks that torchrun
has started again know it by their count."""
RUN_DIR = "SHIPYARD_RUN_DIR"
"""The variable with the run folder, where who starts ranks looks for the word itself: the recipe may not say one."""
FILE = "ended"


def starts_again() -> bool:
    """Whether somebody would start these ranks again after a failure."""
    return bool(os.environ.get(START)) or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def leave(run_dir: Path, code: int, said: str) -> None:
    """Leave word, where anybody would start these ranks again. Every rank that stops does: the first to end may take
    the others with it."""
    if not starts_again():
        return
    start = os.environ.get(START, "")
    draft = run_dir / f".{FILE}.{os.environ.get('RANK', '0')}"
    with contextlib.suppress(OSError):  # the mistake may be this very folder, or its full disk
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(f"{code} {start}\n{said}\n", encoding="utf-8")
            draft.replace(run_dir / FILE)
        finally:
            draft.unlink(missing_ok=True)


def heed(run_dir: Path) -> tuple[int, str] | None:
    """The exit code and the sentence that this very start has ended with before; None if it has not."""
    path = run_dir / FILE
    try:
        first, _, said = path.read_text(encoding="utf-8", errors="replace").partition("\n")
    except OSError:
        return None
    code, _, start = first.partition(" ")
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" or start == os.environ.get(START, "") != ""
    if again and code in map(str, FINAL):
        return int(code), said.strip()
    with contextlib.suppress(OSError):
        path.unlink()
    return None
