"""`model.compile`: every layer runs compiled, one program serves all, and no layer falls back in silence."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from shipyard.kernels.huggingface import plug
from shipyard.training import models, recipe
from shipyard.training.lora import add_adapters
from torch import nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_llama(layers: int, adapters: bool) -> nn.Module:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2
    )
    model: nn.Module = LlamaForCausalLM(config)
    if adapters:
        model = add_adapters(model, recipe.Lora(rank=2), seed=1)  # pyright: ignore[reportArgumentType]
    plug(model)
    models.prepare(model, recipe.Model(name="tiny", compile=True), torch.device("cpu"))
    return model.train()


def run_once(model: nn.Module) -> tuple[int, int]:
    """The programs that a pass needed, and the calls that ran as written. No gradient: its programs take long to make
    and are as many."""
    with torch.no_grad():
        model(input_ids=torch.arange(24).reshape(2, 12), use_cache=False)
    frames = counters["frames"]
    return counters["stats"]["unique_graphs"], frames["total"] - frames["ok"]


@pytest.mark.parametrize("adapters", [False, True])
def test_one_program_serves_all_layers(adapters: bool) -> None:
    """More layers than the 8 programs that torch allows a function; a program each was 8 compiled layers of 30."""
    few = run_once(compiled_llama(2, adapters))
    torch._dynamo.reset()
    counters.clear()
    assert run_once(compiled_llama(12, adapters)) == few
    assert few[0] > 0
    assert few[1] == 0


def test_compiled_adapters_have_the_gradient() -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model: Any = compiled_llama(2, adapters=True)
        if not compiled:
            models.as_written(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide A's gradient
                torch.nn.init.normal_(parameter, std=0.1)
        ids = torch.arange(24).reshape(2, 12)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        results.append([each.grad for each in model.parameters() if each.grad is not None])
    assert counters["stats"]["unique_graphs"] > 0
    assert len(results[0]) == len(results[1]) == 28
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_layers_that_want_too_many_programs_are_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "PROGRAMS", 1)
    model = compiled_llama(2, adapters=False)
    run_once(model)
    with pytest.raises(ValueError, match=r"^model\.compile: .* more than 1 programs.*; set compile: false$"):
        model(input_ids=torch.arange(4)[None], use_cache=False)  # a gradient wants another
