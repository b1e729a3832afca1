"""`shipyard verify crash`: every drill, and docs/crash.md, the table of what was done to a run and how it ended."""

import json
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

from .crash import STEPS, Drill, Ground, damage, full_disk, kill_anywhere, prepare, sigterm
from .crash_ranks import bad_number, not_started_again, silent, spike, started_again

Cover = Literal["short", "standard", "full"]
KILLS = {"short": 20, "standard": 60, "full": 200}
OTHERS = {"short": 1, "standard": 5, "full": 20}
LAUNCHES = {"short": 1, "standard": 2, "full": 4}
"""Jobs under a launcher, and poisoned rows."""
ROWS = (5, 14, 12, 7)
"""The poisoned ones: they come first after step 1, and at some even step after the second."""
SEED = 17
HEAD = f"""# What was done to runs, and how they ended

Written by `shipyard verify crash{{option}}`. Each line is real: processes that train a small Llama for {STEPS} steps, a
checkpoint after each, on one rank or two by chance, `deterministic: elastic` unless the line names another engine; a
signal from the kernel, a file system that is full, bytes changed on disk, a weight that is infinite and that one row
reaches. A trial held when the run did what is promised and then ended with the weights, both Adam moments and the
logged losses of the run that nothing disturbed (where steps are left out: of one rank that leaves them out), bit for
bit.

| what was done | times | held | promise | seen |
|---|---|---|---|---|
"""


def verify_crash(cover: Cover, out: Path | None, as_json: bool) -> bool:
    """Run every drill, print each as it ends, write the page to `out` if given; return whether all held.

    Raises ValueError when a run cannot be started at all.
    """
    folder = Path(tempfile.mkdtemp(prefix="shipyard-crash-"))
    found: list[Drill] = []
    for drill in drills(prepare(folder / "ground"), cover):
        if (result := ended(drill)) is None:
            continue
        found.append(result)
        if not as_json:
            mark = "ok    " if result.passed else "FAILED"
            print(f"{mark} {result.fault}: {result.held} of {result.times}; {result.seen}", flush=True)
    passed = all(drill.passed for drill in found)
    if as_json:
        print(json.dumps({"passed": passed, "drills": [asdict(drill) for drill in found]}, indent=1))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(found, cover), encoding="utf-8")
    if passed:
        shutil.rmtree(folder)
    elif not as_json:
        print(f"what is left of the runs that failed: {folder}")
    return passed


def drills(ground: Ground, cover: Cover) -> list[Callable[[], Drill | None]]:
    """Every drill, so often as `cover` says; one gives None where this user may not do it."""
    times, launches = OTHERS[cover], LAUNCHES[cover]
    ways = [("stop", "ddp"), ("skip", "ddp"), ("rewind", "ddp"), ("rewind", "zero2")]
    return [
        partial(kill_anywhere, ground, KILLS[cover], SEED),
        partial(sigterm, ground, times, SEED),
        *(partial(full_disk, ground, ranks) for ranks in (1, 2)),
        *(partial(damage, ground, times, SEED, torn) for torn in (False, True)),
        partial(silent, ground, launches, SEED),
        *(partial(bad_number, ground, choice, engine, ROWS[:launches]) for choice, engine in ways),
        partial(spike, ground),
        partial(not_started_again, ground, "shipyard launch"),
        partial(not_started_again, ground, "torchrun"),
        partial(started_again, ground, "shipyard launch", signal.SIGKILL, launches, SEED),
        partial(started_again, ground, "shipyard launch", signal.SIGSTOP, launches, SEED),
        partial(started_again, ground, "torchrun", signal.SIGKILL, launches, SEED),
    ]


def ended(drill: Callable[[], Drill | None]) -> Drill | None:
    """What came of a drill. One that breaks down did not hold: the rest go on, and the page has a line for it."""
    try:
        return drill()
    except Exception as error:
        said = " ".join(str(error).split())[:300].replace("|", "/")
        name = f"{drill.func.__name__}{drill.args[1:]}" if isinstance(drill, partial) else str(drill)
        return Drill(f"drill {name}", 1, 0, "runs to its end", f"{type(error).__name__}: {said}")


def page(found: list[Drill], cover: Cover) -> str:
    """The drills as a page of markdown."""
    head = HEAD.format(option="" if cover == "standard" else f" --{cover}")
    rows = [f"| {d.fault} | {d.times} | {d.held} | {d.promise} | {d.seen} |\n" for d in found]
    return head + "".join(rows)
