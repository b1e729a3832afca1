"""Activations: what the planner measures without computing against what a real model really saves."""

import contextlib
from dataclasses import replace

import pytest
from saved_for_tests import CONFIG, pass_of, real_model, saved_bytes
from shipyard.launch import footprint
from shipyard.launch.footprint import (
    ActivationTracker,
    Checkpointing,
    Pass,
    extrapolate,
    loss_of,
    measure,
)
from shipyard.launch.op_costs import OpCosts
from shipyard.training import loss

MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")


def _tracked_bytes(what: Pass, layers: int) -> int:
    """What torch's tracker counts on a real model: it sees selective checkpointing's own cache, which hooks do not."""
    model = real_model(what, layers)
    tracker = ActivationTracker()
    tracker.track_external(model)
    with tracker:
        loss = loss_of(model, what)
        held = tracker.held()
        loss.backward()
    return held


@pytest.mark.parametrize("mode", MODES)
def test_block_keeps_what_autograd_saves(mode: Checkpointing) -> None:
    what = pass_of(mode)
    planned = measure(what).block_bytes
    assert planned == _tracked_bytes(what, 3) - _tracked_bytes(what, 2)
    if mode != "selective":
        assert planned == saved_bytes(what, 3) - saved_bytes(what, 2)
    tokens, width, inner = 2 * 48, 64, 176
    if mode == "full":
        assert planned == 4 * tokens * width  # the block's input and nothing else
    if mode == "selective":  # its input, six products, attention's output, and the row sums of its softmax
        products = 64 + 2 * 32 + 64 + 2 * inner + 64
        assert planned == 4 * tokens * (width + products + 64 + 4)


def test_a_whole_model_follows_from_two_blocks() -> None:
    """Measured blocks add up: five layers extrapolated from two hold what five layers really hold."""
    for mode in MODES:
        what = pass_of(mode, num_hidden_layers=5)
        footprint = measure(what)
        whole = real_model(what, 5)
        tracker, costs = ActivationTracker(), OpCosts()
        tracker.track_external(whole)
        with tracker, costs:
            loss_of(whole, what).backward()
        ops = costs.finish()
        assert footprint.peak_bytes == pytest.approx(tracker.peak, rel=0.01), mode
        for kind in ("matmul", "attention"):
            real = sum(op.flops for op in ops if op.kind == kind)
            block = sum(op.flops for op in footprint.block_ops if op.kind == kind)
            rest = sum(op.flops for op in footprint.rest_ops if op.kind == kind)
            assert 5 * block + rest == real, (mode, kind)


def test_flops_are_those_of_the_architecture() -> None:
    """Six FLOPs a weight and token for products; attention's 4 (forward) and 10 (backward) per pair and head number."""
    footprint = measure(pass_of("none"))
    tokens = 2 * 48
    weights = 64 * (64 + 2 * 32 + 64 + 3 * 176)
    assert sum(op.flops for op in footprint.block_ops if op.kind == "matmul") == 6 * tokens * weights
    assert sum(op.flops for op in footprint.block_ops if op.kind == "attention") == 14 * 2 * 48 * 48 * 64
    assert sum(op.flops for op in footprint.rest_ops) == 6 * tokens * 64 * 211


def test_recomputation_costs_flops_and_saves_bytes() -> None:
    none, selective, full = (measure(pass_of(mode)) for mode in MODES)
    assert none.block_bytes > selective.block_bytes > full.block_bytes
    flops = [sum(op.flops for op in one.block_ops) for one in (none, selective, full)]
    assert flops[0] == flops[1] < flops[2]


def test_fused_runs_move_less_than_eager_ones() -> None:
    block = measure(pass_of("none")).block_ops
    eager = sum(op.eager_bytes for op in block if op.kind == "pointwise")
    fused = sum(op.fused_bytes for op in block if op.kind == "pointwise")
    assert 0 < fused < eager / 2


def test_more_samples_follow_from_two() -> None:
    for mode in MODES:
        measured, drawn = measure(pass_of(mode, samples=5)), extrapolate(pass_of(mode), 5)
        assert drawn.block_bytes == measured.block_bytes
        # the worst of several moments: each is a line, their maximum bends, by little
        assert drawn.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.02)
        assert sum(op.flops for op in drawn.block_ops) == sum(op.flops for op in measured.block_ops)
        assert sum(op.fused_bytes for op in drawn.block_ops) == sum(op.fused_bytes for op in measured.block_ops)


def test_packed_rows_pay_for_every_pair() -> None:
    """Documents in one row are kept apart by a mask over all pairs of tokens, which torch's attention keeps per
    block."""
    apart, packed = measure(pass_of("none", 4)), measure(replace(pass_of("none", 4), packed=True))
    pairs = (4 * 48) ** 2
    assert packed.block_bytes - apart.block_bytes > pairs  # bytes, at one a pair or more
    scores = [sum(op.flops for op in one.block_ops if op.kind == "attention") for one in (apart, packed)]
    assert scores[1] == 4 * scores[0]


def test_adapters_train_little_and_cost_less() -> None:
    whole, adapters = measure(pass_of("none")), measure(replace(pass_of("none"), lora_rank=4))
    products = [sum(op.flops for op in one.block_ops if op.kind == "matmul") for one in (whole, adapters)]
    assert 2 / 3 < products[1] / products[0] < 1  # no gradients of frozen weights: four of six, and the adapters' own


def test_two_chunks_of_the_loss_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes and operations as from running every one of 12 chunks."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 8 * CONFIG["vocab_size"])
    monkeypatch.setattr(footprint, "_measure_layers", footprint._measure_layers.__wrapped__)
    few = measure(pass_of("none"))
    monkeypatch.setattr(footprint, "_two_chunks", lambda costs: contextlib.nullcontext())
    every = measure(pass_of("none"))
    assert replace(few, rest_ops=()) == replace(every, rest_ops=())
    assert [op.launches for op in few.rest_ops] == [op.launches for op in every.rest_ops]
    eager = [sum(op.eager_bytes for op in found.rest_ops) for found in (few, every)]
    assert eager[0] == pytest.approx(eager[1], rel=0.01)
