"""What the ranks of a pipeline hold, action by action: torch.distributed.pipelining's schedules over fully sharded
pieces.

A rank of a pipeline has no one worst moment that a formula names. Activations are most when its warm-up ends, and then
it has no gradients yet; whole gradients grow with the first backward pass of each piece of the model and are gone with
its last one; the last stage's logits add up till the step ends. So the schedule is walked.
tests/launch/test_plan_pipeline.py compares every moment with what real ranks hold.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .state import Parameter, parameters
from .workload import Workload


@dataclass(frozen=True)
class Action:
    """One micro-batch's forward or backward pass through one of a rank's pieces, or the end of a piece's step: its
    gradients are scattered and its weights no longer whole."""

    kind: Literal["forward", "backward", "reduce"]
    piece: int
    """Of this rank's, in the order of the model."""
    micro: int


@dataclass(frozen=True)
class Moment:
    """What a rank holds right before an action, or right after it."""

    blocks: int
    """Activations, in blocks times micro-batches."""
    edges: int
    """Tensors of one micro-batch's residual stream that are held beside what autograd saves."""
    logits: int
    """Micro-batches whose logits wait for the end of the step, to be returned."""
    gathered: tuple[bool, ...]
    """Of each piece: its weights are whole."""
    summed: tuple[bool, ...]
    """Of each piece: its gradients add up, whole and in fp32."""
    reduced: tuple[bool, ...]
    """Of each piece: its gradients are cut."""


def split(work: Workload) -> tuple[int, ...]:
    """Blocks of each piece of the model, as torchtitan cuts it (generate_split_points): those left over go to the
    pieces after the first."""
    pieces = work.pipeline * work.chunks
    if pieces == 1:
        return (work.layers(),)
    each, over = divmod(work.layers(), pieces)
    middle = [each + 1] * min(over, pieces - 2) + [each] * max(0, pieces - 2 - over)
    return (each, *middle, work.layers() - each - sum(middle))


def pieces_of(work: Workload, rank: int) -> tuple[int, ...]:
    """Numbers of the rank's pieces in the model."""
    return tuple(rank + chunk * work.pipeline for chunk in range(work.chunks))


def most_blocks(work: Workload) -> int:
    """Blocks of the rank that has most: the others wait for it."""
    blocks = split(work)
    return max(sum(blocks[piece] for piece in pieces_of(work, rank)) for rank in range(work.pipeline))


def stages_of(work: Workload) -> list[list[Parameter]]:
    """Each rank's parameters; all of them without a pipeline."""
    return [
        [parameter for piece in pieces_of(work, rank) for parameter in stage_parameters(work, piece)]
        for rank in range(work.pipeline)
    ]


def stage_parameters(work: Workload, piece: int) -> list[Parameter]:
    """Parameters of one piece: its blocks', the embedding's in the first, all others in the last."""
    whole = parameters(work.config, work.lora_rank, work.lora_targets)
    blocks = split(work)
    if len(blocks) == 1:
        return list(whole)
    first = sum(blocks[:piece])
    mine = {str(number) for number in range(first, first + blocks[piece])}
    last = piece == len(blocks) - 1
    return [
        parameter
        for parameter in whole
        if (parameter.block and _number(parameter) in mine)
        or (not parameter.block and (piece == 0 if "embed" in parameter.name else last))
    ]


def _number(parameter: Parameter) -> str:
    return parameter.name.replace(".h.", ".layers.").split(".layers.")[1].split(".")[0]


def schedule(work: Workload, rank: int) -> Iterator[Action]:
    """A rank's actions in torch's order: Schedule1F1B, or ScheduleInterleaved1F1B for several pieces a rank.

    Warm-up: forward passes till the first gradient can be there; then one forward, one backward; then the backward
    passes that are left. Several pieces take turns of as many micro-batches as there are ranks (Narayanan et al. 2021,
    section 2.2).
    """
    total = work.chunks * work.rounds
    turn = work.rounds // max(1, work.rounds // work.pipeline)
    after = work.pipeline - 1 - rank
    warm = min(total, after if work.chunks == 1 else (work.chunks - 1) * turn + 2 * after)
    seen = {"forward": [0] * work.chunks, "backward": [0] * work.chunks}

    def actions(kind: Literal["forward", "backward"], step: int) -> Iterator[Action]:
        piece = step // turn % work.chunks
        piece = piece if kind == "forward" else work.chunks - 1 - piece
        micro = seen[kind][piece]
        seen[kind][piece] += 1
        yield Action(kind, piece, micro)
        if kind == "backward" and micro == work.rounds - 1:
            yield Action("reduce", piece, micro)

    for step in range(total + warm):
        if step < total:
            yield from actions("forward", step)
        if step >= warm:
            yield from actions("backward", step - warm)


def walk(work: Workload, rank: int) -> Iterator[tuple[Action, Moment, Moment]]:
    """Each action of a rank with what is held before and after it.

    What stage.py keeps beside autograd: each piece's outputs until their backward pass, a buffer for the input and one
    for the output's gradient of every micro-batch of a step. A block that recomputes saves its input, so one in flight
    is counted there.
    """
    blocks = [split(work)[piece] for piece in pieces_of(work, rank)]
    first, last = rank == 0, rank == work.pipeline - 1
    flight = [0] * work.chunks
    gathered, summed, reduced = ([False] * work.chunks for _ in range(3))
    logits = 0

    def now() -> Moment:
        receivers = flight[1 if first else 0 :]
        inputs = work.rounds * len(receivers) - (sum(receivers) if work.checkpointing != "none" else 0)
        senders = flight[: -1 if last else None]
        edges = inputs + sum(senders) + work.rounds * len(senders)
        held = sum(count * size for count, size in zip(flight, blocks, strict=True))
        return Moment(held, edges, logits, tuple(gathered), tuple(summed), tuple(reduced))

    for action in schedule(work, rank):
        before, piece = now(), action.piece
        if action.kind == "forward":
            flight[piece] += 1
            gathered[piece] = True
            logits += last and piece == work.chunks - 1
        elif action.kind == "backward":
            flight[piece] -= 1
            summed[piece] = True
        else:
            gathered[piece] = summed[piece] = False
            reduced[piece] = True
        yield action, before, now()
