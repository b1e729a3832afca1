"""What one rank's memory holds at the worst moment, by category: exact state, measured activations, one margin.

State comes from launch/state.py, activations from launch/footprint.py. The one number that is neither counted nor
measured is the margin for fragmentation.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FRAGMENTATION = 0.05
"""Of everything on the card: what the caching allocator reserves and cannot use. torchtitan's reserved peaks
(docs/planner.md) are 0 to 9 % above the allocated bytes predicted for them."""
SHAPES = Path(__file__).with_name("shapes")


def read_shape(name: str) -> dict[str, Any]:
    """Return the model config launch/shapes/NAME.json. Raises ValueError that lists the shapes there are."""
    path = SHAPES / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(item.stem for item in SHAPES.glob("*.json")))
        raise ValueError(f"model.shape: {name!r} is not in launch/shapes; choose one of {known}")
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the worst moment; `host` is offloaded state, not on the card."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    margin: int
    host: int

    @property
    def total(self) -> int:
        """Bytes on the card."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers + self.margin

    def rows(self) -> list[tuple[str, int]]:
        """(category, bytes), in the order they are filled."""
        names = ("weights", "gradients", "optimizer", "activations", "buffers", "margin")
        rows = [(name, getattr(self, name)) for name in names]
        return [*rows, ("offloaded (host)", self.host)] if self.host else rows


def memory_of(work: Any, footprint: Any = None, rollout_bytes: int = 0) -> Memory:
    """Return what a launch.workload.Workload holds: at the loss or in the last block's backward, or in the optimizer's
    step, whichever is more. `rollout_bytes` is a cache of keys and values that is held beside."""
    from .footprint import measure
    from .state import state_of

    state = state_of(work)
    activations = activations_of(work, footprint or measure(work.one_pass())) + rollout_bytes
    buffers = state.buffers
    if state.step_scratch > activations + buffers:
        activations, buffers = 0, state.step_scratch
    held = state.weights + state.gradients + state.optimizer + activations + buffers
    margin = round(FRAGMENTATION * held)
    return Memory(state.weights, state.gradients, state.optimizer, activations, buffers, margin, state.host)


def activations_of(work: Any, footprint: Any) -> int:
    """Bytes of activations at the worst moment of the fullest rank.

    A pipeline's first stage holds those of as many micro-batches as there are stages after it, with interleaved pieces
    some more (Narayanan et al. 2021, section 2.2), but of no more than a step has. Ranks that share the residual stream
    gather it for two products at a time, and DTensor's loss over a cut vocabulary makes one fp32 copy of the logits
    more than the fused one.
    """
    if not work.sequence_parallel:
        return round(_held(work, footprint))
    config = json.loads(work.config)
    tokens = work.micro * work.tokens // work.context
    gathered = 2 * 2 * tokens * config["hidden_size"]
    unfused = 0 if work.loss != "whole" or work.pipeline > 1 else 4 * tokens * config["vocab_size"] // work.tensor
    return round(_held(work, footprint) / work.tensor) + gathered + unfused


def _held(work: Any, footprint: Any) -> float:
    if work.pipeline == 1:
        return max(footprint.peak_with(footprint.layers), footprint.block_peak_with(footprint.layers) + _unpacked(work))
    stage = footprint.layers / work.pipeline
    first = footprint.block_peak_with(stage * in_flight(work)) + kept_edges(work) * _edge(work)
    return max(first, footprint.peak_with(stage) + (work.rounds - 1) * _logits(work))


def in_flight(work: Any) -> float:
    """Micro-batches whose activations a pipeline's first rank holds at once."""
    warm = work.pipeline
    if work.chunks > 1:
        warm *= 1 + (work.pipeline - 1) / (work.pipeline * work.chunks)
    return min(work.rounds, warm)


def kept_edges(work: Any) -> float:
    """Tensors between stages that torch.distributed.pipelining (stage.py) keeps on a pipeline's first rank beside what
    autograd saves: each piece's outputs until their backward pass, and what gradients and inputs are received into, a
    buffer for every micro-batch of a step. Inputs in flight are the first block's, and counted there."""
    outputs = work.chunks * in_flight(work)
    inputs = (work.chunks - 1) * (work.rounds - in_flight(work))
    return outputs + work.chunks * work.rounds + inputs


def _edge(work: Any) -> int:
    """Bytes of the residual stream of one micro-batch."""
    return 2 * work.micro * work.tokens // work.context * json.loads(work.config)["hidden_size"]


def _logits(work: Any) -> int:
    """Bytes of one micro-batch's logits, which the last stage keeps until the step ends, to return them."""
    return 2 * work.micro * work.tokens // work.context * json.loads(work.config)["vocab_size"]


def _unpacked(work: Any) -> int:
    """Bytes of the largest 4-bit weight while a product reads it in full."""
    from .state import parameters

    if work.quantize != "nf4":
        return 0
    return 2 * max(p.numbers for p in parameters(work.config, work.lora_rank, work.lora_targets) if p.linear)


def rollout_cache(recipe: Any, config: Mapping[str, Any], ranks: int) -> int:
    """Keys and values of one rank's share of GRPO's rollouts, prompt and reply; 0 for other methods."""
    if recipe.method != "grpo":
        return 0
    sequences = -(-recipe.batch.size // ranks)
    length = recipe.data.max_tokens + recipe.grpo.max_new_tokens
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    width = 4 if recipe.model.dtype == "float32" else 2
    return sequences * length * config["num_hidden_layers"] * 2 * heads * head * width
