"""Supervised fine-tuning, and pretraining on rows: the loss is per supervised token of the global batch."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .batches import MicroBatch, batch_indices, collate
from .dataset import Sample
from .loss import nll_sum, target_terms, z_sum
from .method import Method, device_of
from .recipe import Recipe


class SupervisedTuning(Method[Sample]):
    """Items are samples; the denominator is the number of supervised tokens in the global batch."""

    def __init__(self, recipe: Recipe, samples: Sequence[Sample], digest: str = "") -> None:
        self.recipe, self.samples, self.rows, self.digest = recipe, samples, len(samples), digest

    def batch(self, step: int) -> list[Sample]:
        """The global batch of a step, the same on every rank."""
        chosen = batch_indices(self.recipe.seed, step, self.rows, self.recipe.batch.size)
        return [self.samples[index] for index in chosen]

    def totals(self, items: Sequence[Sample]) -> dict[str, float]:
        """Denominators and counts over the global batch."""
        tokens = sum(len(item.ids) for item in items)
        return {"tokens": float(tokens), "supervised": float(sum(int(item.mask.sum()) for item in items))}

    def loss(
        self, model: nn.Module, items: Sequence[Sample], totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """This micro-batch's part of the global loss, and its part of every logged number."""
        batch = collate(items, self.recipe.batch.packing).to(device_of(model))
        return next_token_loss(model, batch, totals["supervised"], self.recipe.optim.z_loss)


def next_token_loss(
    model: nn.Module, batch: MicroBatch, supervised: float, z_loss: float
) -> tuple[Tensor, dict[str, float]]:
    """A micro-batch's part of the loss per supervised token of the global batch, with z-loss where it has a weight."""
    logp_N, log_z_N = target_terms(model, batch)
    nll = nll_sum(logp_N, batch.weights_N) / supervised
    if not z_loss:
        return nll, {"loss": float(nll.detach())}
    z = z_loss * z_sum(log_z_N, batch.weights_N) / supervised
    return nll + z, {"loss": float(nll.detach()), "z_loss": float(z.detach())}
