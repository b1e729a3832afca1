"""A run folder belongs to one job at a time."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from shipyard.training import claim, ending, loop
from shipyard.training.checkpoint import committed
from shipyard.training.loop import train
from shipyard.training.recipe import load_recipe


def test_two_jobs_do_not_train_into_one_folder(tiny_model: Path, chat_rows: Path, tmp_path: Path, monkeypatch) -> None:
    """A second one is refused while the first lives, at once started again where a launcher does that, and goes on
    when the first was killed."""
    recipe, run = tmp_path / "mine.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(_tree(tiny_model, chat_rows, run)))
    first = _start(recipe, run)
    try:
        monkeypatch.setattr(claim, "WAIT_S", 0.5)
        with pytest.raises(ValueError, match="run_dir: another job trains into"):
            train(load_recipe(recipe, ["resume=never"]))
        assert committed(run)
        monkeypatch.setenv(ending.START, "a job that is started again")
        with pytest.raises(BlockingIOError, match="run_dir: another job trains into"):
            train(load_recipe(recipe))
        assert first.poll() is None
        first.send_signal(signal.SIGKILL)
        first.wait()
        step = max(committed(run))
        train(load_recipe(recipe, [f"steps={step + 2}", "resume=never"]))
        assert max(committed(run)) == step + 2
    finally:
        first.kill()
        first.wait()


def test_who_waits_goes_on_from_what_the_other_job_left(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, monkeypatch
) -> None:
    """An attempt that SIGTERM ends may still save when the next one has looked for checkpoints already."""
    recipe, run = tmp_path / "mine.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(_tree(tiny_model, chat_rows, run)))
    first = _start(recipe, run)
    seen: list[int] = []

    def look(engine: object, method: object, found: Any, log: object) -> int:
        seen.append(found.about["step"])
        raise InterruptedError

    monkeypatch.setattr(loop, "_resume", look)
    timer = threading.Timer(3.0, first.send_signal, [signal.SIGTERM])
    timer.start()
    try:
        with pytest.raises(InterruptedError):
            train(load_recipe(recipe))
        assert seen == [max(committed(run))]
        assert first.wait() == 143
    finally:
        first.kill()
        timer.join()


def _tree(model: Path, rows: Path, run: Path) -> dict[str, Any]:
    return {
        "method": "sft", "steps": 100_000, "run_dir": str(run), "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": str(rows)}, "batch": {"size": 4, "micro": 4}, "checkpoints": {"every_steps": 2},
    }  # fmt: skip


def _start(recipe: Path, run: Path) -> subprocess.Popen[bytes]:
    """A job in a process of its own, which has saved once."""
    job = subprocess.Popen(
        [sys.executable, "-m", "shipyard.launch.cli", "train", str(recipe)], stdout=subprocess.DEVNULL
    )
    while not committed(run):
        assert job.poll() is None
        time.sleep(0.1)
    return job


def test_a_folder_without_locks_can_be_trained_into(tmp_path: Path, monkeypatch) -> None:
    def refuses(*args: object) -> None:
        raise OSError(claim.UNSUPPORTED[0], os.strerror(claim.UNSUPPORTED[0]))

    monkeypatch.setattr(claim.fcntl, "flock", refuses)
    assert claim._locks(0)
