"""Two real ranks under the launcher; one is stopped or killed. The job ends by name, and goes on to the same bits."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from shipyard.training.shard import StoredFragments

ROOT = Path(__file__).parents[2]
STEPS = 30


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model: Path, chat_rows: Path) -> Path:
    path = tmp_path_factory.mktemp("heartbeat") / "sft.yaml"
    tree = {
        "method": "sft", "steps": STEPS, "model": {"name": str(tiny_model), "dtype": "float32"},
        "data": {"train": str(chat_rows)}, "batch": {"size": 4, "micro": 2}, "optim": {"lr": 1e-3},
        "checkpoints": {"every_steps": 5}, "health": {"heartbeat_s": 5},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, shipyard) -> Path:
    run = recipe.parent / "undisturbed"
    shipyard("train", recipe, f"run_dir={run}", ranks=2)
    return run


def launched(recipe: Path, run: Path, restarts: int = 0) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "shipyard.launch.cli", "launch", str(recipe), f"run_dir={run}", "--gpus", "2",
        "--restarts", str(restarts),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
    )


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    log, until = run / "log.jsonl", time.monotonic() + 300
    while process.poll() is None and time.monotonic() < until:
        if log.is_file() and log.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"no step {step}; the job has ended with {process.poll()}")


def rank_of(run: Path, rank: int) -> int:
    """The process id of a rank of the job that trains into `run`."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().split(b"\0")
            environment = (directory / "environ").read_bytes().split(b"\0")
        except OSError:  # gone, or not ours
            continue
        if f"run_dir={run}".encode() in words and f"RANK={rank}".encode() in environment and b"train" in words:
            return int(directory.name)
    raise AssertionError(f"rank {rank} is not running")


def assert_same_bits(run: Path, reference: Path) -> None:
    for part in ("value", "exp_avg", "exp_avg_sq"):
        ours, theirs = (StoredFragments(path / f"step-{STEPS:06d}").whole(part) for path in (run, reference))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in theirs), part
    losses, wanted = ([json.loads(line)["loss"] for line in (path / "log.jsonl").open()] for path in (run, reference))
    assert losses == wanted


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_and_the_job_goes_on_by_itself(
    rank: int, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = launched(recipe, run, restarts=1)
    wait_for_step(process, run, 7)
    victim = rank_of(run, rank)
    os.kill(victim, signal.SIGSTOP)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    named = re.search(rf"health: rank {rank} \(\S+:{victim}\) has been silent for 5 s, last at step (\d+)", output)
    assert named, output
    assert int(named[1]) >= 1  # a beat is a fifth of the limit: many of these steps
    assert "starting again" in output
    assert "resume: going on after step 5" in output
    assert_same_bits(run, undisturbed)


def test_a_killed_rank_ends_the_job_and_it_goes_on_by_itself(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = launched(recipe, run, restarts=1)
    wait_for_step(process, run, 12)
    os.kill(rank_of(run, 1), signal.SIGKILL)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert "starting again" in output
    assert re.search(r"resume: going on after step (10|15)", output), output
    assert_same_bits(run, undisturbed)
