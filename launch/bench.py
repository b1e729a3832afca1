"""`shipyard bench`: which benchmark, and where its page goes."""

from pathlib import Path
from typing import Literal

Bench = Literal["kernels", "data", "planner", "train", "checkpoint"]


def bench(
    name: Bench,
    out: Path | None,
    datasheet: bool,
    workload: str,
    shape: str,
    rounds: int,
    litgpt: Path | None,
    threads: int | None,
) -> str | Path:
    """Run it; return what to print."""
    if name == "planner":
        from ..evals.bench_planner import write_page

        return write_page(out or Path("docs/planner.md"))
    if name == "kernels" and datasheet:
        from ..kernels.jit import need_compiler

        need_compiler()
        from ..kernels.datasheet_page import write_datasheet

        return write_datasheet(out or Path("docs/kernels.md"))
    if name == "kernels":
        from ..evals.bench_kernels import bench_kernels

        return bench_kernels(out)
    if name == "train":
        from ..evals.bench_train import bench_workloads

        return bench_workloads(out or Path("docs/bench-train.md"), workload, rounds, litgpt, threads)
    if name == "checkpoint":
        from ..training.pages import keep_pages

        keep_pages()
        from ..evals.bench_checkpoint import bench_checkpoint

        return bench_checkpoint(out or Path("docs/bench-checkpoint.md"), shape, rounds)
    from ..evals.bench_data import bench_data

    return bench_data(out)
