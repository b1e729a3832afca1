"""`shipyard launch`: writes an `accelerate launch` job for a cluster, or this machine, and starts it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..training.ending import START
from ..training.exit_code import EXIT_PREEMPTED, FINAL
from ..training.recipe import load_recipe
from .job import Job, job_name, local_script
from .kubernetes import jobset_manifest, trainjob_manifest
from .node import Relay
from .ray_nodes import ray_script
from .skypilot import skypilot_task
from .slurm import slurm_script

Where = Literal["local", "slurm", "kubernetes", "jobset", "skypilot", "ray"]
GPUS_OF_THIS_MACHINE = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class Cluster:
    """How a kind of cluster takes a job: the text of its file, and the program that starts it."""

    write: Callable[[Job], str]
    suffix: str
    start: tuple[str, ...]
    tool: str
    install: str


CLUSTERS: dict[str, Cluster] = {
    "local": Cluster(local_script, ".sh", ("bash",), "bash", "install bash"),
    "slurm": Cluster(slurm_script, ".sbatch", ("sbatch",), "sbatch", "run on a login node of the cluster"),
    "kubernetes": Cluster(
        trainjob_manifest, "-trainjob.yaml", ("kubectl", "apply", "-f"), "kubectl", "install kubectl"
    ),
    "jobset": Cluster(jobset_manifest, "-jobset.yaml", ("kubectl", "apply", "-f"), "kubectl", "install kubectl"),
    "skypilot": Cluster(
        skypilot_task, "-sky.yaml", ("sky", "jobs", "launch", "--yes"), "sky", "pip install skypilot[CLOUD]"
    ),
    "ray": Cluster(ray_script, "-ray.sh", ("bash",), "ray", "pip install 'shipyard-llm[ray]'"),
}


def describe(
    recipe: str | Path,
    overrides: Sequence[str],
    where: Where,
    nodes: int,
    gpus: int,
    restarts: int | None = None,
    image: str = "",
    storage: str = "",
    accelerator: str = "H100",
) -> Job:
    """Check everything that can be checked from here. Raises ValueError, one line, for what the user can mend."""
    resolved = load_recipe(recipe, overrides)
    here = len(list(GPUS_OF_THIS_MACHINE.glob("*")))
    ranks, batch = nodes * gpus, resolved.batch.size
    if restarts is None:  # at a terminal one wants to see the first error, not the fourth
        restarts = 0 if where == "local" else 3
    rules = (
        (nodes < 1, f"nodes: {nodes}, there must be at least one; give --nodes 1 or more"),
        (gpus < 1, f"gpus: {gpus}, every node runs at least one rank; give --gpus 1 or more"),
        (
            where == "local" and nodes > 1,
            f"nodes: {nodes}, this machine is one; start launch/ranks.sh on each with NNODES and NODE_RANK, "
            "or give --on slurm, kubernetes, skypilot or ray",
        ),
        (
            where == "local" and 0 < here < gpus,
            f"gpus: {gpus}, this machine has {here}; give --gpus {here} (--on slurm writes for another)",
        ),
        (
            ranks > batch,
            f"batch.size: {batch} samples cannot feed {ranks} ranks; raise batch.size, or give fewer --nodes or --gpus",
        ),
        (
            resolved.resume == "never" and (restarts > 0 or where != "local"),
            "resume: never, so a job that is started again would begin anew; give resume=auto and another run_dir",
        ),
        (
            where in ("kubernetes", "jobset", "skypilot") and not image,
            f"image: {where} starts containers; give --image REGISTRY/NAME:TAG of one with shipyard-llm[train] in it",
        ),
        (
            where in ("kubernetes", "jobset") and re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", storage) is None,
            f"storage: {storage!r}, pods lose their disks; give --storage CLAIM, a ReadWriteMany PersistentVolumeClaim",
        ),
        (
            where == "skypilot" and "://" not in storage,
            f"storage: {storage!r}, rented machines lose their disks; give --storage s3://BUCKET (gs://, r2:// ...)",
        ),
        (
            where == "skypilot" and re.fullmatch(r"[A-Za-z0-9][-.\w]*", accelerator) is None,
            f"accelerator: {accelerator!r} is no SkyPilot name; give one that `sky show-gpus` lists, H100 say",
        ),
    )
    for broken, message in rules:
        if broken:
            raise ValueError(message)
    return Job(
        name=job_name(resolved.run_dir),
        recipe=resolved,
        recipe_path=Path(recipe).absolute(),
        overrides=tuple(overrides),
        nodes=nodes,
        gpus=gpus,
        restarts=restarts,
        folder=Path.cwd(),
        python=sys.executable,
        image=image,
        storage=storage,
        accelerator=accelerator,
    )


def launch(job: Job, where: Where, out: Path | None = None) -> int:
    """Write the job's file (`out`, or RUN_DIR/launch/) and start it. Returns the exit code: a local job's own, 0 where
    a cluster took it. Raises ValueError when the cluster's program is not here or refuses; the file is there then."""
    cluster = CLUSTERS[where]
    path = out or Path(job.recipe.run_dir) / "launch" / (job.name + cluster.suffix)
    if path.resolve() == job.recipe_path.resolve():
        raise ValueError(f"out: {path} is the recipe itself; give --out the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(cluster.write(job), encoding="utf-8")
    command = [*cluster.start, str(path)]
    if shutil.which(cluster.tool) is None:
        raise ValueError(
            f"{cluster.tool}: not found on this machine, {cluster.install}; the job is written to {path}, "
            f"start it with: {shlex.join(command)}"
        )
    if where == "local":
        return _run_here(command, job.restarts)
    print(f"{where}: {path}", flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(f"{cluster.tool}: refused {path}: {lines[-1]}; mend it and start again: {shlex.join(command)}")
    return 0


def _run_here(command: list[str], restarts: int) -> int:
    """Run the job in the foreground, again after a crash; return its exit code. A bad step or a mistake ends it.
    SIGTERM goes on to the ranks, which save: 143."""
    code, environment = 1, {**os.environ, START: uuid.uuid4().hex}
    with Relay() as relay:
        for attempt in range(restarts + 1):
            code = relay.run(command, environment)
            if code == 0 or relay.received:
                break
            if code in FINAL:
                if restarts:
                    what = f"exit code {code}: a bad step or a mistake comes out the same again"
                    print(f"local: {what}, so the job is not started again", file=sys.stderr)
                break
            if attempt < restarts:
                print(f"local: attempt {attempt + 1} ended with exit code {code}; starting again", file=sys.stderr)
    return EXIT_PREEMPTED if relay.received and code not in (0, *FINAL) else code
