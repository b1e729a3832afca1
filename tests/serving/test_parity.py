"""Certificates fail for what they should: other weights, other tokens, numbers that are not finite."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from shipyard.serving.parity import Certificate, certify_merge, certify_safetensors, distance
from tiny_models import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "llama", "llama")


def test_distance_is_the_kl_of_next_token_distributions() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    found = distance([np.log(np.stack([p, p]))], [np.log(np.stack([p, q])) + 7.0], [[0, 2]])
    expected = float((p * np.log(p / q)).sum()) / 2
    assert found.mean_kl == pytest.approx(expected, rel=1e-6)
    assert found.top1_agreement == 0.5
    assert found.max_abs_logprob_difference == pytest.approx(0.0, abs=1e-6)  # token 2 after p, equal in both
    assert found.positions == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_a_certificate_does_not_pass_by_accident(bad: float) -> None:
    certificate = Certificate("a", "b", 1, 1, bad, 0.0, 1.0, True, True, budget=1e-3).judge()
    assert not certificate.passed
    assert "FAILED" in certificate.line()


def test_an_equal_copy_passes_and_one_changed_bit_fails(tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    assert certify_safetensors(model, tmp_path / "copy").passed
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name].view(torch.int16)[5, 7] ^= 1
    save_file(weights, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    certificate = certify_safetensors(model, tmp_path / "copy")
    assert not certificate.passed
    assert certificate.failures[-1] == f"tensor {name} differs"


def test_another_tokenizer_or_configuration_fails(tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps(tokenizer))
    certificate = certify_safetensors(model, tmp_path / "copy")
    assert (certificate.passed, certificate.token_ids_equal) == (False, False)

    shutil.copy(model / "tokenizer.json", tmp_path / "copy")
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 10000.0
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    certificate = certify_safetensors(model, tmp_path / "copy")
    assert not certificate.passed
    assert certificate.mean_kl > 1e-3


def test_a_merge_passes_and_a_forgotten_one_fails(model: Path) -> None:
    def load() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    torch.manual_seed(1)
    trained = get_peft_model(load(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    merged = get_peft_model(load(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    merged.load_state_dict(trained.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert certify_merge(trained, merged.merge_and_unload(), tokenizer).passed
    assert not certify_merge(trained, load(), tokenizer).passed
