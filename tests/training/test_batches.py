"""Batches are pure functions of (seed, step), and every cut of one is the same batch."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shipyard.training.batches import accumulation, batch_indices, collate, share, steps_per_epoch
from shipyard.training.loss import gather_log_probs, per_document, target_log_probs
from shipyard.training.recipe import Batch
from torch import nn
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Document:
    ids: np.ndarray
    mask: np.ndarray


def documents(count: int, vocab: int = 384, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(rng.integers(2, 30))
        mask = rng.random(length) < 0.5
        mask[0], mask[-1] = False, True
        made.append(Document(rng.integers(3, vocab, length).astype(np.int32), mask))
    return made


@given(st.integers(0, 2**31), st.integers(1, 97), st.integers(1, 40), st.integers(0, 3))
def test_an_epoch_visits_every_row_once_and_epochs_differ(seed: int, rows: int, size: int, epoch: int) -> None:
    per_epoch = steps_per_epoch(rows, size)
    seen = np.concatenate([batch_indices(seed, epoch * per_epoch + step, rows, size) for step in range(per_epoch)])
    assert sorted(seen.tolist()) == list(range(rows))
    if rows > 20:
        other = np.concatenate([batch_indices(seed, (epoch + 1) * per_epoch + s, rows, size) for s in range(per_epoch)])
        assert seen.tolist() != other.tolist()


@given(
    st.lists(st.integers(2, 500), max_size=40), st.integers(1, 40), st.integers(1, 7), st.integers(1, 6), st.booleans()
)
def test_every_cut_holds_every_item_once_in_equally_many_rounds(
    tokens: list[float], size: int, micro: int, world: int, packing: bool
) -> None:
    tokens, batch = tokens[:size], Batch(size=size, micro=micro, packing=packing)
    items = list(range(len(tokens)))
    cuts = [share(items, tokens, batch, world, rank) for rank in range(world)]
    assert {len(mine) for mine in cuts} == {accumulation(size, micro, world)}
    assert sorted(item for mine in cuts for part in mine for item in part) == items
    assert all(len(part) <= micro for mine in cuts for part in mine)


def test_a_cut_is_even() -> None:
    """Lengths of instructions: cut by position, the rank with most has 1.3 times its share, a turn's longest pass 1.6
    times the mean of the turn, and the longest of all 1.6 times the mean of all."""
    random = np.random.default_rng(0)
    batch = Batch(size=64, micro=4)
    for _ in range(20):
        tokens = random.gamma(2.4, 80, batch.size).clip(20, 512).astype(int).tolist()
        cuts = [share(tokens, tokens, batch, 8, rank) for rank in range(8)]
        assert max(sum(map(sum, mine)) for mine in cuts) < 1.03 * sum(tokens) / 8
        for turn in range(2):
            passes = [sum(mine[turn]) for mine in cuts]
            assert max(passes) < 1.06 * sum(passes) / 8
            assert max(passes) < 1.1 * sum(tokens) / 16


def test_few_items_are_spread_over_ranks_and_fill_no_more_turns_than_they_need() -> None:
    batch = Batch(size=64, micro=8)
    five = [share(range(5), [9, 9, 9, 9, 9], batch, 4, rank) for rank in range(4)]
    assert [[len(part) for part in mine] for mine in five] == [[2, 0], [1, 0], [1, 0], [1, 0]]
    (mine,) = [share(range(16), [9] * 16, batch, 1, 0)]
    assert [len(part) for part in mine] == [8, 8, 0, 0, 0, 0, 0, 0]


def test_padded_items_lie_beside_items_of_like_length() -> None:
    tokens = [2, 100, 3, 90, 4, 80, 5, 70]
    cuts = [share(tokens, tokens, Batch(size=8, micro=2, packing=False), 2, rank) for rank in range(2)]
    assert cuts == [[[100, 90], [2, 3]], [[80, 70], [4, 5]]]


def reference_log_probs(model: nn.Module, document: Document) -> torch.Tensor:
    ids = torch.from_numpy(document.ids.astype(np.int64))
    logp = model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
    targets = np.flatnonzero(document.mask)
    return logp[targets - 1, ids[targets]]


def test_packed_and_padded_documents_are_what_they_are_alone(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    rows = documents(7)
    with torch.no_grad():
        alone = torch.cat([reference_log_probs(model, row) for row in rows])
        for packing in (True, False):
            together = target_log_probs(model, collate(rows, packing))
            assert torch.allclose(together.double(), alone.double(), atol=1e-6), f"packing={packing}"
            assert len(together) == sum(int(row.mask.sum()) for row in rows)


def test_inert_micro_batch_has_weight_zero_and_reaches_the_model(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    batch = collate([], packing=True)
    loss = (target_log_probs(model, batch) * batch.weights_N).sum()
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert batch.tokens == 0
    assert all(p.grad is not None and float(p.grad.abs().max()) == 0.0 for p in model.parameters())


@settings(max_examples=20)
@given(st.integers(1, 6), st.booleans())
def test_per_document_sums_belong_to_their_document(count: int, packing: bool) -> None:
    rows = documents(count, seed=count)
    batch = collate(rows, packing)
    sums = per_document(torch.ones(len(batch.targets_N)), batch)
    assert sums.tolist() == [float(row.mask.sum()) for row in rows]


def test_chunked_log_probs_equal_whole_ones_with_gradients(monkeypatch) -> None:
    logits = torch.randn(50, 64, requires_grad=True)
    targets = torch.randint(0, 64, (50,))
    whole = gather_log_probs(logits, targets, 0.7)
    (whole * torch.arange(50)).sum().backward()
    gradient, logits.grad = logits.grad, None
    monkeypatch.setattr("shipyard.training.loss.CHUNK_LOGITS", 64 * 8)
    chunked = gather_log_probs(logits, targets, 0.7)
    (chunked * torch.arange(50)).sum().backward()
    assert torch.equal(chunked, whole)
    assert gradient is not None
    assert torch.allclose(logits.grad, gradient)
