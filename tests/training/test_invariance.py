"""One global batch, every cut of it: the same loss, gradient norm and weights, through the command line.

Runs of real processes under `accelerate launch`: one rank is the reference, two ranks under DDP, FSDP2 and
DeepSpeed ZeRO-1, 2 and 3 must equal it. 22 rows in batches of 8, micro-batches of 3: accumulation, a ragged last
window (6 rows), ranks with an empty micro-batch, and rows of very different lengths.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from shipyard.training.shard import StoredFragments

TOLERANCE = 1e-6


def recipe_file(path: Path, tiny_model: Path, rows: Path, **sections: object) -> Path:
    tree = {
        "method": "sft",
        "epochs": 1,
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "data": {"train": str(rows)},
        "batch": {"size": 8, "micro": 3},
        "optim": {"lr": 1e-3, "weight_decay": 0.1},
    }
    path.write_text(yaml.safe_dump({**tree, **sections}))
    return path


def outcome(run: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Logged steps, and the weights of the last checkpoint."""
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return steps, StoredFragments(max(run.glob("step-*"))).whole()


def assert_same(run: Path, reference: Path, tolerance: float = TOLERANCE) -> None:
    (steps, weights), (wanted_steps, wanted) = outcome(run), outcome(reference)
    assert len(steps) == len(wanted_steps) > 0
    for step, want in zip(steps, wanted_steps, strict=True):
        assert step["loss"] == pytest.approx(want["loss"], rel=tolerance, abs=tolerance)
        assert step["grad_norm"] == pytest.approx(want["grad_norm"], rel=tolerance, abs=tolerance)
    assert weights.keys() == wanted.keys()
    worst = max(float((weights[name] - wanted[name]).abs().max()) for name in wanted)
    assert worst <= tolerance, f"weights differ by {worst:.1e}"


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, tiny_model, chat_rows, shipyard) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("invariance")
    recipe = recipe_file(folder / "sft.yaml", tiny_model, chat_rows)
    shipyard("train", recipe, f"run_dir={folder / 'one'}")
    return recipe, folder / "one"


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_two_ranks_equal_one(engine: str, one_rank: tuple[Path, Path], shipyard, tmp_path: Path) -> None:
    recipe, reference = one_rank
    done = shipyard("train", recipe, f"run_dir={tmp_path / 'two'}", f"parallel.engine={engine}", ranks=2)
    assert f"{engine} on 2 ranks" in done.stdout
    assert_same(tmp_path / "two", reference)


def test_micro_batches_padding_and_checkpointing_do_not_matter(one_rank, tmp_path: Path) -> None:
    """In this process: the cut knobs change the work, not the result."""
    from shipyard.training.loop import train
    from shipyard.training.recipe import load_recipe

    recipe, reference = one_rank
    for number, cut in enumerate((["batch.micro=8"], ["batch.packing=false", "model.activation_checkpointing=full"])):
        run = tmp_path / str(number)
        train(load_recipe(recipe, [f"run_dir={run}", *cut]))
        assert_same(run, reference)


def test_a_loss_averaged_in_micro_batches_would_fail_here(one_rank, tmp_path: Path, monkeypatch) -> None:
    """The comparison can see the field's usual mistake: averages of averages."""
    from shipyard.training import sft
    from shipyard.training.loop import train
    from shipyard.training.loss import nll_sum
    from shipyard.training.recipe import load_recipe

    recipe, reference = one_rank
    rounds = 3
    wrong = lambda logp, weights: nll_sum(logp, weights) / max(1.0, float(weights.sum())) * 300 / rounds
    monkeypatch.setattr(sft, "nll_sum", wrong)
    train(load_recipe(recipe, [f"run_dir={tmp_path / 'wrong'}"]))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "wrong", reference, tolerance=1e-2)


PREFERENCE_ROWS = [
    {"prompt": f"Say {word}.", "chosen": f"{word}! " * (1 + number % 4), "rejected": "No. " * (1 + number % 3)}
    for number, word in enumerate(
        ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda"]
    )
]


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_preferences_and_rollouts_too(method: str, tiny_model: Path, shipyard, tmp_path: Path) -> None:
    # Adapters start with gradients around Adam's default epsilon (1e-8), where the update is the sign of a rounding
    # error; with a larger epsilon the weights say what the gradients say.
    sections: dict = {"method": method, "lora": {"rank": 4}, "optim": {"lr": 1e-3, "eps": 1e-5}}
    if method == "dpo":
        rows = tmp_path / "pairs.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in PREFERENCE_ROWS))
        sections |= {"dpo": {"sft_weight": 0.3}, "batch": {"size": 6, "micro": 2}}
        recipe = recipe_file(tmp_path / "dpo.yaml", tiny_model, rows, **sections)
    else:
        options = {"min_word_len": 3, "max_word_len": 4}  # this verifier pays for single letters, so rewards differ
        sections |= {
            "grpo": {"group_size": 4, "max_new_tokens": 6, "inner_steps": 2, "beta": 0.05, "task_options": options}
        }
        sections |= {
            "data": {"train": "task:spell_backward"},
            "steps": 4,
            "epochs": None,
            "batch": {"size": 16, "micro": 3},
        }
        recipe = recipe_file(tmp_path / "grpo.yaml", tiny_model, tmp_path, **sections)
    shipyard("train", recipe, f"run_dir={tmp_path / 'one'}")
    shipyard("train", recipe, f"run_dir={tmp_path / 'two'}", ranks=2)
    assert_same(tmp_path / "two", tmp_path / "one")
    steps, _ = outcome(tmp_path / "one")
    assert any(step["grad_norm"] > 0 for step in steps)
