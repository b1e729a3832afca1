"""The memory table: exact counts, and sizes that move the right way."""

import pytest
import torch
from shipyard.launch.memory import count_lora, count_parameters, estimate, read_shape
from shipyard.training.recipe import parse_recipe
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def _on_meta(shape: str, **changes: object) -> PreTrainedModel:
    config = AutoConfig.for_model(**(read_shape(shape) | changes))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


@pytest.mark.parametrize(("shape", "total"), [("smollm2-135m", 134_515_008), ("llama3-8b", 8_030_261_248)])
def test_parameters_are_counted_exactly(shape: str, total: int) -> None:
    assert sum(count_parameters(read_shape(shape)).values()) == total
    assert sum(parameter.numel() for parameter in _on_meta(shape).parameters()) == total


@pytest.mark.parametrize("targets", ["all-linear", "attention"])
def test_lora_weights_are_counted_exactly(targets: str) -> None:
    from shipyard.training.lora import add_adapters
    from shipyard.training.recipe import Lora

    model = add_adapters(_on_meta("smollm2-135m", num_hidden_layers=2), Lora(rank=8, targets=targets), seed=0)  # type: ignore[arg-type]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count_lora(read_shape("smollm2-135m") | {"num_hidden_layers": 2}, 8, targets) == trained


def _table(world_size: int = 8, **changes: object) -> dict[str, int]:
    tree = {"method": "sft", "steps": 1, "model": {"name": "x"}, "data": {"train": "rows.jsonl"}}
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        tree[section] = {**tree.get(section, {}), leaf: value} if leaf else value  # type: ignore[dict-item]
    return dict(estimate(parse_recipe(tree), read_shape("llama3-8b"), world_size))


def test_sizes_follow_the_recipe() -> None:
    full = _table(parallel__engine="ddp")
    assert full["weights"] == full["gradients"] == 4 * 8_030_261_248
    assert full["optimizer"] == 8 * 8_030_261_248
    one, two, three = (_table(parallel__engine=f"zero{stage}") for stage in (1, 2, 3))
    assert one["optimizer"] == 12 * 8_030_261_248 // 8
    assert two["gradients"] == one["gradients"] // 8
    assert three["weights"] == one["weights"] // 8
    qlora = _table(model__quantize="nf4", lora__rank=16)
    assert 5.5e9 < qlora["weights"] < 6e9
    assert qlora["gradients"] < 0.2e9
    checkpointed = _table(model__activation_checkpointing="full")
    assert checkpointed["activations"] < full["activations"] / 10
    assert "optimizer (host)" in _table(parallel__engine="zero2", parallel__offload="cpu")


def test_unknown_shape_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"model\.shape: 'llama9' .* llama3-8b, .*smollm2-135m"):
        read_shape("llama9")
