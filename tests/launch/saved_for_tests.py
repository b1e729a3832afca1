"""A small model that really computes, and the bytes that autograd saves of it, for tests of the planner."""

import json
from collections.abc import Callable
from typing import Any

import torch
from shipyard.launch.footprint import Checkpointing, Pass, build, loss_of
from torch import Tensor, nn

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 211,
    "tie_word_embeddings": False,
}
PASSES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": "bfloat16"},
    "packed": {"packed": True},
    "recomputed": {"checkpointing": "full"},
    "adapters": {"lora_rank": 4},
}
"""Passes through the Triton kernels, by what they change of `pass_of("none")`."""


def pass_of(mode: Checkpointing, samples: int = 2, **changes: Any) -> Pass:
    return Pass(json.dumps(CONFIG | changes), samples, 48, mode, dtype="float32")


def real_model(what: Pass, layers: int) -> nn.Module:
    model: Any = build(what, layers).to_empty(device="cpu")
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain.model.rotary_emb = type(plain.model.rotary_emb)(config=plain.config)  # pyright: ignore
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


class Saved:
    """Bytes of distinct storages that autograd saves for backward and the weights do not hold already."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        self.sizes: dict[int, int] = {}
        self.kept: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.kept.append(tensor)  # so that no address is used twice
        return tensor


def saved_bytes(what: Pass, layers: int, plug: Callable[[nn.Module], None] = lambda model: None) -> int:
    model = real_model(what, layers)
    plug(model)
    saved = Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        loss_of(model, what)
    return sum(saved.sizes.values())
