"""What one rank holds between two passes: weights, gradients and optimizer state, to the byte, by engine.

Counted from the shapes of the real model's parameters (transformers' and PEFT's, on the meta device) and from how each
engine cuts them: DeepSpeed pads groups of parameters and rounds each partition up, FSDP2 cuts rows. Tests compare it
with what the engines really allocate. Offloaded state is counted as the host's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from .footprint import Pass, build
from .workload import Workload

WIDTH = {"float32": 4, "bfloat16": 2}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits, one 8-bit scale per 64 weights, one fp32 scale per 256 of those
# DeepSpeed's defaults, in numbers, not bytes
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
PERSISTENT = 100_000


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model, whole."""

    name: str
    shape: tuple[int, ...]
    trained: bool
    block: bool
    """Part of a transformer block: cut by tensor-parallel ranks, and of one pipeline stage."""
    linear: bool

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class State:
    """Bytes on one rank; the fullest rank where they differ."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    """What the engine allocates beside them: buckets, and weights that are whole while they are used."""
    host: int = 0
    step_scratch: int = 0
    """What the optimizer's own step needs for a moment, when activations are gone."""


@lru_cache(maxsize=64)
def parameters(config: str, lora_rank: int = 0, lora_targets: str = "all-linear") -> tuple[Parameter, ...]:
    """Every parameter of a model, each once (tied ones too), in the order that optimizers see them."""
    import json

    layers = json.loads(config)["num_hidden_layers"]
    model = build(Pass(config, 1, 1, lora_rank=lora_rank, lora_targets=lora_targets), layers)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    return tuple(
        Parameter(
            name,
            tuple(p.shape),
            p.requires_grad,
            ".layers." in name or ".h." in name,
            id(p) in linear and "lm_head" not in name and "lora_" not in name,
        )
        for name, p in model.named_parameters()
    )


def state_of(work: Workload, stage: Sequence[Parameter] | None = None) -> State:
    """Return what the fullest rank holds under the workload's engine, of the model's parameters, or of a pipeline
    stage's (buffers are a whole model's; launch/memory.py has a stage's)."""
    whole = parameters(work.config, work.lora_rank, work.lora_targets) if stage is None else stage
    counted = [cut(parameter, work) for parameter in whole]
    held = {"ddp": _ddp, "fsdp2": _fsdp2, "zero1": _zero12, "zero2": _zero12, "zero3": _zero3}[work.engine]
    state = held(counted, work)
    if work.reference:
        frozen = sum(parameter.numbers for parameter in counted) * WIDTH[work.dtype]
        state = State(state.weights + frozen, *_rest(state))
    return state


def _rest(state: State) -> tuple[int, int, int, int, int]:
    return state.gradients, state.optimizer, state.buffers, state.host, state.step_scratch


def cut(parameter: Parameter, work: Workload) -> Parameter:
    """A parameter as tensor-parallel ranks hold it: matrices by columns."""
    rows, *columns = parameter.shape
    if work.tensor > 1 and columns and (parameter.block or work.sequence_parallel):
        rows = -(-rows // work.tensor)
    return Parameter(parameter.name, (rows, *columns), parameter.trained, parameter.block, parameter.linear)


def _frozen_bytes(parameter: Parameter, work: Workload) -> float:
    quantized = work.quantize == "nf4" and parameter.linear
    return parameter.numbers * (NF4_BYTES if quantized else WIDTH[work.dtype])


def _moment_bytes(parameter: Parameter, work: Workload) -> int:
    """AdamW keeps two fp32 moments; Muon one, of the matrices inside blocks."""
    return 4 if work.optimizer == "muon" and parameter.block and len(parameter.shape) == 2 else 8


def _ddp(counted: list[Parameter], work: Workload) -> State:
    """Everything on every rank; buckets for the all-reduce are a second copy of the gradients."""
    trained = [parameter for parameter in counted if parameter.trained]
    numbers = sum(parameter.numbers for parameter in trained)
    width = WIDTH[work.adapter_dtype] if work.lora_rank else 4
    frozen = sum(_frozen_bytes(parameter, work) for parameter in counted if not parameter.trained)
    moments = sum(parameter.numbers * _moment_bytes(parameter, work) for parameter in trained) * width // 4
    buckets = width * numbers if work.shards > 1 else 0
    if work.autocast:  # half-width copies of what products use, until the pass ends
        buckets += sum(2 * p.numbers for p in counted if p.linear or "lm_head" in p.name)
    return State(round(frozen) + width * numbers, width * numbers, moments, buckets, step_scratch=width * numbers)


def _fsdp2(counted: list[Parameter], work: Workload) -> State:
    """Rows of each parameter, rounded up. While a step accumulates, torch keeps whole fp32 gradients on every rank."""

    def local(parameter: Parameter) -> int:
        rows = -(-parameter.shape[0] // work.shards)
        return rows * (parameter.numbers // parameter.shape[0])

    trained = [parameter for parameter in counted if parameter.trained]
    width = WIDTH[work.dtype]
    numbers = sum(map(local, trained))
    frozen = sum(local(p) * _frozen_bytes(p, work) / p.numbers for p in counted if not p.trained)
    weights = round(frozen) + 4 * numbers
    gradients = 4 * (numbers if work.rounds == 1 else sum(p.numbers for p in trained))
    moments = sum(local(p) * _moment_bytes(p, work) for p in trained)
    block, root = _block_numbers(counted, work), sum(p.numbers for p in counted if not p.block)
    in_flight = 2  # the one that computes and the one that is gathered meanwhile
    largest = max((p.numbers for p in counted if not p.block), default=0)
    reducing = width + (
        4 if work.rounds == 1 else 0
    )  # of the block in backward; sums over rounds are sent at their end
    buffers = width * root + width * block * in_flight + reducing * block + width * largest
    if work.offload:
        return State(0, 0, 0, round(buffers), host=weights + gradients + moments)
    return State(weights, gradients, moments, round(buffers), step_scratch=4 * numbers)


def _block_numbers(counted: list[Parameter], work: Workload) -> int:
    return round(sum(p.numbers for p in counted if p.block) / work.layers())


def _groups(counted: list[Parameter]) -> list[list[Parameter]]:
    """Parameter groups as training/optim.py makes them: matrices, then vectors."""
    trained = [parameter for parameter in counted if parameter.trained]
    groups = [[p for p in trained if len(p.shape) >= 2], [p for p in trained if len(p.shape) < 2]]
    return [group for group in groups if group]


def _zero12(counted: list[Parameter], work: Workload) -> State:
    """DeepSpeed stages 1 and 2: flat groups padded to twice the ranks, an fp32 copy and moments of one part of each."""
    width, ranks = WIDTH[work.dtype], work.shards
    frozen = sum(_frozen_bytes(p, work) for p in counted if not p.trained)
    padded = [-(-sum(p.numbers for p in group) // (2 * ranks)) * 2 * ranks for group in _groups(counted)]
    weights = round(frozen) + width * sum(padded)
    parts = sum(size // ranks for size in padded)
    optimizer = 4 * parts + round(_moments_per_number(counted, work) * parts)
    owned = max(
        sum(_overlapping(group, size // ranks, rank) for group, size in zip(_groups(counted), padded, strict=True))
        for rank in range(min(ranks, 64))
    )
    whole = sum(p.numbers for p in counted if p.trained)
    accumulates = work.engine == "zero1" and work.rounds > 1
    gradients = width * (whole if accumulates else owned)
    bucket = 2 * width * REDUCE_BUCKET  # two, since reduction overlaps backward on a GPU
    if work.offload:
        return State(weights, 0, 0, bucket, host=optimizer + 4 * parts)
    return State(weights, gradients, optimizer, bucket, step_scratch=4 * max(size // ranks for size in padded))


def _moments_per_number(counted: list[Parameter], work: Workload) -> float:
    trained = [parameter for parameter in counted if parameter.trained]
    return sum(p.numbers * _moment_bytes(p, work) for p in trained) / max(1, sum(p.numbers for p in trained))


def _overlapping(group: list[Parameter], part: int, rank: int) -> int:
    """Numbers of the parameters that lie, wholly or partly, in one rank's part: DeepSpeed keeps their whole
    gradients."""
    start, total = 0, 0
    for parameter in group:
        end = start + parameter.numbers
        if start < part * (rank + 1) and end > part * rank:
            total += parameter.numbers
        start = end
    return total


def _zero3(counted: list[Parameter], work: Workload) -> State:
    """DeepSpeed stage 3: each parameter's part rounded up; small ones stay whole as well."""
    width, ranks = WIDTH[work.dtype], work.shards
    weights = width * sum(-(-p.numbers // ranks) for p in counted)
    persistent = width * sum(p.numbers for p in counted if p.numbers < PERSISTENT)
    trained = [parameter for parameter in counted if parameter.trained]
    part = sum(-(-p.numbers // ranks) for p in trained)
    optimizer = sum(-(-p.numbers // ranks) * (4 + _moment_bytes(p, work)) for p in trained)
    largest = max(p.numbers for p in counted)  # gathered whole however large, and its gradient is whole at first
    live = max(min(LIVE_PARAMETERS, sum(p.numbers for p in counted)), largest) + largest
    buffers = width * (REDUCE_BUCKET + live)
    if work.offload:
        return State(persistent, 0, 0, buffers, host=weights + width * part + optimizer)
    return State(weights + persistent, width * part, optimizer, buffers, step_scratch=4 * part)
