"""The end of a run: all of it is written or the same command writes it, and the model ends what it was taught to."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from runs_for_tests import recipe_and_run
from safetensors.torch import load_file, save_file
from shipyard.launch.cli import run_command
from shipyard.training.litgpt import load_litgpt
from shipyard.training.loop import train
from shipyard.training.recipe import load_recipe
from shipyard.training.shard import StoredFragments
from transformers import AutoTokenizer, GenerationConfig

IM_END = 2


def plain_tree(model: Path, rows: Path) -> dict[str, Any]:
    return {
        "method": "sft", "steps": 1, "model": {"name": str(model), "dtype": "float32"}, "data": {"train": str(rows)},
        "batch": {"size": 4, "micro": 4}, "optim": {"lr": 1e-2},
    }  # fmt: skip


def generation(run: Path) -> GenerationConfig:
    return GenerationConfig.from_pretrained(run / "model")


def copy_of(model: Path, folder: Path, **generation: Any) -> Path:
    shutil.copytree(model, folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_a_run_that_ends_while_it_writes_its_adapter_is_not_finished(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, monkeypatch
) -> None:
    def killed(*args: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(plain_tree(tiny_model, chat_rows) | {"lora": {"rank": 2}}))
    resolved = load_recipe(recipe, [f"run_dir={tmp_path / 'run'}"])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(PeftModel, "save_pretrained", killed)
        train(resolved)
    run = train(resolved)
    assert (run / "model" / "manifest.json").is_file()
    assert (run / "adapter" / "manifest.json").is_file()


def test_a_run_does_not_replace_the_model_that_it_begins_with(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    recipe, run = recipe_and_run(tmp_path, plain_tree(tiny_model, chat_rows))
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    for name in (run, run / "model", f"{run}/../one"):
        words = ["train", str(recipe), f"run_dir={run}", f"model.name={name}", "resume=never"]
        assert run_command(words) == 2
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


@pytest.mark.parametrize(
    "engine", ["ddp", "zero3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2", "zero1", "zero2"))]
)
def test_a_bf16_model_has_what_small_steps_learned(
    engine: str, tiny_model: Path, chat_rows: Path, shipyard, tmp_path: Path
) -> None:
    """All weights train, as in preference tuning: rounded to the nearest, a base in bf16 would come back nearly as it
    was. Under ZeRO what computes is rounded to bf16 already."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    tree = plain_tree(base, chat_rows) | {"steps": 3, "optim": {"lr": 1e-6}, "parallel": {"engine": engine}}
    tree["model"]["dtype"] = "bfloat16"
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(json.dumps(tree))
    shipyard("train", recipe, f"run_dir={run}", ranks=2 if engine != "ddp" else 0)
    exported = load_file(run / "model" / "model.safetensors")
    learned, arrived = 0.0, 0.0
    for name, tensor in StoredFragments(run / "step-000003").whole().items():
        change = tensor.double() - weights[name].double()
        learned += float(change.square().sum())
        arrived += float((change * (exported[name].double() - weights[name].double())).sum())
    assert 0.8 < arrived / learned < 1.2
    assert exported["model.norm.weight"].dtype == torch.bfloat16


def test_a_generation_config_that_transformers_would_not_save_comes_through(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    """Llama 2 came with a temperature and without sampling; a run may not fail in its last minute for that."""
    base = copy_of(tiny_model, tmp_path / "base", eos_token_id=IM_END, temperature=0.9, top_p=0.6, max_new_tokens=7)
    _, run = recipe_and_run(tmp_path, plain_tree(base, chat_rows))
    found = generation(run)
    assert (found.eos_token_id, found.temperature, found.top_p, found.max_new_tokens) == (IM_END, 0.9, 0.6, 7)


def test_a_base_model_is_exported_with_the_ends_that_it_was_taught(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    """Qwen's base models name <|endoftext|> alone; a server that does not know <|im_end|> would never stop."""
    base = copy_of(tiny_model, tmp_path / "base", eos_token_id=[5, 0])
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    _, run = recipe_and_run(tmp_path, plain_tree(base, chat_rows))
    assert generation(run).eos_token_id == [IM_END, 5, 0]


def test_a_model_from_scratch_takes_its_tokenizers_special_tokens(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    """A shape's are those of the model that it was read from."""
    shape = json.loads((tiny_model / "config.json").read_text()) | {"eos_token_id": 300, "bos_token_id": 301}
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    tree = plain_tree(tiny_model, chat_rows)
    tree["model"] |= {"name": "scratch", "shape": str(tmp_path / "shape.json"), "tokenizer": str(tiny_model)}
    _, run = recipe_and_run(tmp_path, tree)
    config = json.loads((run / "model" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, IM_END)
    assert generation(run).eos_token_id == IM_END


def test_litgpt_without_a_generation_config_has_no_ends_of_its_own(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    assert run_command(["export", str(tiny_model), "--to", "litgpt", "--out", str(tmp_path / "lit")]) == 0
    (tmp_path / "lit" / "generation_config.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lit")
    tokenizer.eos_token = "<|endoftext|>"  # transformers' default for Llama happens to be this tokenizer's other end
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    tokenizer.save_pretrained(tmp_path / "lit")
    (tmp_path / "lit" / "manifest.json").unlink()
    config: Any = load_litgpt(tmp_path / "lit", torch.float32).config
    assert (config.bos_token_id, config.eos_token_id) == (None, None)
    _, run = recipe_and_run(tmp_path, plain_tree(tmp_path / "lit", chat_rows))
    assert generation(run).eos_token_id == [0]
