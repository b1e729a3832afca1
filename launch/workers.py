"""Who does the pieces of a corpus: processes of this machine, or a Ray cluster. The work and its result are one."""

import functools
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

from ..training.pieces import Task, careful
from ..training.preparation import Runner
from .tables import console


def runner(on: Literal["local", "ray"], workers: int = 0) -> Runner:
    """Who runs the tasks of a build. `workers` 0: a process a core, or all that the cluster has."""
    if on == "ray":
        return functools.partial(_on_ray, workers)
    pools: list[ProcessPoolExecutor] = []  # its processes live as long as the runner, and serve every stage

    def run(task: Task, work: Path, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        from ..training.log import progress

        size = workers or len(os.sched_getaffinity(0))
        with progress(task.__name__.replace("_", " "), len(numbers), console) as advance:
            if size == 1 or len(numbers) < 2:
                for number in numbers:
                    yield careful(task, work, number)
                    advance()
                return
            if not pools:
                context = multiprocessing.get_context("spawn")
                pools.append(ProcessPoolExecutor(size, context, _stay_with_parent, (os.getpid(),)))
            futures = [pools[0].submit(careful, task, work, number) for number in numbers]
            try:
                for future in as_completed(futures):
                    yield future.result()
                    advance()
            finally:
                for future in futures:
                    future.cancel()

    return run


def _stay_with_parent(parent: int) -> None:
    """End this process when the one that started it is gone: a killed build leaves nobody behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_ray(workers: int, task: Task, work: Path, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Ray Data maps the pieces over a cluster, whose machines must all see the sources and data.tokens."""
    import ray
    import ray.data

    if not numbers:
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
    done = rows.map(lambda row: careful(task, work, int(row["number"])), concurrency=workers or None)
    yield from done.iter_rows()
