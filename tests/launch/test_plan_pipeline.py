"""What a pipeline's ranks hold, action by action: the planner's walk against torch's own on real ranks."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed as dist
from saved_for_tests import CONFIG
from shipyard.launch.footprint import measure
from shipyard.launch.memory import memory_of, moments_of, read_shape
from shipyard.launch.pipeline import Action, Moment, most_blocks, pieces_of, schedule, split, stage_parameters, walk
from shipyard.launch.state import State, parameters, state_of
from shipyard.launch.workload import Workload
from torch import device, nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B
from torch.testing._internal.distributed.fake_pg import FakeStore

SCRIPT = Path(__file__).with_name("pipeline_on_ranks.py")
PLAIN = {"pipeline": 2, "layers": 5, "rounds": 4, "checkpointing": "none"}
PIECES = {"pipeline": 2, "chunks": 2, "layers": 6, "rounds": 2, "checkpointing": "full"}
MORE = [
    {"pipeline": 4, "layers": 6, "rounds": 5, "checkpointing": "none"},
    {"pipeline": 4, "chunks": 2, "layers": 9, "rounds": 4, "checkpointing": "full"},
    {"pipeline": 2, "chunks": 2, "layers": 5, "rounds": 6, "checkpointing": "full"},  # on two data-parallel ranks
    {"pipeline": 2, "layers": 3, "rounds": 2, "checkpointing": "none"},
]
VOCABULARY = 212  # even: two ranks hold equal rows


def _small(case: dict[str, Any], ranks: int) -> Workload:
    config = CONFIG | {"num_hidden_layers": case["layers"], "vocab_size": VOCABULARY}
    fields = {key: value for key, value in case.items() if key != "layers"}
    return Workload(json.dumps(config), ranks, tokens=48, micro=2, loss="whole", **fields)


def _big(**changes: Any) -> Workload:
    config = json.dumps(read_shape("llama3-405b"))
    return Workload(**{"config": config, "ranks": 64, "tokens": 64, "micro": 1, "rounds": 8, "pipeline": 8, **changes})


def _run(on_ranks: Callable[..., str], works: list[Workload]) -> list[list[list[dict[str, Any]]]]:
    """Of each workload and rank, the moments of a step."""
    keys = ("config", "pipeline", "rounds", "micro", "checkpointing")
    cases = [{"split": split(work), **{key: getattr(work, key) for key in keys}} for work in works]
    said = on_ranks(works[0].ranks, SCRIPT, json.dumps(cases))
    return [json.loads(line.split("FOUND ", 1)[1]) for line in said.splitlines() if "FOUND " in line]


def _name(work: Workload, rank: int, action: Action) -> str:
    piece = pieces_of(work, rank)[action.piece]
    return f"R{piece}" if action.kind == "reduce" else f"{action.kind[0].upper()}{piece}.{action.micro}"


def _state(at: Moment, pieces: list[tuple[State, int]]) -> int:
    """Bytes of weights, gradients and the optimizer at a moment, from each piece's own and its count of numbers."""
    total = 0
    for (state, numbers), gathered, summed, reduced in zip(pieces, at.gathered, at.summed, at.reduced, strict=True):
        total += state.weights + state.optimizer + 2 * numbers * gathered + 4 * numbers * summed
        total += state.gradients * reduced
    return total


def _compare(work: Workload, rank: int, found: list[dict[str, Any]]) -> None:
    """After each action bytes are equal. In each backward pass no more are held than planned, and less by no more than
    a block's gradients and its output's: the plan has all of the former beside the block's largest temporaries, and the
    latter among these, which here is one of the buffers."""
    footprint, mine, last = measure(work.one_pass()), pieces_of(work, rank), work.pipeline * work.chunks - 1
    edge, logits = 2 * 2 * 48 * CONFIG["hidden_size"], 2 * 2 * 48 * VOCABULARY
    held = [stage_parameters(work, piece) for piece in mine]
    pieces = [(state_of(replace(work, rounds=1), piece), sum(p.numbers for p in piece)) for piece in held]
    block = sum(p.numbers for p in held[0] if p.block) // split(work)[mine[0]]
    planned = _planned(work, rank)
    walked = list(walk(work, rank))
    assert [real["action"] for real in found] == [_name(work, rank, action) for action, _, _ in walked]
    sent = lingering = 0
    for real, (action, _, after) in zip(found, walked, strict=True):
        where, piece = (rank, real), mine[action.piece]
        in_head = action.kind == "forward" and piece == last  # saves more, till the backward pass that comes at once
        kept = after.blocks * footprint.block_bytes + after.edges * edge
        assert in_head or real["saved"] + real["between"] == kept, where
        assert real["logits"] == after.logits * logits, where
        if action.kind == "backward":
            slack = planned[real["action"]] + lingering - real["peak"]
            assert 0 <= slack <= 2 * block + 2 * edge, (where, slack)
            sent += (piece > 0) + (piece < last)
        ahead = replace(
            after, gathered=tuple(not done for done in after.reduced)
        )  # as torch 2.13 does, and 2.6 did not
        lingering = real["state"] - _state(ahead if work.chunks > 1 < work.data else after, pieces)
        if work.chunks > 1:  # torch 2.13 waits for what was sent at the end of the step, and holds it; 2.6 did not
            assert lingering == sent * edge, where
        else:  # what was sent last, forward and back, and what is sent next
            assert lingering in (0, edge, 2 * edge, 3 * edge), where


def _planned(work: Workload, rank: int) -> dict[str, int]:
    """Most bytes of each backward pass; that of the last piece has its loss too, made after the forward pass."""
    planned: dict[str, int] = {}
    for action, memory in moments_of(work, measure(work.one_pass()), rank):
        name = _name(work, rank, replace(action, kind="backward"))
        planned[name] = max(planned.get(name, 0), memory.total - memory.margin)
    return planned


def test_two_ranks_hold_what_is_planned(on_ranks) -> None:
    _check(on_ranks, [PLAIN, PIECES], 2)


@pytest.mark.slow
def test_four_ranks_hold_what_is_planned(on_ranks) -> None:
    _check(on_ranks, MORE, 4)


def _check(on_ranks: Callable[..., str], cases: list[dict[str, Any]], ranks: int) -> None:
    works = [_small(case, ranks) for case in cases]
    for work, found in zip(works, _run(on_ranks, works), strict=True):
        for rank, moments in enumerate(found):
            _compare(work, rank // work.data, moments)


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("chunks", "rounds"), [(2, 8), (2, 32), (3, 8), (2, 4), (3, 10)])
def test_pieces_take_turns_as_in_torch(chunks: int, rounds: int, eight_ranks: None) -> None:
    stages = [PipelineStage(nn.Linear(1, 1), 8 * chunk, 8 * chunks, device("cpu")) for chunk in range(chunks)]
    order = ScheduleInterleaved1F1B(cast(Any, stages), rounds, lambda out, target: out.sum()).pipeline_order
    for rank in range(8):
        torchs = [
            (action.computation_type.value, action.stage_index // 8, action.microbatch_index)
            for action in order[rank]
            if action
        ]
        ours = [action for action in schedule(_big(chunks=chunks, rounds=rounds), rank) if action.kind != "reduce"]
        assert [(action.kind[0].upper(), action.piece, action.micro) for action in ours] == torchs


def test_blocks_are_split_as_torchtitan_splits_them() -> None:
    assert split(_big()) == (15, *[16] * 6, 15)
    assert split(_big(chunks=2)) == (7, *[8] * 14, 7)
    assert split(_big(pipeline=1)) == (126,)
    assert most_blocks(_big()) == most_blocks(_big(chunks=2)) == 16
    whole = parameters(_big().config)
    for work in (_big(), _big(chunks=2), _big(pipeline=1)):
        pieces = [stage_parameters(work, piece) for piece in range(work.pipeline * work.chunks)]
        assert sorted(p.name for piece in pieces for p in piece) == sorted(p.name for p in whole)
        assert {p.name for p in pieces[0] if not p.block} >= {"model.embed_tokens.weight"}
        assert {p.name for p in pieces[-1] if not p.block} >= {"model.norm.weight", "lm_head.weight"}


def test_gradients_of_two_pieces_meet_only_after_the_first_turn() -> None:
    """With as many micro-batches as ranks, a piece is done before the one below it begins: two pieces hold less than
    one, whose gradients are whole while nearly all activations are."""
    for rank in range(8):
        moments = [after for _, _, after in walk(_big(chunks=2), rank)]
        assert not any(all(moment.summed) for moment in moments)
        assert any(all(after.summed) for _, _, after in walk(_big(chunks=2, rounds=32), rank))
    plain = [after for _, _, after in walk(_big(), 1)]
    assert max(moment.blocks for moment in plain if moment.summed[0]) == 7 * 16
    assert max(moment.blocks for _, _, moment in walk(_big(chunks=2), 1)) == 8 * 16
    assert memory_of(_big()).total > memory_of(_big(chunks=2)).total
