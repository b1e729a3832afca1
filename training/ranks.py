"""The processes of a job: who takes part, and the few things they say to each other outside an engine.

Processes are started by `accelerate launch` (or torchrun); one process alone is a world of one.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs

from .recipe import Recipe


@dataclass(frozen=True)
class Ranks:
    """Who takes part. Made once, before anything is loaded."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add numbers up over all ranks, in fp64; every rank must pass the same keys."""
        if self.world_size == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world_size > 1:
            dist.barrier()

    def gather_rows(self, rows: list[list[int]]) -> list[list[list[int]]]:
        """Every rank's rows of integers, by rank. Plain tensors travel, no pickles."""
        if self.world_size == 1:
            return [rows]
        flat = [number for row in rows for number in (len(row), *row)]
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(flat)
        dist.all_reduce(sizes)
        padded = torch.zeros(int(sizes.max()), dtype=torch.int64, device=self.device)
        padded[: len(flat)] = torch.tensor(flat, dtype=torch.int64, device=self.device)
        everyone = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(everyone, padded)
        return [_unflatten(tensor[:size].tolist()) for tensor, size in zip(everyone, sizes.tolist(), strict=True)]


def _unflatten(flat: list[int]) -> list[list[int]]:
    rows, at = [], 0
    while at < len(flat):
        rows.append(flat[at + 1 : at + 1 + flat[at]])
        at += 1 + flat[at]
    return rows


def start(recipe: Recipe) -> Ranks:
    """Join the processes that the launcher started.

    Raises ValueError when the launcher's configuration asks for another ZeRO stage than the recipe.
    """
    asked = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if asked and recipe.parallel.engine != f"zero{asked}":
        raise ValueError(
            f"parallel.engine: {recipe.parallel.engine}, but the launch configuration asks for ZeRO stage {asked}; set "
            f"parallel.engine=zero{asked}, or launch with launch/accelerate/ranks.yaml"
        )
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # the engine is built from the recipe, below
    if recipe.parallel.engine != "ddp":
        _rendezvous_alone()
    _meet_again(recipe.parallel.timeout_s)
    limits = InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.parallel.timeout_s))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[limits])
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    assert accelerator.num_processes == world_size, "processes were started but did not find each other"
    if recipe.deterministic == "elastic":
        _fix_arithmetic(world_size)
    return Ranks(accelerator.process_index, world_size, accelerator.device)


def _meet_again(timeout_s: float) -> None:
    """Join the ranks that torchrun has started again, under a name of this attempt's own: its store still holds the
    addresses of those that died. On one machine; of several, torchrun's c10d rendezvous makes a new store each time."""
    place = os.environ
    attempt = place.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or place.get("LOCAL_WORLD_SIZE") != place["WORLD_SIZE"] or dist.is_initialized():
        return
    limit = timedelta(seconds=timeout_s)
    agent = dist.TCPStore(place["MASTER_ADDR"], int(place["MASTER_PORT"]), is_master=False, timeout=limit)
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore(f"attempt-{attempt}", agent),
        rank=int(place["RANK"]),
        world_size=int(place["WORLD_SIZE"]),
        timeout=limit,
    )


def _fix_arithmetic(world_size: int) -> None:
    """Make this process compute the same bits whatever the job's size. Raises ValueError for odd world sizes."""
    if world_size & (world_size - 1):
        raise ValueError(
            f"deterministic: elastic adds gradients in a binary tree over ranks, so these must be a power of two, "
            f"not {world_size}; start {1 << (world_size.bit_length() - 1)}, or set deterministic: off"
        )
    torch.set_num_threads(1)  # sums inside a matrix product are cut by threads
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _rendezvous_alone() -> None:
    """Give a process that no launcher started the variables that DeepSpeed wants even for a world of one."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in alone.items()})
