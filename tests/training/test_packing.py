"""Packing: nothing lost, nothing twice, boundaries kept; batches are pure functions of (seed, step, weights)."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shipyard.training.loss import target_log_probs
from shipyard.training.packing import PackedSource, best_fit, collate_rows, cut_documents, rows_of_step, turn_of
from transformers import AutoModelForCausalLM


class Memory:
    """Documents in memory; token number n of document d is 1000 d + n, so that every token can be told apart."""

    def __init__(self, lengths: list[int]) -> None:
        self.documents = [1000 * number + np.arange(length, dtype=np.int32) for number, length in enumerate(lengths)]

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        return self.documents[document][start : start + length]


def source(lengths: list[int], width: int, seed: int = 0) -> PackedSource:
    return PackedSource(Memory(lengths), np.array(lengths), width, (seed, 0))  # pyright: ignore[reportArgumentType]


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60).filter(lambda lengths: max(lengths) > 1)


@settings(deadline=None)
@given(LENGTHS, st.integers(2, 17), st.integers(1, 9), st.integers(0, 2))
def test_an_epoch_predicts_every_token_once(lengths: list[int], width: int, size: int, epoch: int) -> None:
    packed = source(lengths, width)
    steps = -(-packed.rows // size)
    seen: Counter[int] = Counter()
    for step in range(epoch * steps, (epoch + 1) * steps):
        for _, turn, row in rows_of_step(5, step, size, [packed.rows], [1.0]).tolist():
            assert turn == epoch
            parts = packed.row(turn, row)
            assert sum(map(len, parts)) <= width
            seen.update(int(token) for part in parts for token in part[1:])
    wanted = [1000 * number + token for number, length in enumerate(lengths) for token in range(1, length)]
    assert sorted(seen.elements()) == wanted


@settings(deadline=None)
@given(LENGTHS, st.integers(40, 60))
def test_best_fit_is_what_one_by_one_gives(lengths: list[int], width: int) -> None:
    """The textbook loop, one span at a time, opens as many rows and leaves the same room in them."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(width - length)
    row_S, rows = best_fit(np.array(lengths), width, np.arange(len(lengths)))
    used = np.bincount(row_S, weights=lengths, minlength=rows)
    assert sorted((width - used).tolist()) == sorted(rooms)


def test_packing_is_fast_and_full() -> None:
    rng = np.random.default_rng(0)
    spans = cut_documents(np.maximum(2, rng.lognormal(6, 1.2, 200_000).astype(np.int64)), 2048)
    row_S, rows = best_fit(spans.length_S, 2048, rng.permutation(len(spans.length_S)))
    assert np.bincount(row_S, weights=spans.length_S).max() <= 2048
    assert spans.length_S.sum() / (rows * 2048) > 0.999


def test_epochs_and_seeds_pack_differently_in_equally_many_rows() -> None:
    lengths = np.random.default_rng(0).integers(2, 30, 200).tolist()
    one, other = source(lengths, 32), source(lengths, 32, seed=1)
    first, second = ([one.row(epoch, row)[0].tolist() for row in range(one.rows)] for epoch in (0, 1))
    assert first != second
    assert first != [other.row(0, row)[0].tolist() for row in range(other.rows)]
    assert first == [one.row(0, row)[0].tolist() for row in range(one.rows)]


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=5), st.integers(0, 10**12))
def test_a_mixture_keeps_its_proportions_from_any_sample_on(weights: list[float], start: int) -> None:
    """Counts after n samples follow from n alone, and turns of a source follow each other without a gap."""
    turns: dict[int, list[int]] = {}
    for number in range(start, start + 200):
        chosen, turn = turn_of(number, weights)
        turns.setdefault(chosen, []).append(turn)
        assert abs(turn - weights[chosen] / sum(weights) * number) <= len(weights) + number * 2**-30
    for seen in turns.values():
        assert seen == list(range(seen[0], seen[0] + len(seen)))


def test_mixtures_run_through_each_source_and_do_not_depend_on_the_cut() -> None:
    sources, weights = [7, 50], [3.0, 1.0]
    samples = np.concatenate([rows_of_step(3, step, 8, sources, weights) for step in range(30)])
    assert np.bincount(samples[:, 0]).tolist() == [180, 60]
    mine = samples[samples[:, 0] == 0]
    for epoch in range(20):
        assert sorted(mine[mine[:, 1] == epoch][:, 2].tolist()) == list(range(7))
    halves = np.concatenate([rows_of_step(3, step, 4, sources, weights) for step in range(60)])
    assert halves.tolist() == samples.tolist()


def test_packed_rows_give_each_document_what_it_gets_alone(tiny_model: Path) -> None:
    """Fixed shape, several rows, padding and a missing row: every target's log-probability is the document's own."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    rng = np.random.default_rng(1)
    rows = [[rng.integers(3, 384, n).astype(np.int32) for n in lengths] for lengths in ((5, 9, 2), (16,), (3, 8))]
    batch = collate_rows(rows, 16, 4)
    assert tuple(batch.ids_BT.shape) == (4, 16)
    with torch.no_grad():
        together = target_log_probs(model, batch)[batch.weights_N > 0]
        alone = [
            model(input_ids=torch.from_numpy(part.astype(np.int64))[None], use_cache=False)
            .logits[0, :-1].float().log_softmax(-1).gather(-1, torch.from_numpy(part[1:].astype(np.int64))[:, None])
            for row in rows for part in row
        ]  # fmt: skip
    wanted = torch.cat(alone).flatten()
    assert len(together) == len(wanted)
    assert torch.allclose(together.double(), wanted.double(), atol=1e-6)


def test_an_empty_micro_batch_has_the_same_shape_and_no_weight(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    batch = collate_rows([], 16, 2)
    assert tuple(batch.ids_BT.shape) == (2, 16)
    (target_log_probs(model, batch) * batch.weights_N).sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) == 0.0 for p in model.parameters())
