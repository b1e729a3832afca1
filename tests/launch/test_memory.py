"""The memory table: exact counts, and sizes that move the right way."""

import json
from dataclasses import replace
from typing import Any

import pytest
from shipyard.launch.footprint import measure
from shipyard.launch.memory import activations_of, memory_of, moments_of, read_shape
from shipyard.launch.pipeline import walk
from shipyard.launch.plan import dry_memory
from shipyard.launch.state import NF4_BYTES, parameters, state_of
from shipyard.launch.workload import Workload
from shipyard.training.recipe import parse_recipe

LLAMA_8B = 8_030_261_248


@pytest.mark.parametrize(
    ("shape", "total"), [("smollm2-135m", 134_515_008), ("llama3-8b", LLAMA_8B), ("llama3-70b", 70_553_706_496)]
)
def test_parameters_are_those_of_the_real_model(shape: str, total: int) -> None:
    counted = parameters(json.dumps(read_shape(shape)))
    assert sum(parameter.numbers for parameter in counted) == total


def _work(**changes: Any) -> Workload:
    fields: dict[str, Any] = {"config": json.dumps(read_shape("llama3-8b")), "ranks": 8, "tokens": 2048, "micro": 1}
    return Workload(**{**fields, "engine": "ddp", **changes})


def test_state_follows_the_engine() -> None:
    full = state_of(_work())
    assert full.weights == full.gradients == 4 * LLAMA_8B
    assert full.optimizer == 8 * LLAMA_8B
    assert full.buffers > 4 * LLAMA_8B  # the all-reduce's buckets are a copy of the gradients
    one, two, three = (state_of(_work(engine=f"zero{stage}", rounds=2)) for stage in (1, 2, 3))
    assert one.optimizer == pytest.approx(12 * LLAMA_8B / 8, rel=1e-4)
    assert one.gradients == 2 * LLAMA_8B
    assert two.gradients == pytest.approx(2 * LLAMA_8B / 8, rel=0.2)
    assert three.weights == pytest.approx(2 * LLAMA_8B / 8, rel=1e-3)
    sharded = state_of(_work(engine="fsdp2"))
    assert sharded.weights == sharded.gradients == pytest.approx(4 * LLAMA_8B / 8, rel=1e-3)
    assert state_of(_work(engine="fsdp2", rounds=2)).gradients == 4 * LLAMA_8B  # whole, while a step adds up
    adapters = state_of(_work(quantize="nf4", lora_rank=16))
    frozen = sum(p.numbers * (NF4_BYTES if p.linear else 2) for p in parameters(_work().config))
    trained = adapters.gradients
    assert adapters.weights == round(frozen) + trained
    assert adapters.optimizer == 2 * trained < 0.4e9


def test_offloaded_state_is_the_hosts() -> None:
    for engine in ("zero2", "zero3", "fsdp2"):
        here, there = (memory_of(_work(engine=engine, offload=offload)) for offload in (False, True))
        assert here.host == 0
        assert there.host > 8 * LLAMA_8B / 8
        assert there.total < here.total
        assert there.rows()[-1] == ("offloaded (host)", there.host)


def test_checkpointing_moves_activations_only() -> None:
    none, selective, full = (memory_of(_work(checkpointing=mode)) for mode in ("none", "selective", "full"))
    assert none.activations > 1.5 * selective.activations > 3 * full.activations
    assert none.weights == full.weights


def test_a_pipeline_keeps_what_passes_between_its_stages() -> None:
    """With 8 stages: gradients arrive in a buffer for each micro-batch, so do inputs, outputs wait for their turn; and
    the last stage returns every micro-batch's logits."""

    def most(work: Workload, rank: int = 0) -> tuple[int, int]:
        moments = [after for _, _, after in walk(work, rank)]
        return max(moment.blocks for moment in moments), max(moment.edges for moment in moments)

    plain = _work(pipeline=8, rounds=8, ranks=64, engine="fsdp2", checkpointing="full")
    assert most(plain) == (8 * 4, 8 + 8)
    assert most(plain, 3) == (5 * 4, 5 + 8 + (8 - 5))
    assert most(plain, 7) == (4, 8)
    few = replace(plain, chunks=2)
    assert most(few) == (8 * 4, 16 + 16)  # no more than a step has, whatever the schedule's warm-up
    many = replace(plain, chunks=2, rounds=32)
    assert most(many) == (23 * 2, 16 + 2 * 32 + 32)  # the second piece has an output where it has no input waiting
    footprint, edge, logits = measure(plain.one_pass()), 2 * 2048 * 4096, 2 * 2048 * 128256
    memories = [memory for action, memory in moments_of(plain, footprint, 0) if action.kind == "backward"]
    assert memories[0].activations == footprint.block_peak_with(8 * 4) + 16 * edge
    losses = [memory for action, memory in moments_of(plain, footprint, 7) if action.kind == "forward"]
    assert losses[5].activations == footprint.peak_with(4) + 5 * logits + 7 * edge


def test_a_4_bit_weight_is_whole_while_it_multiplies() -> None:
    work = _work(quantize="nf4", lora_rank=8, checkpointing="full", loss="fused", tokens=128)
    footprint = measure(work.one_pass())
    unpacked = 2 * 4096 * 14336
    assert activations_of(work, footprint) == footprint.block_peak_with(32) + unpacked > footprint.peak_with(32)


def test_dry_run_has_every_category() -> None:
    tree = {
        "method": "dpo",
        "steps": 1,
        "model": {"name": "x", "shape": "smollm2-135m"},
        "data": {"train": "rows.jsonl", "max_tokens": 128},
        "batch": {"size": 6, "micro": 4},  # ragged: training accepts it
    }
    rows = dict(dry_memory(parse_recipe(tree), 1))
    assert list(rows) == ["weights", "gradients", "optimizer", "activations", "buffers", "margin"]
    assert rows["weights"] == 4 * 134_515_008 + 2 * 134_515_008  # and the frozen reference, in bf16
    assert rows["margin"] == pytest.approx(0.05 * (sum(rows.values()) - rows["margin"]), rel=1e-6)


def test_unknown_shape_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"model\.shape: 'llama9' .* llama3-8b, .*smollm2-135m"):
        read_shape("llama9")
