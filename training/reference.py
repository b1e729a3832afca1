"""The reference policy of DPO and GRPO: the model before training, without a second copy where adapters allow it."""

import copy

import torch
from peft import PeftModel
from torch import Tensor, nn

from .batches import MicroBatch
from .loss import target_log_probs
from .models import as_written


class Reference:
    """With adapters: the same weights, adapters off. Without: a frozen copy, made before the engine wraps the model."""

    def __init__(self, model: nn.Module) -> None:
        self.policy = model if isinstance(model, PeftModel) else None
        self.copy = None if self.policy else as_written(copy.deepcopy(model)).eval().requires_grad_(False)

    @torch.no_grad()
    def log_probs(self, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
        """The reference's log-probability of every supervised target, fp32, shape (N,)."""
        if self.policy is not None:
            with self.policy.disable_adapter():
                return target_log_probs(self.policy, batch, temperature)
        assert self.copy is not None
        return target_log_probs(self.copy.to(batch.ids_BT.device), batch, temperature)
