"""The trial of the kernels before a run: silent where both paths agree, a clause where a kernel is wrong or fails."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shipyard.kernels import huggingface
from shipyard.kernels.trial import first_fault
from transformers import LlamaConfig, MistralConfig

CPU = torch.device("cpu")
CONFIG = dict(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1, head_dim=64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_right_kernels_pass_and_leave_nothing(dtype: torch.dtype) -> None:
    config = MistralConfig(**CONFIG, sliding_window=40, num_hidden_layers=3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert first_fault(config, CPU, dtype) == ""
    assert torch.equal(torch.get_rng_state(), before)
    assert (config.num_hidden_layers, config.vocab_size) == (3, 32000)


def no_borders(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Documents that see each other."""
    return lambda q, k, v, cu, **options: attend(q, k, v, cu[[0, -1]], **options)


def no_gradient_of_k(attend: Callable[..., Any]) -> Callable[..., Any]:
    return lambda q, k, v, cu, **options: attend(q, k.detach() + 0 * k, v, cu, **options)


def larger(norm: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, weight, eps: norm(x, weight * 1.5, eps)


def fails(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no descriptor for you\nand more")

    return run


@pytest.mark.parametrize(
    ("name", "spoil", "clause"),
    [
        ("flash_attention", no_borders, r"is [\d.]+ off PyTorch's code in the "),
        ("flash_attention", no_gradient_of_k, r"in the gradient of model.layers.0.self_attn.k_proj.weight \(at most"),
        ("rms_norm", larger, r"is [\d.]+ off PyTorch's code in the "),
        ("rope", fails, r"ends in RuntimeError: no descriptor for you$"),
    ],
)
def test_a_wrong_kernel_is_named_by_what_it_changes(name: str, spoil: Callable, clause: str, monkeypatch) -> None:
    monkeypatch.setattr(huggingface, name, spoil(getattr(huggingface, name)))
    fault = first_fault(LlamaConfig(**CONFIG), CPU, torch.bfloat16)
    assert re.search(clause, fault), fault
