"""Direct preference optimization: pairs, a reference, and a loss averaged over the pairs of the global batch.

TRL's sigmoid, IPO and hinge losses hold the promises and are matched in tests. Its SFT term does not (it averages
within micro-batches, so accumulation changes the gradient by half); here `dpo.sft_weight` divides by global tokens.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .batches import batch_indices, collate
from .dataset import Pair
from .loss import dpo_losses, nll_sum, per_document, target_log_probs
from .method import Method, device_of
from .recipe import Recipe
from .reference import Reference


class PreferenceTuning(Method[Pair]):
    """Items are pairs; a forward pass holds the chosen replies, then the rejected ones, each with its prompt."""

    def __init__(self, recipe: Recipe, pairs: Sequence[Pair], reference: Reference, digest: str = "") -> None:
        self.recipe, self.pairs, self.rows, self.reference, self.digest = recipe, pairs, len(pairs), reference, digest

    def batch(self, step: int) -> list[Pair]:
        """The global batch of a step, the same on every rank."""
        chosen = batch_indices(self.recipe.seed, step, self.rows, self.recipe.batch.size)
        return [self.pairs[index] for index in chosen]

    def totals(self, items: Sequence[Pair]) -> dict[str, float]:
        """Denominators and counts over the global batch."""
        return {
            "tokens": float(sum(len(pair.chosen.ids) + len(pair.rejected.ids) for pair in items)),
            "supervised": float(sum(int(pair.chosen.mask.sum()) for pair in items)),
            "pairs": float(len(items)),
        }

    def loss(
        self, model: nn.Module, items: Sequence[Pair], totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """This micro-batch's part of the global loss, and its part of every logged number."""
        documents = [pair.chosen for pair in items] + [pair.rejected for pair in items]
        batch = collate(documents, self.recipe.batch.packing).to(device_of(model))
        logp_N = target_log_probs(model, batch)
        reference_N = self.reference.log_probs(batch)  # without items too: FSDP2 and ZeRO-3 gather weights for it
        if not items:
            return logp_N.sum() * 0.0, {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}
        settings, count = self.recipe.dpo, len(items)
        ratio_R = per_document(logp_N - reference_N, batch)
        if settings.loss == "ipo":
            ratio_R = ratio_R / per_document(torch.ones_like(logp_N), batch)
        chosen_P, rejected_P = ratio_R[:count], ratio_R[count:]
        loss_P = dpo_losses(chosen_P, rejected_P, settings.loss, settings.beta, settings.label_smoothing)
        loss = loss_P.sum() / totals["pairs"]
        if settings.sft_weight:
            is_chosen_N = (batch.row_N < count).float()
            loss = loss + settings.sft_weight * nll_sum(logp_N, is_chosen_N) / totals["supervised"]
        margin_P = (settings.beta * (chosen_P - rejected_P)).detach()
        return loss, {
            "loss": float(loss.detach()),
            "accuracy": float((margin_P > 0).float().sum()) / totals["pairs"],
            "margin": float(margin_P.sum()) / totals["pairs"],
        }
