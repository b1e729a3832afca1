"""A SkyPilot task: the same job on rented machines of any cloud, started again when they are taken away."""

import shlex
from pathlib import PurePosixPath

import yaml

from ..training.ending import START
from ..training.recipe import dump_recipe
from .job import ENVIRONMENT, Job, accelerate
from .kubernetes import STORAGE, BlockDumper
from .node import TRY_AGAIN

END = "END_OF_RECIPE"


def skypilot_task(job: Job) -> str:
    """A task for `sky jobs launch` (https://docs.skypilot.co/en/latest/reference/yaml-spec.html)."""
    recipe = dump_recipe(job.recipe)
    assert END not in recipe.splitlines(), "the recipe would end its own here-document"
    crashes = shlex.quote(f"{PurePosixPath(job.recipe.run_dir)}/launch/crashes-") + '"$SKYPILOT_TASK_ID-$NODE_RANK"'
    run = f"""\
set -euo pipefail
cd {STORAGE}
cat >/tmp/recipe.yaml <<'{END}'
{recipe}{END}
PYTHON=python NNODES=$SKYPILOT_NUM_NODES NODE_RANK=$SKYPILOT_NODE_RANK GPUS={job.gpus}
MASTER_ADDR=$(head -n 1 <<<"$SKYPILOT_NODE_IPS") MASTER_PORT=29500
export {START}=$SKYPILOT_TASK_ID # the same after a recovery
{ENVIRONMENT}{accelerate("/tmp/recipe.yaml", f"--crashes {crashes} {job.restarts} ")}"""
    task = {
        "name": job.name,
        "num_nodes": job.nodes,
        "resources": {
            "accelerators": f"{job.accelerator}:{job.gpus}",
            "image_id": f"docker:{job.image}",
            "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [TRY_AGAIN]},
        },
        "file_mounts": {STORAGE: {"source": job.storage, "mode": "MOUNT_CACHED"}},
        "run": run,
    }
    header = f"""\
# {job.name}: {job.nodes} machines of {job.gpus} x {job.accelerator}, written by `shipyard launch`.
# sky jobs launch THIS FILE: a managed job gets new machines when its own are taken (`use_spot: true` in resources asks
# for the cheap ones) and goes on from the newest save in {STORAGE}; job_recovery also starts it again after a crash,
# for which a node ends with exit code {TRY_AGAIN}, {job.restarts} times at most. A bad step or a mistake keeps its own
# code and is final.
# MOUNT_CACHED: files are written to the disk first and to the bucket soon after, so that saves are whole files with
# renames; what a machine had not sent when it went is missing, the manifest tells, and the save before it is used.
"""
    return header + yaml.dump(task, Dumper=BlockDumper, sort_keys=False, allow_unicode=True, width=120)
