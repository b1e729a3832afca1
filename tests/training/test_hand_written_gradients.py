"""Gradients written by hand where autograd's would cost too many passes over memory: they equal autograd's."""

import copy
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from shipyard.training import lora, loss, low_rank
from shipyard.training.activations import recompute
from shipyard.training.recipe import Lora
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize(("temperature", "spent"), [(1.0, False), (1.0, True), (0.7, True)])
def test_log_probs_and_log_z_have_autograds_gradient(temperature: float, spent: bool, monkeypatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 64 * 8)  # 50 rows in chunks of 8
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(50, 16), torch.randn(64, 16, requires_grad=True), torch.randint(0, 64, (50,))
    up_logp, up_z = torch.randn(50), torch.randn(50)

    scaled = (hidden @ head.T) / temperature
    wanted_logp, wanted_z = -F.cross_entropy(scaled, targets, reduction="none"), scaled.logsumexp(-1)
    (wanted,) = torch.autograd.grad((wanted_logp * up_logp + wanted_z * up_z).sum(), head)

    logp, log_z = loss.gather_terms(hidden @ head.T, targets, temperature, spent)
    torch.testing.assert_close(logp, wanted_logp)
    torch.testing.assert_close(log_z, wanted_z)
    (got,) = torch.autograd.grad((logp * up_logp + log_z * up_z).sum(), head)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_logits_that_are_spent_cannot_be_used_twice_unnoticed() -> None:
    logits = torch.randn(5, 7, requires_grad=True) * 1.0
    logp, _ = loss.gather_terms(logits, torch.arange(5), spent=True)
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


def _gradients(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=torch.arange(3, 17)[None]).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_adapters_in_one_pass_are_peft_adapters(tiny_model: Path, monkeypatch) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    model = lora.add_adapters(base, Lora(rank=4, alpha=12), seed=0).double()
    layers = [layer for layer in model.modules() if type(layer) is low_rank.Linear]
    for layer in layers:  # B starts at zero, which would hide A's gradient
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    passes = []
    apply = low_rank.LowRank.apply
    monkeypatch.setattr(low_rank.LowRank, "apply", lambda *arguments: passes.append(1) or apply(*arguments))
    logits, gradients = _gradients(model)
    assert len(passes) == len(layers) == 14
    with model.disable_adapter(), torch.no_grad():
        plain = model(input_ids=torch.arange(3, 17)[None]).logits
    assert len(passes) == 14
    assert not torch.allclose(plain, logits)

    stock = copy.deepcopy(model)
    for layer in stock.modules():
        if type(layer) is low_rank.Linear:
            del layer.forward
    wanted, wanted_gradients = _gradients(stock)
    assert len(passes) == 14
    torch.testing.assert_close(logits, wanted)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


@pytest.mark.parametrize("how", ["full", "selective"])
def test_checkpointed_blocks_keep_the_gradient(how: Literal["full", "selective"], tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    model = lora.add_adapters(base, Lora(rank=4), seed=0).double().train()
    for layer in model.modules():
        if type(layer) is low_rank.Linear:
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    logits, gradients = _gradients(model)
    recompute(model, how, compiled=False)
    model.enable_input_require_grads()
    again, same = _gradients(model)
    torch.testing.assert_close(again, logits)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, msg=name)


def test_a_copied_model_runs_on_its_own_adapters(tiny_model: Path) -> None:
    model = lora.add_adapters(AutoModelForCausalLM.from_pretrained(tiny_model), Lora(rank=2), seed=0)
    twin = copy.deepcopy(model)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        before = twin(input_ids=ids).logits
        for layer in model.modules():
            if type(layer) is low_rank.Linear:
                layer.lora_B["default"].weight.fill_(1.0)
        assert torch.equal(twin(input_ids=ids).logits, before)
        assert not torch.allclose(model(input_ids=ids).logits, before)
