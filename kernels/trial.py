"""Before a run takes the Triton kernels on a card, one layer of its model computes there with them and without.

Kernels are proven in an interpreter, under every compiler, and on the cards that were at hand. The card, the driver and
the Triton of a run are its own. A layer of the model's widths, with random weights, takes some packed documents through
both paths; what Triton compiles for that, the run finds compiled.
"""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from .huggingface import KernelPath, plug_path

LENGTHS = (130, 1, 65, 64, 252)
"""Documents: longer than a tile, shorter, as long, and borders inside tiles."""
BARS = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.05}
"""Root mean square of a difference over that of the PyTorch path's numbers. A wrong mask or border comes near 1."""
VOCABULARY = 256


def first_fault(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """What the Triton path of a model computes otherwise than PyTorch's there, in one clause; empty if nothing.

    Keeps nothing on the device but what Triton compiled, and leaves the random numbers of the run alone.
    """
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(0)
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(_short(config), attn_implementation="sdpa", dtype=dtype)
            wanted, got = _results(model, "torch"), _results(model, "triton")
    except Exception as error:  # a compiler's, a driver's: whatever it is, the run has another way
        return f"ends in {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    for name, theirs in wanted.items():
        off = float((got[name] - theirs).square().mean().sqrt() / theirs.square().mean().sqrt().clamp(min=1e-30))
        if not off <= BARS[dtype]:
            return f"is {off:.2g} off PyTorch's code in {name} (at most {BARS[dtype]:g}, relative)"
    return ""


def _short(config: PretrainedConfig) -> PretrainedConfig:
    """One layer of each kind, and few words."""
    short: Any = copy.deepcopy(config)
    kinds = sorted(set(getattr(config, "layer_types", None) or ("full_attention",)))
    short.num_hidden_layers, short.vocab_size, short.pad_token_id = len(kinds), VOCABULARY, None
    if getattr(config, "layer_types", None):
        short.layer_types = kinds
    if hasattr(config, "first_k_dense_replace"):  # experts run no kernel of their own
        short.first_k_dense_replace = len(kinds)
    return short


def _results(model: Any, path: KernelPath) -> dict[str, torch.Tensor]:
    """Loss and gradients of the weights, fp32, through one path."""
    device = next(model.parameters()).device
    ids = (torch.arange(sum(LENGTHS), device=device) * 37 % VOCABULARY)[None]
    positions = torch.cat([torch.arange(length, device=device) for length in LENGTHS])[None]
    plugged = plug_path(model, path)
    try:
        model.zero_grad()
        loss = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss
        loss.backward(torch.full_like(loss, sum(LENGTHS)))  # a mean's gradients are too small for fp16
    finally:
        plugged.remove()
    found = {f"the gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().float() for name, tensor in {"the loss": loss, **found}.items()}
