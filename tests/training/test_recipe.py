"""The recipe: closed, small, and clear about mistakes."""

from pathlib import Path

import pytest
import yaml
from shipyard.training.recipe import Recipe, dump_recipe, knobs, load_recipe, parse_recipe

ROOT = Path(__file__).parents[2]
KNOBS = [
    "method",
    "run_dir",
    "seed",
    "steps",
    "epochs",
    "resume",
    "deterministic",
    "model.name",
    "model.shape",
    "model.tokenizer",
    "model.dtype",
    "model.quantize",
    "model.kernels",
    "model.activation_checkpointing",
    "model.compile",
    "model.float8",
    "model.init",
    "model.mup_base_width",
    "lora.rank",
    "lora.alpha",
    "lora.targets",
    "data.train",
    "data.validation",
    "data.validation_rows",
    "data.train_rows",
    "data.split",
    "data.where",
    "data.format",
    "data.system",
    "data.prompt",
    "data.completion",
    "data.labels",
    "data.max_tokens",
    "data.on_bad_row",
    "data.on_long_row",
    "data.tokens",
    "data.mixture",
    "data.validation_fraction",
    "data.near_duplicates",
    "data.decontaminate",
    "batch.size",
    "batch.micro",
    "batch.packing",
    "optim.name",
    "optim.lr",
    "optim.schedule",
    "optim.warmup_steps",
    "optim.decay_fraction",
    "optim.final_lr_fraction",
    "optim.weight_decay",
    "optim.beta1",
    "optim.beta2",
    "optim.eps",
    "optim.max_grad_norm",
    "optim.z_loss",
    "parallel.engine",
    "parallel.tensor",
    "parallel.context",
    "parallel.offload",
    "parallel.timeout_s",
    "checkpoints.every_steps",
    "checkpoints.keep_last",
    "checkpoints.keep_every",
    "checkpoints.background",
    "checkpoints.max_mb_per_s",
    "health.on_bad_step",
    "health.spike_factor",
    "health.heartbeat_s",
    "log.every_steps",
    "log.tensorboard",
    "log.wandb",
    "dpo.beta",
    "dpo.loss",
    "dpo.label_smoothing",
    "dpo.sft_weight",
    "grpo.group_size",
    "grpo.max_new_tokens",
    "grpo.temperature",
    "grpo.beta",
    "grpo.clip_low",
    "grpo.clip_high",
    "grpo.inner_steps",
    "grpo.scale_rewards",
    "grpo.task_options",
]
SMALL = {"method": "sft", "steps": 1, "model": {"name": "m"}, "data": {"train": "t.jsonl"}}


def merged(**sections: object) -> dict:
    return {**SMALL, **sections}


def test_knobs_are_the_listed_ones_and_few() -> None:
    assert knobs() == KNOBS
    assert len(KNOBS) < 120


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (merged(optim={"lrr": 1}), ["optim.lrr", "unknown key", "optim.lr"]),
        (merged(learning_rate=1), ["learning_rate", "unknown key"]),
        (merged(optim={"lr": -1}), ["optim.lr", "-1", "greater than 0"]),
        (merged(optim={"lr": float("inf")}), ["optim.lr", "inf", "finite"]),
        (merged(seed=2**63), ["seed", "less than"]),
        (merged(steps=0), ["steps: 0 is refused", "give int or null"]),
        (merged(method="ppo"), ["method", "ppo", "sft", "grpo"]),
        (merged(optim=3), ["optim", "3", "section"]),
        ({"method": "sft", "steps": 1, "data": {"train": "x"}}, ["model", "required"]),
        (merged(epochs=1), ["steps", "exactly one"]),
        (merged(run_dir="~/run"), ["run_dir: ~/run", "a folder named ~", "whole path"]),
        (merged(model={"name": "m", "quantize": "nf4"}), ["model.quantize", "lora.rank"]),
        (
            merged(model={"name": "m", "quantize": "nf4"}, lora={"rank": 8}, parallel={"engine": "zero3"}),
            ["parallel.engine", "zero3", "zero2"],
        ),
        (merged(parallel={"offload": "cpu"}), ["parallel.offload", "ddp"]),
        (merged(method="grpo"), ["data.train", "task:"]),
        (merged(data={"train": "task:chain_sum"}), ["data.train", "grpo"]),
        (merged(data={"train": "t.csv", "prompt": "{a}"}), ["data.completion"]),
        (merged(data={"train": "t.csv", "completion": "{a}"}), ["data.completion", "data.prompt"]),
        (merged(method="dpo", data={"train": "t.csv", "labels": {"a": "b"}}), ["data.labels", "chosen"]),
        (merged(data={"train": "t.csv", "format": "text", "system": "x"}), ["data.system", "format text"]),
        (merged(method="grpo", data={"train": "task:x", "validation_rows": 3}), ["data.validation_rows", "task"]),
        (merged(method="pretrain", data={"mixture": {}, "tokens": "t"}), ["data.mixture", "no source"]),
    ],
)
def test_a_mistake_is_one_line_with_field_and_remedy(tree: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        parse_recipe(tree)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_overrides_are_yaml_values_under_dotted_keys(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    recipe = load_recipe(path, ["optim.lr=3e-4", "data.where.source=rt", "parallel.engine=zero2", "data.system=null"])
    assert (recipe.optim.lr, recipe.data.where, recipe.parallel.engine) == (3e-4, {"source": "rt"}, "zero2")
    for bad, word in (("optim.lr", "key=value"), ("optim.lrr=1", "optim.lr"), ("steps.x=1", "steps")):
        with pytest.raises(ValueError, match=word):
            load_recipe(path, [bad])


def test_missing_file_and_broken_yaml_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"smollm2-135m-sft\.yaml"):
        load_recipe("launch/recipes/smollm-135m-sft.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"broken\.yaml is not YAML"):
        load_recipe(tmp_path / "broken.yaml")


def test_yaml_drops_no_key_and_makes_no_dates(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(SMALL) + "optim: {lr: 1e-3}\noptim: {beta1: 0.5}\n")
    with pytest.raises(ValueError, match=r"r\.yaml is not YAML: optim: given twice, keep one .* line \d+"):
        load_recipe(path)
    path.write_text(yaml.safe_dump(SMALL))
    for day in ("2026-11-26", "2026-13-45"):
        assert load_recipe(path, [f"run_dir={day}"]).run_dir == day


@pytest.mark.parametrize("path", sorted((ROOT / "launch/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_resolve_and_survive_a_round_trip(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe.model_validate(SMALL)
    with pytest.raises(ValueError):
        recipe.optim.lr = 1.0  # pyright: ignore
