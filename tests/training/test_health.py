"""Steps that must not count, met by real runs: a poisoned weight that one row reaches, on one rank of two."""

import json
import os
import signal
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from shipyard.launch.cli import run_command
from shipyard.training import checkpoint
from shipyard.training.health import FEWEST, HISTORY, BadStep, Norms
from shipyard.training.log import StepLog
from shipyard.training.loop import assemble, restore, train
from shipyard.training.ranks import start
from shipyard.training.recipe import Recipe, load_recipe
from shipyard.training.replay import replay, report
from shipyard.training.shard import StoredFragments
from shipyard.training.step import run_step

POISON = "~"  # a token that one row holds, and whose embedding is infinite
STEPS, SIZE = 9, 4
Made = tuple[Path, int, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model: Path, chat_rows: Path) -> Made:
    """A recipe with a poisoned row, the step (from 1) that has it first, and its name."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("health")
    model = folder / "model"
    model.mkdir()
    for path in tiny_model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    token = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(POISON)
    tensors["model.embed_tokens.weight"][token] = float("inf")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    lines = chat_rows.read_text().splitlines()
    row = json.loads(lines[4])
    row["messages"][0]["content"] += POISON
    lines[4] = json.dumps(row)
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(lines) + "\n")
    tree = {
        "method": "sft", "steps": STEPS, "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": str(rows)}, "batch": {"size": SIZE, "micro": 1}, "optim": {"lr": 3e-4},
        "checkpoints": {"every_steps": 2, "keep_last": 9}, "health": {"on_bad_step": "skip"},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    recipe = load_recipe(path, [f"run_dir={folder / 'unused'}"])
    _, data, _, method = assemble(recipe, start(recipe), folder)
    assert data is not None
    (name,) = [sample.source for sample in data.train if sample.source.endswith(":5")]
    bad = [step for step in range(STEPS) if name in [item.source for item in method.batch(step)]]
    assert bad, "the seed leaves the row out"
    return path, bad[0] + 1, name


@pytest.fixture(scope="module")
def skipping(made: Made, tmp_path_factory) -> Path:
    """One rank's run that leaves bad steps out: what two ranks are compared with."""
    run = tmp_path_factory.mktemp("skipping") / "run"
    train(load_recipe(made[0], [f"run_dir={run}"]))
    return run


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run: Path, step: int, part: str = "value") -> dict[str, torch.Tensor]:
    return StoredFragments(run / f"step-{step:06d}").whole(part)


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "engine",
    ["ddp", "fsdp2", "zero2", *[pytest.param(engine, marks=pytest.mark.slow) for engine in ("zero1", "zero3")]],
)
def test_two_ranks_leave_out_what_one_leaves_out(engine: str, made: Made, skipping: Path, shipyard, tmp_path) -> None:
    """The bad number is on one rank alone; no rank's weights or moments take it up, whatever the engine."""
    path, step, name = made
    run = tmp_path / "two"
    done = shipyard("train", path, f"run_dir={run}", f"parallel.engine={engine}", ranks=2)
    assert f"health: step {step}: the loss is no number on rank" in done.stdout
    assert "rank 0, 1" not in done.stdout
    assert name in done.stdout
    assert "it is left out" in done.stdout
    left_out = [line["step"] for line in lines_of(run) if "left_out" in line]
    assert left_out == [line["step"] for line in lines_of(skipping) if "left_out" in line]
    assert left_out[0] == step
    for part in ("value", "exp_avg", "exp_avg_sq"):
        assert_close(weights(run, STEPS, part), weights(skipping, STEPS, part), 1e-6)
    (note,) = (run / "replay").glob(f"step-{step:06d}-rank-*.json")
    assert json.loads(note.read_text())["micro_batches"][0]["rows"] == [name]


def test_a_bad_step_leaves_every_bit_as_it_was(made: Made, tmp_path: Path) -> None:
    path, step, _ = made
    recipe = load_recipe(path, [f"run_dir={tmp_path}"])
    _, _, engine, method = assemble(recipe, start(recipe), tmp_path)
    for number in range(step - 1):
        run_step(recipe, engine, method, number, STEPS)
    before = {f.name: {part: t.clone() for part, t in f.tensors.items()} for f in engine.fragments()}
    with pytest.raises(BadStep, match="no weight was changed"):
        run_step(recipe, engine, method, step - 1, STEPS)
    for fragment in engine.fragments():
        for part, tensor in fragment.tensors.items():
            assert tensor.equal(before[fragment.name][part]), f"{fragment.name} {part}"
    assert all(p.grad is None for p in engine.trainable)


def test_stop_saves_what_came_before_and_replay_finds_the_row(made: Made, skipping: Path, tmp_path: Path) -> None:
    path, step, name = made
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        train(load_recipe(path, [f"run_dir={run}", "health.on_bad_step=stop", "batch.micro=2"]))
    assert stopped.value.code == 3
    assert max(checkpoint.committed(run)) == step - 1
    found = replay(run)
    assert (found.step, found.exact, found.bad) == (step, True, True)
    assert [part.row for part in found.parts if part.bad and part.row] == [name]
    assert f"{name} alone: loss nan" in "\n".join(report(found))
    assert run_command(["replay", str(run)]) == 1
    assert run_command(["replay", str(run), "--step", "99"]) == 2
    assert run_command(["replay", str(skipping.parent)]) == 2
    # The user decides otherwise and goes on: the end is that of the run that skipped from the beginning.
    train(load_recipe(path, [f"run_dir={run}", "batch.micro=2"]))
    assert_close(weights(run, STEPS), weights(skipping, STEPS), 1e-6)


def test_rewind_goes_back_and_a_resumed_run_decides_alike(made: Made, tmp_path: Path, monkeypatch) -> None:
    """The run that is cut short at every step and goes on ends in the bits of the one that is not, though it keeps one
    checkpoint, and that one SIGTERM's: what a bad step goes back to has to stay."""
    path, step, _ = made
    straight, pieces = tmp_path / "straight", tmp_path / "pieces"
    train(rewinding(path, straight))
    back = (step - 1) // 2 * 2
    if back:
        rest = rewinding(path, tmp_path / "by-hand", steps=STEPS)
        _, _, engine, method = assemble(rest, start(rest), tmp_path)
        found = checkpoint.at_for_all(engine.ranks, straight, back)
        assert found is not None
        restore(engine, method, found)
        for number in range(step, (step // 2 + 1) * 2):
            run_step(rest, engine, method, number, STEPS)
        wanted = {f.name: f.tensors["value"].clone() for f in engine.fragments()}
        got = weights(straight, (step // 2 + 1) * 2)
        assert all(got[name].flatten().equal(wanted[name]) for name in wanted)
    for stop in (*range(3, STEPS, 2), STEPS):  # each leaves a checkpoint that the straight run does not have
        cut_at(rewinding(path, pieces, keep_last=1), stop, monkeypatch)
    for part in ("value", "exp_avg", "exp_avg_sq"):
        ours, theirs = weights(pieces, STEPS, part), weights(straight, STEPS, part)
        assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_ranks_rewind_to_what_one_rewinds_to(engine: str, made: Made, shipyard, tmp_path: Path) -> None:
    """Every rank takes up the old weights and moments, also those that only it holds."""
    path, step, _ = made
    one, two = tmp_path / "one", tmp_path / "two"
    train(rewinding(path, one))
    cut = [f"run_dir={two}", "health.on_bad_step=rewind", f"parallel.engine={engine}"]
    done = shipyard("train", path, *cut, ranks=2)
    assert f"back to the weights of step {(step - 1) // 2 * 2}" in done.stdout
    assert [line["step"] for line in lines_of(two)] == [line["step"] for line in lines_of(one)]
    for part in ("value", "exp_avg", "exp_avg_sq"):
        assert_close(weights(two, STEPS, part), weights(one, STEPS, part), 1e-6)


def rewinding(path: Path, run: Path, steps: int = STEPS, keep_last: int = 9) -> Recipe:
    knobs = [f"steps={steps}", "health.on_bad_step=rewind", f"checkpoints.keep_last={keep_last}"]
    return load_recipe(path, [f"run_dir={run}", *knobs])


def cut_at(recipe: Recipe, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process SIGTERM once `step - 1` steps are logged: it finishes the next one and leaves a checkpoint."""
    logged = StepLog.step

    def step_and_signal(self, number, values):
        logged(self, number, values)
        if number == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(StepLog, "step", step_and_signal)
        if step == STEPS:
            train(recipe)
            return
        with pytest.raises(SystemExit) as stopped:
            train(recipe)
        assert stopped.value.code == 143


def test_a_spike_is_what_the_last_norms_say(made: Made, tmp_path: Path, capsys) -> None:
    """Beyond 1.05 medians, here, so that it happens: the log of a run shows which norms were let through."""
    path, _, _ = made
    rows = path.with_name("clean.jsonl")
    rows.write_text((path.with_name("rows.jsonl")).read_text().replace(POISON, ""))
    run = tmp_path / "run"
    train(load_recipe(path, [f"run_dir={run}", f"data.train={rows}", "steps=24", "health.spike_factor=1.05",
                             "checkpoints.every_steps=0"]))  # fmt: skip
    steps = lines_of(run)
    assert any("left_out" in line for line in steps)
    known: list[float] = []
    for line in steps:
        limit = 1.05 * statistics.median(known[-HISTORY:]) if len(known) >= FEWEST else float("inf")
        if "left_out" not in line:
            assert line["grad_norm"] <= limit
            known.append(line["grad_norm"])
    assert "times the median of the last 32 steps" in capsys.readouterr().out


def test_norms_before_the_first_eight_are_no_spikes() -> None:
    norms = Norms(2.0, [1.0] * (FEWEST - 1))
    assert norms.largest() == float("inf")
    norms.known.append(3.0)
    assert norms.largest() == 2.0
    assert Norms(0.0, [1.0] * 40).largest() == float("inf")
