"""Pretraining on token shards: rows of packed documents, the same loss and loop as fine-tuning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .method import Method, device_of
from .packing import PackedSource, collate_rows, rows_of_step, shares
from .recipe import Recipe
from .sft import next_token_loss
from .tokens import Split, TokenShards, text_tokenizer


@dataclass(frozen=True)
class PackedRow:
    """One row: parts of documents, end to end, each with ids int32."""

    parts: tuple[np.ndarray, ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.parts))

    @property
    def targets(self) -> int:
        """Tokens to predict: all but the first of each part."""
        return self.tokens - len(self.parts)


def open_shards(recipe: Recipe, tokenizer: Any) -> TokenShards:
    """The recipe's shards. Raises ValueError if they are not built, or were built with another tokenizer."""
    assert recipe.data.tokens is not None
    directory = Path(recipe.data.tokens)
    if not (directory / "manifest.json").is_file():
        raise ValueError(f"data.tokens: {directory} holds no token shards; run `shipyard data build` with this recipe")
    shards = TokenShards(directory)
    if shards.tokenizer_digest != text_tokenizer(tokenizer).digest:
        raise ValueError(f"data.tokens: {directory} was built with another tokenizer; build it again elsewhere")
    return shards


def packed_sources(recipe: Recipe, shards: TokenShards, split: Split) -> list[PackedSource]:
    """The sources of a split, packed to data.max_tokens. Raises ValueError for one that the shards do not hold."""
    names = list(recipe.data.mixture or [recipe.data.train])
    if missing := [name for name in names if name not in shards.sources]:
        raise ValueError(
            f"data.mixture: {missing[0]} is not in {shards.directory} ({', '.join(shards.sources)}); build it again"
        )
    found = []
    for name in names:
        number = shards.sources.index(name)
        lengths = shards.lengths(split, number)
        seed = (recipe.seed, number)
        found.append(PackedSource(shards.reader(split, number), lengths, recipe.data.max_tokens, seed))
        if not found[-1].rows and split == "train":
            raise ValueError(f"data.tokens: {shards.directory} holds nothing of {name} to train on")
    return found


class Pretraining(Method[PackedRow]):
    """Items are rows of data.max_tokens; the denominator is the number of predicted tokens in the global batch."""

    def __init__(self, recipe: Recipe, shards: TokenShards) -> None:
        self.recipe, self.shards = recipe, shards
        self.sources = packed_sources(recipe, shards, "train")
        self.counts = [source.rows for source in self.sources]
        self.rows = sum(self.counts)
        weights = recipe.data.mixture or {recipe.data.train: 1.0}
        self.weights = shares(weights, [source.targets for source in self.sources], self.counts)

    def introduction(self) -> list[str]:
        """What there is to learn from."""
        width = self.recipe.data.max_tokens
        tokens = sum(source.targets for source in self.sources)
        full = sum(int(source.spans.length_S.sum()) for source in self.sources) / (self.rows * width)
        return [
            f"data: {tokens:,} tokens to predict an epoch, in {self.rows:,} rows of {width}, {full:.1%} full; "
            f"{self.shards.counts['validation']:,} documents held out"
        ]

    def batch(self, step: int) -> list[PackedRow]:
        """The global batch of a step, the same on every rank."""
        chosen = rows_of_step(self.recipe.seed, step, self.recipe.batch.size, self.counts, self.weights)
        return [PackedRow(tuple(self.sources[source].row(epoch, row))) for source, epoch, row in chosen.tolist()]

    def totals(self, items: Sequence[PackedRow]) -> dict[str, float]:
        """Denominators and counts over the global batch."""
        tokens = sum(item.tokens for item in items)
        return {"tokens": float(tokens), "supervised": float(sum(item.targets for item in items))}

    def loss(
        self, model: nn.Module, items: Sequence[PackedRow], totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """This micro-batch's part of the global loss, and its part of every logged number."""
        rows = [item.parts for item in items]
        batch = collate_rows(rows, self.recipe.data.max_tokens, self.recipe.batch.micro).to(device_of(model))
        return next_token_loss(model, batch, totals["supervised"], self.recipe.optim.z_loss)

    def state(self) -> dict[str, Tensor]:
        """The digest of the shards: a run that goes on must see the same."""
        return {"shards": torch.tensor(list(bytes.fromhex(self.shards.manifest.digest)), dtype=torch.float32)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError when the shards are others than this run began with; what was imported has no state."""
        if state and state["shards"].tolist() != self.state()["shards"].tolist():
            raise ValueError(
                f"data.tokens: {self.shards.directory} is not what this run began with; put the old shards back, or "
                "set resume=never"
            )
