"""What a method gives the loop: global batches, their denominators, each micro-batch's part of the loss."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Item = TypeVar("Item")


class Method(ABC, Generic[Item]):
    """Base of the methods. `rows` is the size of the data set, 0 where a task generates without end."""

    rows: int
    digest: str = ""
    """Of the rows, where they are read from files: a run that goes on must see the same."""
    base: str = ""
    """Of the model under adapters or a reference, where it is a committed one: frozen, it is in no checkpoint."""

    @abstractmethod
    def batch(self, step: int) -> Sequence[Item]:
        """The global batch of a step (from 0): a pure function of (seed, step, weights), the same on every rank."""

    @abstractmethod
    def totals(self, items: Sequence[Item]) -> dict[str, float]:
        """Denominators over the global batch; `tokens` (all) and `supervised` are always among them."""

    @abstractmethod
    def loss(
        self, model: nn.Module, items: Sequence[Item], totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """This micro-batch's part of the global loss, already divided, and its part of every number that is logged.

        Parts add up over micro-batches and ranks to the global number. No items: a part of zero that still reaches
        every weight, so that a rank without a share takes part in every collective.
        """

    def useful(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items whose gradient can differ from zero."""
        return items

    def summary(self, items: Sequence[Item]) -> dict[str, float]:
        """Logged numbers of the global batch that need no forward pass."""
        return {}

    def introduction(self) -> Sequence[str]:
        """Lines to say before the first step."""
        return ()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the step number."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned."""
        assert not state


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device
