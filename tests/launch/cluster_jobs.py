"""A job to launch, and a Slurm cluster that is this machine: shared by the tests of launching."""

import os
from pathlib import Path

from shipyard.launch.job import Job, job_name
from shipyard.training.recipe import parse_recipe

ROOT = Path(__file__).parent.parent.parent
SLURM = Path(__file__).parent / "slurm_for_tests"


def plain_job(where: str) -> Job:
    tree = {"method": "sft", "steps": 100, "run_dir": "runs/llama-8b", "model": {"name": "meta-llama/Llama-3-8B"}}
    recipe = parse_recipe({**tree, "data": {"train": "rows.jsonl"}, "batch": {"size": 64}})
    return Job(
        name=job_name(recipe.run_dir),
        recipe=recipe,
        recipe_path=Path("/home/me/recipes/llama.yaml"),
        overrides=("optim.lr=1e-4",),
        nodes=1 if where == "local" else 2,
        gpus=8,
        restarts=0 if where == "local" else 3,
        folder=Path("/home/me/my project"),
        python="/home/me/.venv/bin/python",
        image="registry.example/shipyard:1",
        storage="s3://bucket/runs" if where == "skypilot" else "team-runs",
        accelerator="H100",
    )


def slurm_environment(folder: Path, nodes: int) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{SLURM}:{os.environ['PATH']}", "SCONTROL_LOG": str(folder / "scontrol.log"), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": "here", "SLURM_CPUS_ON_NODE": "1",
    }  # fmt: skip
