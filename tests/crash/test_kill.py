"""A killed run resumes by itself to the same bits: real processes, real signals, real damage on disk."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import SafetensorError
from shipyard.training.manifest import MANIFEST, new_directory, verify
from shipyard.training.shard import StoredFragments

STEPS = 12


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_model: Path, chat_rows: Path, shipyard) -> tuple[Path, Path]:
    """A recipe, and the run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("crash")
    tree = {
        "method": "sft",
        "steps": STEPS,
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "data": {"train": str(chat_rows)},
        "batch": {"size": 4, "micro": 2},
        "optim": {"lr": 1e-3},
        "checkpoints": {"every_steps": 1, "keep_last": 3},
    }
    recipe = folder / "sft.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    shipyard("train", recipe, f"run_dir={folder / 'straight'}")
    return recipe, folder / "straight"


def start(recipe: Path, run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "shipyard.launch.cli", "train", str(recipe), f"run_dir={run}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for(process: subprocess.Popen[str], run: Path, steps: int) -> None:
    """Return when `steps` steps are logged, or the process has ended."""
    while process.poll() is None:
        log = run / "log.jsonl"
        if log.is_file() and log.read_bytes().count(b"\n") >= steps:
            return
        time.sleep(0.002)


def assert_same_bits(run: Path, reference: Path) -> None:
    name = f"step-{STEPS:06d}"
    for part in ("value", "exp_avg", "exp_avg_sq"):
        ours, theirs = (StoredFragments(folder / name).whole(part) for folder in (run, reference))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in theirs), part
    losses, wanted = (
        [json.loads(line)["loss"] for line in (folder / "log.jsonl").open()] for folder in (run, reference)
    )
    assert losses == wanted


def test_a_flipped_bit_is_named_and_the_step_before_is_used(straight, shipyard, tmp_path: Path) -> None:
    recipe, reference = straight
    run = tmp_path / "run"
    process = start(recipe, run)
    wait_for(process, run, 6)
    process.kill()
    process.communicate()
    newest = max(path for path in run.glob("step-*") if (path / MANIFEST).is_file())
    victim = newest / "rank-00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    done = shipyard("train", recipe, f"run_dir={run}")
    assert f"{victim} has changed since it was written" in done.stdout
    assert f"{newest.name} is passed over" in done.stdout
    assert f"going on after step {int(newest.name[5:]) - 1} " in done.stdout
    assert_same_bits(run, reference)


def test_sigterm_saves_within_a_step_and_says_so(straight, shipyard, tmp_path: Path) -> None:
    recipe, reference = straight
    run = tmp_path / "run"
    process = start(recipe, run)
    wait_for(process, run, 3)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "SIGTERM: step" in output
    logged = (run / "log.jsonl").read_bytes().count(b"\n")
    assert verify(run / f"step-{logged:06d}").about["step"] == logged
    shipyard("train", recipe, f"run_dir={run}", ranks=2)  # and the world may be another one
    weights, wanted = (StoredFragments(path / f"step-{STEPS:06d}").whole() for path in (run, reference))
    assert max(float((weights[key] - wanted[key]).abs().max()) for key in wanted) < 1e-6


def test_another_recipe_does_not_go_on_in_the_same_directory(straight, shipyard) -> None:
    recipe, reference = straight
    done = shipyard("train", recipe, f"run_dir={reference}", "optim.lr=0.5", check=False)
    assert done.returncode == 2
    assert "another recipe" in done.stderr
    assert "resume=never" in done.stderr
    again = shipyard("train", recipe, f"run_dir={reference}")
    assert "finished before, verified" in again.stdout


def test_a_full_disk_leaves_the_old_directory_and_one_clear_line(tmp_path: Path) -> None:
    """ENOSPC from the kernel (/dev/full) in the middle of a write."""
    target = tmp_path / "kept"
    with new_directory(target, {"turn": 1}) as scratch:
        (scratch / "data").write_bytes(b"one")
    before = verify(target).digest
    code = (
        "import sys; from pathlib import Path\n"
        "from shipyard.training.manifest import new_directory\n"
        "with new_directory(Path(sys.argv[1]), {}) as scratch:\n"
        "    with open('/dev/full', 'wb') as full:\n"
        "        full.write(b'x' * 100000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "disk: no space left" in done.stderr
    assert verify(target).digest == before
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_full_disk_under_safetensors_is_named_too(tmp_path: Path) -> None:
    """Its exception is no OSError; this is the text that a full file system gave."""
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(ValueError, match="disk: no space left"), new_directory(tmp_path / "run", {}):
        raise SafetensorError(text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save", ["numpy", "torch"])
def test_a_full_disk_under_numpy_and_torch_is_named_too(save: str, tmp_path: Path) -> None:
    """Their exceptions do not say what the kernel said."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(ValueError, match="disk: no space left"), new_directory(tmp_path / "run", {}) as scratch:
            if save == "numpy":
                with (scratch / "data").open("wb") as file:
                    np.zeros(1 << 20, np.float32).tofile(file)
            else:
                torch.save(torch.zeros(1 << 20), scratch / "data")
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_an_interrupted_directory_does_not_count(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with pytest.raises(OSError, match="made up"), new_directory(target, {}) as scratch:
        (scratch / "data").write_bytes(b"half")
        raise OSError(errno.EIO, "made up")
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    (target / "data").write_bytes(b"half")
    with pytest.raises(ValueError, match="never finished"):
        verify(target)
