"""Tensor parallel: the same training, checkpoints that pass to and from other engines, and clear refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from runs_for_tests import forget_after
from safetensors.torch import load_file
from shipyard.training.loop import train
from shipyard.training.models import load_model
from shipyard.training.ranks import Ranks
from shipyard.training.recipe import load_recipe, parse_recipe
from shipyard.training.shard import StoredFragments
from shipyard.training.tensor_parallel import _refuse_what_cannot_be_cut

STEPS = 3


def tree(**sections: object) -> dict:
    small = {"method": "sft", "steps": STEPS, "model": {"name": "m", "dtype": "float32"}, "data": {"train": "x"}}
    return {**small, **sections}


def test_checkpoints_pass_to_rows_of_ranks_and_back(tiny_model: Path, chat_rows: Path, shipyard, tmp_path) -> None:
    """One rank, then two that share every layer, then one again: moments, losses and the exported model too."""
    recipe = tmp_path / "sft.yaml"
    sections = {
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "data": {"train": str(chat_rows)},
        "batch": {"size": 8, "micro": 3},
        "optim": {"lr": 1e-3, "eps": 1e-6, "weight_decay": 0.1},
        "checkpoints": {"every_steps": 1, "keep_last": 10},
    }
    recipe.write_text(yaml.safe_dump(tree(**sections)))
    straight, run = tmp_path / "straight", tmp_path / "run"
    train(load_recipe(recipe, [f"run_dir={straight}"]))
    shutil.copytree(straight, run)
    forget_after(run, 1)
    cut = ("parallel.engine=fsdp2", "parallel.tensor=2")
    shipyard("train", recipe, f"run_dir={run}", *cut, ranks=2)
    exported, wanted = (load_file(folder / "model" / "model.safetensors") for folder in (run, straight))
    assert exported.keys() == wanted.keys()
    assert max(float((exported[name] - wanted[name]).abs().max()) for name in wanted) <= 1e-6
    forget_after(run, 2)
    train(load_recipe(recipe, [f"run_dir={run}"]))
    for step in range(1, STEPS + 1):
        for part in ("value", "exp_avg", "exp_avg_sq"):
            ours, theirs = (StoredFragments(folder / f"step-{step:06d}").whole(part) for folder in (run, straight))
            assert ours.keys() == theirs.keys()
            assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) <= 1e-6, (step, part)
    norms = [[json.loads(line)["grad_norm"] for line in (folder / "log.jsonl").open()] for folder in (run, straight)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"parallel": {"engine": "zero2", "tensor": 2}}, ["parallel.tensor", "zero2", "fsdp2"]),
        ({"parallel": {"engine": "fsdp2", "tensor": 2}, "lora": {"rank": 4}}, ["parallel.tensor", "lora.rank: 0"]),
        ({"parallel": {"engine": "fsdp2", "tensor": 2, "offload": "cpu"}}, ["parallel.tensor", "offload"]),
    ],
)
def test_what_does_not_hold_is_refused_in_a_line(sections: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        parse_recipe(tree(**sections))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("world_size", "row", "words"),
    [(3, 2, "2 ranks share a layer, but 3"), (4, 4, "cannot share 2 num_key_value_heads"), (3, 3, "evenly")],
)
def test_models_and_ranks_that_do_not_divide_are_refused(
    tiny_model: Path, world_size: int, row: int, words: str
) -> None:
    model = load_model(parse_recipe(tree(model={"name": str(tiny_model)})).model, trains_all=True)
    with pytest.raises(ValueError, match=words):
        _refuse_what_cannot_be_cut(Ranks(0, world_size, torch.device("cpu")), model, row)
