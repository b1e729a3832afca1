"""How many bits a model needs for a byte of held-out text, beside n-gram models of the same training text.

Bits per byte compare models of different tokenizers. Each document is read in windows that overlap by three quarters,
so that every token has at least so much of a window before it; a document's first token is given to both models.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from transformers import PreTrainedModel

from ..training.log import progress
from ..training.loss import target_log_probs
from ..training.packing import collate_rows
from ..training.pretrain import open_shards
from ..training.recipe import Recipe
from ..training.tokens import TokenShards
from .ngram import ngram_log_probs
from .tasks import Result

ORDER = 5
ROWS = 8
RESAMPLES = 10_000


def evaluate_bits_per_byte(model: PreTrainedModel, tokenizer: Any, recipe: Recipe, documents: int = 0) -> Result:
    """Bits per byte on the shards' held-out documents (the first `documents`; 0: all), with an interval over documents.

    The note compares with n-gram models over the same tokens and over bytes, paired by document. Raises ValueError
    when nothing is held out.
    """
    shards = open_shards(recipe, tokenizer)
    held_out = read_documents(shards, "validation")
    held_out = held_out[:documents] if documents else held_out
    if not held_out:
        raise ValueError(f"data.validation_fraction: {shards.directory} holds nothing out; set it, and build again")
    sizes = np.array([text_bytes(tokenizer, ids) for ids in held_out])
    ours = -model_log_probs(model, held_out, recipe.data.max_tokens) / math.log(2)
    train = read_documents(shards, "train")
    grams = {"tokens": _ngram_bits(train, held_out, len(tokenizer))}
    grams["bytes"] = _ngram_bits(
        [_bytes(tokenizer, ids) for ids in train], [_bytes(tokenizer, ids) for ids in held_out], 257
    )
    beside = [_beside(f"{ORDER}-gram over {name}", bits - ours, bits, sizes) for name, bits in grams.items()]
    low, high = _interval(ours, sizes)
    return Result(
        stage="",
        suite="held-out documents",
        metric="bits per byte",
        value=float(ours.sum() / sizes.sum()),
        low=low,
        high=high,
        n=len(held_out),
        scores=tuple((ours / sizes).tolist()),
        seconds=math.nan,
        rows_hash=xxhash.xxh3_128_hexdigest(b"".join(ids.tobytes() for ids in held_out)),
        margins=tuple(((grams["tokens"] - ours) / sizes).tolist()),
        note="; ".join([*beside, f"{sum(map(len, held_out)):,} tokens, {sizes.sum():,} bytes"]),
    )


def _ngram_bits(train: list[np.ndarray], held_out: list[np.ndarray], vocabulary: int) -> np.ndarray:
    """Bits of each document but its first token, by the n-gram model."""
    found = ngram_log_probs(train, held_out, vocabulary, ORDER)
    return -np.array([values[1:].sum() for values in found]) / math.log(2)


def _beside(name: str, gain: np.ndarray, bits: np.ndarray, sizes: np.ndarray) -> str:
    least, most = _interval(gain, sizes)
    word = "beaten" if least > 0 else "not beaten"
    return (
        f"{name} {bits.sum() / sizes.sum():.4f}, {word} ({gain.sum() / sizes.sum():+.4f}, {least:+.4f} to {most:+.4f})"
    )


def _bytes(tokenizer: Any, ids: np.ndarray) -> np.ndarray:
    """A document's text as bytes and an end, which is byte 256."""
    body = ids[1:-1] if ids[0] == tokenizer.bos_token_id else ids[:-1]
    return np.array([*tokenizer.decode(body.tolist()).encode(), 256], np.int64)


def read_documents(shards: TokenShards, split: Any) -> list[np.ndarray]:
    """Every document of a split, ids."""
    reader = shards.reader(split)
    return [reader.read(number) for number in range(len(shards.lengths(split)))]


def text_bytes(tokenizer: Any, ids: np.ndarray) -> int:
    """UTF-8 bytes of what is predicted: the text, less the first token's unless that is a bos."""
    body = ids[1:-1].tolist() if ids[0] == tokenizer.bos_token_id else ids[:-1].tolist()
    whole = len(tokenizer.decode(body).encode())
    return whole if ids[0] == tokenizer.bos_token_id else whole - len(tokenizer.decode(body[:1]).encode())


@torch.inference_mode()
def model_log_probs(model: PreTrainedModel, documents: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Sum of log-probabilities of each document's tokens but the first, nats, float64."""
    windows = []  # document, first token, first token that is scored
    for number, ids in enumerate(documents):
        start, scored = 0, 1
        while scored < len(ids):
            windows.append((number, start, scored))
            scored = min(len(ids), start + width)
            start = max(scored - width * 3 // 4, 0)
    total = np.zeros(len(documents))
    with progress("bits per byte", len(windows)) as advance:
        for at in range(0, len(windows), ROWS):
            some = windows[at : at + ROWS]
            rows = [[documents[number][start : start + width]] for number, start, _ in some]
            batch = collate_rows(rows, width, ROWS).to(model.device)
            logp_BK = target_log_probs(model, batch).view(ROWS, -1).double().cpu().numpy()
            for row, (number, start, scored) in enumerate(some):
                last = min(len(documents[number]), start + width)
                total[number] += logp_BK[row, scored - start - 1 : last - start - 1].sum()
            advance(len(some))
    return total


def _interval(bits: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of bits per byte, over resampled documents. The generator's seed is fixed."""
    picks = np.random.default_rng(0).integers(0, len(bits), (RESAMPLES, len(bits)))
    ratios = bits[picks].sum(1) / sizes[picks].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
