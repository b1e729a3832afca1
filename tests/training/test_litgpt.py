"""LitGPT's format: there and back without a changed bit, trained from, and judged by LitGPT itself where it is."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from shipyard.launch.cli import run_command
from shipyard.serving.export import export
from shipyard.training.litgpt import CONFIG, WEIGHTS, is_litgpt, load_litgpt, save_litgpt
from shipyard.training.loop import train
from shipyard.training.models import load_model
from shipyard.training.recipe import Model, load_recipe
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ROOT = Path(__file__).parents[2]
COMMON = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {
    "rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, "model_type": "llama", "tie_word_embeddings": True},
    "llama3": {**COMMON, "model_type": "llama", "rope_parameters": LLAMA3, "tie_word_embeddings": False},
    "qwen2": {**COMMON, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**COMMON, "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": False},
}


def random_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES[family]), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # norms and biases too
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_model(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    save_litgpt(model, tmp_path, family)
    back = load_litgpt(tmp_path, torch.float32)
    ours, theirs = model.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert back.config.tie_word_embeddings == FAMILIES[family]["tie_word_embeddings"]
    ids_BT = torch.arange(100)[None] % 384
    with torch.no_grad():
        assert model(ids_BT).logits.equal(back(ids_BT).logits)


LITGPT = os.environ.get("LITGPT_PYTHON") or str(ROOT / ".venv-litgpt/bin/python")
JUDGE = """
import sys, torch
from pathlib import Path
from litgpt import GPT, Config
for folder in map(Path, sys.argv[1:]):
    model = GPT(Config.from_file(folder / "model_config.yaml")).eval()
    model.load_state_dict(torch.load(folder / "lit_model.pth", weights_only=True))
    with torch.no_grad():
        torch.save(model(torch.arange(100)[None] % 384), folder / "logits.pt")
"""


def test_litgpt_computes_the_same_logits(tmp_path: Path) -> None:
    if not Path(LITGPT).is_file():
        pytest.skip("LitGPT is in no environment of its own here; shipyard doctor says how to make .venv-litgpt")
    folders = [tmp_path / family for family in FAMILIES]
    for folder in folders:
        folder.mkdir()
        save_litgpt(random_model(folder.name), folder, folder.name)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([LITGPT, "-c", JUDGE, *map(str, folders)], check=True, env=environment, timeout=600)
    for folder in folders:
        theirs = torch.load(folder / "logits.pt", weights_only=True)
        with torch.no_grad():
            ours = random_model(folder.name)(torch.arange(100)[None] % 384).logits
        assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max(), folder.name


def test_trained_from_litgpt_and_exported_to_it(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> None:
    """As a user does: model.name is LitGPT's directory; the run's model goes back, with a certificate."""
    start = tmp_path / "lit"
    assert run_command(["export", str(tiny_model), "--to", "litgpt", "--out", str(start)]) == 0
    assert is_litgpt(start)
    certificates = json.loads((start / "litgpt.certificate.json").read_text())
    assert certificates["passed"]
    first, second = (load_model(Model(name=str(path)), trains_all=True) for path in (tiny_model, start))
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert second.training
    tree = {
        "method": "sft", "steps": 1, "model": {"name": str(start), "dtype": "float32"},
        "data": {"train": str(chat_rows)}, "batch": {"size": 4, "micro": 4}, "optim": {"lr": 1e-2},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    run = train(load_recipe(tmp_path / "r.yaml", [f"run_dir={tmp_path / 'run'}"]))
    back = load_litgpt(export(run, tmp_path / "out", "litgpt"), torch.float32)
    trained = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    assert all(a.equal(b) for a, b in zip(trained.parameters(), back.parameters(), strict=True))
    assert not all(a.equal(b) for a, b in zip(first.parameters(), back.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_class_name": "LayerNorm"}, ["norm_class_name: LayerNorm", "RMSNorm"]),
        ({"rotary_percentage": 0.25}, ["rotary_percentage: 0.25"]),
        ({"sliding_window_size": 64}, ["sliding_window_size: 64"]),
        ({"n_layer": 3}, ["does not fit", "layers.2"]),
    ],
)
def test_what_has_no_counterpart_is_named(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    save_litgpt(random_model("llama"), tmp_path, "llama")
    config = yaml.safe_load((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(yaml.safe_dump(config | change))
    with pytest.raises(ValueError) as caught:
        load_litgpt(tmp_path, torch.float32)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_other_families_are_refused(tmp_path: Path) -> None:
    gpt2 = {"model_type": "gpt2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    with pytest.raises(ValueError, match=r"to: litgpt cannot hold this model: model type 'gpt2'.*use --to hf"):
        save_litgpt(AutoModelForCausalLM.from_config(AutoConfig.for_model(**gpt2)), tmp_path, "x")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(os.environ["BOMB"]),)


def test_a_pickle_that_runs_code_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_litgpt(random_model("llama"), tmp_path, "llama")
    monkeypatch.setenv("BOMB", str(tmp_path / "went-off"))
    torch.save({"model": Bomb()}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="holds more than tensors, and nothing in it was run") as caught:
        load_litgpt(tmp_path, torch.float32)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "went-off").exists()
