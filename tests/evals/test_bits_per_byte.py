"""Bits per byte: the n-gram model is a distribution and knows its text; the model's sums are the model's own."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from shipyard.evals.bits_per_byte import model_log_probs, text_bytes
from shipyard.evals.ngram import ngram_log_probs
from transformers import AutoModelForCausalLM, AutoTokenizer


def documents(count: int, vocabulary: int, seed: int) -> list[np.ndarray]:
    """Texts in which a token depends on the one before it."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = [int(rng.integers(vocabulary))]
        while len(ids) < 30:
            ids.append((3 * ids[-1] + int(rng.integers(2))) % vocabulary)
        made.append(np.array(ids))
    return made


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_of_all_tokens_sum_to_one(order: int) -> None:
    """After contexts that were seen, half seen and never seen."""
    train = documents(40, 11, seed=0)
    for context in ([], [3], [3, 9, 5, 4], [10, 10, 10, 10], train[0][:6].tolist()):
        asked = [np.array([*context, token]) for token in range(11)]
        last = [values[-1] for values in ngram_log_probs(train, asked, 11, order)]
        assert sum(map(math.exp, last)) == pytest.approx(1, abs=1e-9)


def test_bigrams_by_hand() -> None:
    """a b a b a c: discounts fall back to 1/2, so p(b|a) = (2 - 1/2)/3 + (1/3) p(b), with p(b) from neighbours."""
    a, b, c = range(3)
    (found,) = ngram_log_probs([np.array([a, b, a, b, a, c])], [np.array([a, b])], 3, order=2)
    kinds = 4  # distinct bigrams: blank a, a b, b a, a c; b and c have one left neighbour, a has two
    below = (1 - 0.5) / kinds + 0.5 * 3 / kinds / 3
    assert math.exp(found[1]) == pytest.approx((2 - 0.5) / 3 + (0.5 * 2 / 3) * below)


def test_more_context_helps_where_there_is_something_to_learn() -> None:
    train, held_out = documents(200, 50, seed=0), documents(20, 50, seed=1)
    bits = [-np.concatenate(ngram_log_probs(train, held_out, 50, order)).mean() / math.log(2) for order in (1, 2)]
    assert bits[1] < 0.35 * bits[0]
    unigram = np.bincount(np.concatenate(train), minlength=50) / sum(map(len, train))
    assert bits[0] < 1.1 * -np.log2(unigram[np.concatenate(held_out)]).mean()


def test_windows_score_every_token_once_with_context(tiny_model: Path) -> None:
    """Documents shorter than a window get the model's own sum; longer ones are cut, and lose little to it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 384, length).astype(np.int32) for length in (2, 16, 17, 70)]
    sums = model_log_probs(model, texts, 16)
    for ids, found in zip(texts, sums, strict=True):
        row = torch.from_numpy(ids.astype(np.int64))[None]
        with torch.no_grad():
            logp = model(input_ids=row).logits[0, :-1].log_softmax(-1).gather(-1, row[0, 1:, None])
        assert found == pytest.approx(float(logp.sum()), abs=1e-3 if len(ids) <= 16 else 0.02 * len(ids))


def test_bytes_are_those_of_what_is_predicted(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = np.array([*tokenizer("où est le navire?")["input_ids"], tokenizer.eos_token_id])
    first = len(tokenizer.decode(ids[:1].tolist()).encode())
    assert text_bytes(tokenizer, ids) == len("où est le navire?".encode()) - first
