"""Adapters on families whose layers are no plain linear ones: trained, merged, and what they leave alone."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from runs_for_tests import recipe_and_run
from safetensors.torch import load_file
from shipyard.training.experts import BIAS
from shipyard.training.lora import add_adapters, attention_layers, merge
from shipyard.training.models import load_model
from shipyard.training.recipe import Lora, Model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

COMMON = {"vocab_size": 384, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {**COMMON, "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "deepseek": {
        **COMMON, "model_type": "deepseek_v3", "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
        "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "max_position_embeddings": 512,
    },
}  # fmt: skip
ATTENTION = {
    "gpt2": ["attn.c_proj", "c_attn"],  # its MLP has a c_proj, too
    "deepseek": ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"],
}


def make_base(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES[family]), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", "attention"])
def test_the_merge_of_every_family_is_what_was_trained(
    family: str, targets: Literal["all-linear", "attention"], tmp_path: Path
) -> None:
    base = load_model(Model(name=str(make_base(tmp_path, family)), dtype="float32"), trains_all=False)
    if targets == "attention":
        assert attention_layers(base) == ATTENTION[family]
    model: Any = add_adapters(base, Lora(rank=2, targets=targets), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    adapters = [name for name, _ in model.named_parameters() if "lora_" in name]
    reached = {name.split(".lora_")[0].replace(".base_layer", "") for name in adapters}
    if targets == "attention":
        assert all(".self_attn." in name or ".attn." in name for name in reached)
    assert len(reached) >= 2 * len(ATTENTION[family])
    plain = merge(model, str(tmp_path), torch.float32).eval()
    ids_BT = torch.arange(3, 83)[None]
    with torch.no_grad():
        trained = model.eval()(input_ids=ids_BT).logits
        with model.disable_adapter():
            untrained = model(input_ids=ids_BT).logits
        distance = float((plain(input_ids=ids_BT).logits - trained).abs().max())
    assert distance < 1e-4
    assert float((untrained - trained).abs().max()) > 100 * distance


def test_a_frozen_router_is_not_balanced(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> None:
    """Its bias is no part of an adapter, so that moved biases would be lost with the merged model, and with them off
    the reference of DPO would not stand still."""
    base = make_base(tmp_path / "base", "deepseek")
    tree = {
        "method": "sft", "steps": 2, "model": {"name": str(base), "tokenizer": str(tiny_model), "dtype": "float32"},
        "lora": {"rank": 2, "targets": "attention"}, "data": {"train": str(chat_rows)}, "optim": {"lr": 1e-2},
    }  # fmt: skip
    _, run = recipe_and_run(tmp_path, tree)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, run / "model"))
    name = f"model.layers.1.mlp.gate.{BIAS}"
    assert after[name].equal(before[name])
    changed = {name for name in before if not after[name].equal(before[name])}
    assert {name.split(".")[-2] for name in changed} == set(ATTENTION["deepseek"])


def test_what_is_merged_onto_a_base_that_is_stored_in_nf4_is_whole(tiny_model: Path, chat_rows: Path, tmp_path) -> None:
    """And says so: with the base's own word for it transformers would take whole weights for packed ones."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=nf4, dtype=torch.float32).save_pretrained(base)
    tree = {
        "method": "sft", "steps": 1, "data": {"train": str(chat_rows)}, "lora": {"rank": 2},
        "model": {"name": str(base), "tokenizer": str(tiny_model), "dtype": "float32", "quantize": "nf4"},
    }  # fmt: skip
    _, run = recipe_and_run(tmp_path, tree)
    assert "quantization_config" not in json.loads((run / "model" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(run / "model")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match=r"is stored quantized .bitsandbytes 4 bit.; set model.quantize: nf4"):
        load_model(Model(name=str(base), dtype="float32"), trains_all=False)
