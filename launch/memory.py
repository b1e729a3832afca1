"""What one rank's memory holds at the worst moment, by category: exact state, measured activations, one margin.

State comes from launch/state.py, activations from launch/footprint.py. The one number that is neither counted nor
measured is the margin for fragmentation.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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

    footprint = footprint or measure(work.one_pass())
    if work.pipeline > 1:
        ranks = [moments_of(work, footprint, rank) for rank in range(work.pipeline)]
        return max((memory for moments in ranks for _, memory in moments), key=lambda memory: memory.total)
    state = state_of(work)
    activations = activations_of(work, footprint) + rollout_bytes
    buffers = state.buffers
    if state.step_scratch > activations + buffers:
        activations, buffers = 0, state.step_scratch
    return _with_margin(state, state.gradients, activations, buffers)


def _with_margin(state: Any, gradients: int, activations: int, buffers: int, reserved: int = 0) -> Memory:
    """Add up; `reserved` is what the allocator keeps for streams that do not need it now."""
    held = state.weights + gradients + state.optimizer + activations + buffers
    margin = round(FRAGMENTATION * held) + reserved
    return Memory(state.weights, gradients, state.optimizer, activations, buffers, margin, state.host)


def activations_of(work: Any, footprint: Any) -> int:
    """Bytes of activations at the worst moment, without a pipeline.

    Ranks that share the residual stream gather it for two products at a time, and DTensor's loss over a cut vocabulary
    makes one fp32 copy of the logits more than the fused one.
    """
    loss = footprint.peak_with(footprint.layers)
    if not work.sequence_parallel:
        return round(max(loss, footprint.block_peak_with(footprint.layers) + _unpacked(work)))
    return round(loss / work.tensor) + _gathered(work) + _unfused(work)


def moments_of(work: Any, footprint: Any, rank: int) -> Iterator[tuple[Any, Memory]]:
    """What one rank of a pipeline of fully sharded pieces holds at each moment of a step that may be its worst, and the
    action that the moment is part of.

    Backward passes do not scatter their gradients, which add up whole in fp32 till the piece's last one
    (FSDPModule.set_requires_gradient_sync), and weights stay whole as long (reshard_after_forward is off). FSDP gathers
    and scatters on streams of their own, and what a stream has had the allocator keeps for it: two blocks as they
    arrived, and the cut gradients of the step before. Those are reserved, and in the margin.
    """
    from .pipeline import pieces_of, split, stage_parameters, walk
    from .state import WIDTH, cut, state_of

    assert work.engine == "fsdp2", work.engine
    pieces = [stage_parameters(work, piece) for piece in pieces_of(work, rank)]
    alone, width = replace(work, rounds=1), WIDTH[work.dtype]
    state = state_of(alone, [parameter for piece in pieces for parameter in piece])
    whole = [sum(cut(parameter, work).numbers for parameter in piece) for piece in pieces]
    parts = [state_of(alone, piece).gradients for piece in pieces]
    blocks = [split(work)[piece] for piece in pieces_of(work, rank)]
    block = sum(cut(parameter, work).numbers for parameter in pieces[0] if parameter.block) // blocks[0]

    def memory(at: Any, activations: float, unfused: int = 0, more: int = 0) -> Memory:
        """`more`: gradients that are whole and not in `at` yet."""
        kept = at.edges * _edge(work) + at.logits * _logits(work)
        share = work.tensor if work.sequence_parallel else 1
        return _with_margin(
            state,
            4 * (_where(at.summed, whole) + more) + _where(at.reduced, parts),
            round((activations + kept) / share) + _gathered(work),
            width * (_where(at.gathered, whole) + (0 if unfused else block)) + unfused,
            sum(parts) - _where(at.reduced, parts) + 2 * width * block,
        )

    for action, before, after in walk(work, rank):
        if action.kind == "forward" and after.logits > before.logits:  # the loss has its own
            yield (
                action,
                memory(replace(after, logits=before.logits), footprint.peak_with(after.blocks), _unfused(work)),
            )
        elif action.kind == "backward":
            yield action, memory(before, footprint.block_peak_with(before.blocks))
            others = blocks[action.piece] - 1  # done when the last one begins
            made = 0 if before.summed == after.summed else others * block
            yield action, memory(before, footprint.block_peak_with(before.blocks - others), more=made)


def _where(held: Sequence[bool], sizes: Sequence[int]) -> int:
    return sum(size for size, is_held in zip(sizes, held, strict=True) if is_held)


def _gathered(work: Any) -> int:
    """Bytes of the residual stream, gathered for two products, where ranks share it."""
    return 2 * 2 * _tokens(work) * json.loads(work.config)["hidden_size"] if work.sequence_parallel else 0


def _unfused(work: Any) -> int:
    """Bytes of the logits' fp32 copy that a loss over a cut vocabulary makes."""
    if work.loss != "whole" or not work.sequence_parallel:
        return 0
    return 4 * _tokens(work) * json.loads(work.config)["vocab_size"] // work.tensor


def _tokens(work: Any) -> int:
    """Of one micro-batch, on one rank."""
    return work.micro * work.tokens // work.context


def _edge(work: Any) -> int:
    """Bytes of the residual stream of one micro-batch."""
    return _width(work) * _tokens(work) * json.loads(work.config)["hidden_size"]


def _logits(work: Any) -> int:
    """Bytes of one micro-batch's logits, which the last stage keeps until the step ends, to return them."""
    return _width(work) * _tokens(work) * json.loads(work.config)["vocab_size"]


def _width(work: Any) -> int:
    from .state import WIDTH

    return WIDTH[work.dtype]


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
