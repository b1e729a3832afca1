"""One line a step: on the terminal, in log.jsonl and in TensorBoard; a resumed run forgets what it does again."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from shipyard.training.log import StepLog, flops_per_token, memory_gib, peak_flops
from shipyard.training.recipe import parse_recipe
from transformers import LlamaConfig, LlamaForCausalLM

VALUES = {
    "loss": 1.5,
    "lr": 1e-3,
    "grad_norm": 0.25,
    "tokens_per_s": 1234.0,
    "mfu": 0.125,
    "memory_gib": 2.0,
    "margin": 0.5,
}


def recipe(**log: object):
    return parse_recipe({"method": "sft", "steps": 3, "model": {"name": "m"}, "data": {"train": "t"}, "log": log})


def test_a_step_is_one_line_and_one_json_object(tmp_path: Path) -> None:
    out = io.StringIO()
    log = StepLog(recipe(every_steps=2), tmp_path, 3, first=True, console=Console(file=out, width=200))
    for step in (1, 2, 3):
        log.step(step, VALUES)
    lines = out.getvalue().splitlines()
    assert len(lines) == 2  # step 2, and the last
    for word in (
        "step 2/3",
        "loss 1.5000",
        "lr 1.00e-03",
        "grad_norm 0.250",
        "1234 tok/s",
        "12.5%",
        "2.00 GiB",
        "margin",
    ):
        assert word in lines[0]
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert [row["step"] for row in logged] == [1, 2, 3]
    assert logged[0]["loss"] == 1.5


def test_a_resumed_run_forgets_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    log = StepLog(recipe(), tmp_path, 3, first=True, console=Console(file=io.StringIO()))
    for step in (1, 2, 3):
        log.step(step, VALUES)
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    log.forget_from(2)
    assert [json.loads(line)["step"] for line in log.path.open()] == [1, 2]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = StepLog(recipe(), tmp_path, 3, first=False)
    log.step(1, VALUES)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = StepLog(recipe(tensorboard=True), tmp_path, 3, first=True, console=Console(file=io.StringIO()))
    log.step(1, VALUES)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(VALUES)
    assert events.Scalars("loss")[0].value == 1.5


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log\.wandb: wandb is not installed; pip install"):
        StepLog(recipe(wandb="project"), tmp_path, 3, first=True)


def test_flops_count_four_for_frozen_and_six_for_trained_weights() -> None:
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    assert flops_per_token(model) == 6 * weights
    model.requires_grad_(False)
    assert flops_per_token(model) == 4 * weights


def test_peak_and_memory_are_plausible() -> None:
    assert 1e9 < peak_flops(torch.device("cpu"), torch.float32) < 1e14
    assert 0.05 < memory_gib(torch.device("cpu")) < 1000
