"""Pretraining on shards: one global batch however it is cut, and the same bits when a run is killed."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from shipyard.launch.cli import run_command
from shipyard.launch.workers import runner
from shipyard.training import preparation
from shipyard.training.loop import train
from shipyard.training.recipe import load_recipe
from shipyard.training.shard import StoredFragments

WORDS = Path(__file__).read_text(encoding="utf-8").split()


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tiny_model: Path) -> Path:
    """A recipe over two sources, its shards built."""
    folder = tmp_path_factory.mktemp("pretrain")
    rng = random.Random(0)
    for name, count in (("a", 40), ("b", 15)):
        rows = [{"text": " ".join(rng.choices(WORDS, k=rng.randint(1, 30)))} for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "method": "pretrain",
        "steps": 4,
        "run_dir": str(folder / "run"),
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "data": {
            "mixture": {str(folder / "a.jsonl"): 2.0, str(folder / "b.jsonl"): 1.0},
            "tokens": str(folder / "tokens"),
            "max_tokens": 48,
            "validation_fraction": 0.1,
        },
        "batch": {"size": 7, "micro": 2},
        "optim": {"lr": 1e-3, "eps": 1e-6},  # Adam turns rounding errors below its epsilon into steps of lr
        "checkpoints": {"every_steps": 1},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    assert "55 documents" in build(recipe)
    return recipe


def build(recipe: Path) -> str:
    said: list[str] = []
    preparation.build(load_recipe(recipe), runner("local", 1), said.append)
    return said[-1]


def outcome(run: Path) -> tuple[list[tuple[float, float]], dict]:
    steps = [json.loads(line) for line in (run / "log.jsonl").open()]
    return [(step["loss"], step["grad_norm"]) for step in steps], StoredFragments(max(run.glob("step-*"))).whole()


def assert_same(run: Path, reference: Path, tolerance: float) -> None:
    (steps, weights), (wanted_steps, wanted) = outcome(run), outcome(reference)
    assert len(steps) == len(wanted_steps) > 0
    for step, want in zip(steps, wanted_steps, strict=True):
        assert step == pytest.approx(want, rel=tolerance, abs=tolerance)
    assert max(float((weights[name] - wanted[name]).abs().max()) for name in wanted) <= tolerance


@pytest.fixture(scope="module")
def one_rank(shards: Path) -> Path:
    return train(load_recipe(shards))


def test_two_ranks_and_zero_equal_one(one_rank: Path, shards: Path, shipyard, tmp_path: Path) -> None:
    done = shipyard("train", shards, f"run_dir={tmp_path / 'two'}", "parallel.engine=zero2", ranks=2)
    assert "tokens to predict an epoch" in done.stdout
    assert_same(tmp_path / "two", one_rank, 1e-6)


def test_the_micro_batch_does_not_matter(one_rank: Path, shards: Path, tmp_path: Path) -> None:
    train(load_recipe(shards, [f"run_dir={tmp_path / 'run'}", "batch.micro=7"]))
    assert_same(tmp_path / "run", one_rank, 1e-6)


def test_a_run_goes_on_to_the_same_bits_and_not_on_other_shards(one_rank: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "shipyard.launch.cli", "train", str(shards), f"run_dir={run}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and not ((run / "log.jsonl").is_file() and list(run.glob("step-*/manifest.json"))):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    train(load_recipe(shards, [f"run_dir={run}"]))
    assert_same(run, one_rank, 0)
    folder = shards.parent
    kept = folder / "kept"
    (folder / "tokens").rename(kept)
    try:
        with pytest.raises(ValueError, match="run `shipyard data build`"):
            train(load_recipe(shards, [f"run_dir={copy}"]))
        with (folder / "b.jsonl").open("a") as rows:
            rows.write(json.dumps({"text": "one more"}) + "\n")
        assert "56 documents" in build(shards)
        with pytest.raises(ValueError, match="not what this run began with"):
            train(load_recipe(shards, [f"run_dir={copy}"]))
    finally:
        shutil.rmtree(folder / "tokens", ignore_errors=True)
        kept.rename(folder / "tokens")


def test_inspect_shows_packed_rows(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["data", "inspect", str(shards), "--rows", "2", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    lengths = [len(row["ids"]) for row in tree["rows"]]
    assert all(row["supervised"] == [False] + [True] * (len(row["ids"]) - 1) for row in tree["rows"])
    first = [length for row, length in zip(tree["rows"], lengths, strict=True) if row["source"] == "step 1, row 1"]
    assert tree["boundaries"][-1] == sum(first) <= 48


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.validation_rows=3", "data.validation_rows: token shards"),
        ("batch.packing=false", "batch.packing"),
        ("data.tokens=null", "data.mixture, validation_fraction: for token shards"),
        ("model.tokenizer=asset:smollm2-135m-instruct", "another tokenizer"),
        ("data.mixture={elsewhere.jsonl: 1}", "elsewhere.jsonl is not in"),
        ("data.tokens=nowhere", "holds no token shards; run `shipyard data build`"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(shards: Path, override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        train(load_recipe(shards, [override, f"run_dir={tmp_path / 'run'}"]))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
