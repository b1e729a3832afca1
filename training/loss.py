"""Losses as sums: the one place where log-probabilities become numbers to minimize.

Every function returns a *sum* over what it is given. The loop divides by a count over the global batch, so the result
does not depend on how that batch was cut (an average of averages does: a micro-batch with few supervised tokens would
weigh as much as one with many).

Shape legend: B rows, T tokens, K kept columns, N targets, V vocabulary, R documents, P preference pairs.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.huggingface import Targets, spares_logits
from .batches import MicroBatch
from .context_parallel import part_of
from .experts import counting

CHUNK_LOGITS = 1 << 22
"""Logits turned to fp32 at a time: 16 MiB, which a CPU's caches hold and a GPU's launches are worth."""


def target_log_probs(model: nn.Module, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
    """Log-probability of every supervised target, fp32, shape (N,), gradients on."""
    return target_terms(model, batch, temperature)[0]


def target_terms(model: nn.Module, batch: MicroBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of every supervised target and log Z of its softmax, fp32, (N,) both, gradients on.

    The head runs on the kept columns only, and where its kernel is plugged in makes no logits. `use_cache=False` and no
    attention mask: with either, transformers lets packed documents see each other. Ranks that share rows compute their
    parts of them, and get all terms.
    """
    part = part_of(batch)
    if part is None:
        return _terms_here(model, batch, temperature, {})
    logp_M, log_z_M = _terms_here(model, part.batch, temperature, {"shared_rows": part.attention})
    return part.whole(logp_M), part.whole(log_z_M)


def _terms_here(
    model: nn.Module, batch: MicroBatch, temperature: float, attention: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    inputs = {"input_ids": batch.ids_BT, "position_ids": batch.positions_BT, "logits_to_keep": batch.keep_K}
    with counting(batch.real_BT):
        if temperature == 1.0 and spares_logits(model):
            terms = model(**inputs, use_cache=False, targets=Targets(batch.select_N, batch.targets_N), **attention)
            return terms.log_p_N, terms.log_z_N
        logits_BKV = model(**inputs, use_cache=False, **attention).logits
    logits_NV = logits_BKV.reshape(-1, logits_BKV.shape[-1])
    if len(batch.select_N) != len(logits_NV):
        logits_NV = logits_NV[batch.select_N]
    return gather_terms(logits_NV, batch.targets_N, temperature, spent=True)


def gather_log_probs(logits_NV: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the targets, in fp32, shape (N,)."""
    return gather_terms(logits_NV, targets_N, temperature)[0]


def gather_terms(
    logits_NV: Tensor, targets_N: Tensor, temperature: float = 1.0, spent: bool = False
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the targets and the log of its denominator Z, in fp32, (N,) both.

    `spent` says that nobody else reads the logits: the backward pass then writes their gradient over them.
    """
    return _Terms.apply(logits_NV, targets_N, temperature, spent)  # pyright: ignore[reportReturnType]


class _Terms(torch.autograd.Function):
    """Autograd's own graph holds the logits, their fp32 copy, the log-softmax and two gradients, each (N, V), and
    reading and writing these costs a CPU several times the arithmetic. Here it is the logits and one gradient."""

    @staticmethod
    def forward(ctx, logits_NV: Tensor, targets_N: Tensor, temperature: float, spent: bool) -> tuple[Tensor, Tensor]:
        logp_N, log_z_N = (logits_NV.new_empty(len(targets_N), dtype=torch.float32) for _ in range(2))
        for part, logits_CV, targets_C in _chunks(logits_NV, targets_N):
            scaled_CV = _scaled(logits_CV, temperature)
            at_C1 = targets_C[:, None]
            logp_N[part] = torch.log_softmax(scaled_CV, -1).gather(-1, at_C1)[:, 0]
            log_z_N[part] = scaled_CV.gather(-1, at_C1)[:, 0] - logp_N[part]
        ctx.save_for_backward(logits_NV, targets_N, log_z_N)
        ctx.temperature, ctx.spent = temperature, spent
        return logp_N, log_z_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp_N: Tensor, dlog_z_N: Tensor):
        logits_NV, targets_N, log_z_N = ctx.saved_tensors
        grad_NV = logits_NV if ctx.spent else torch.empty_like(logits_NV)
        # d logp / d logit = (one_hot - p) / temperature, d log Z / d logit = p / temperature
        hit_N, soft_N = dlogp_N / ctx.temperature, (dlog_z_N - dlogp_N) / ctx.temperature
        for part, logits_CV, targets_C in _chunks(logits_NV, targets_N):
            out_CV = _scaled(logits_CV, ctx.temperature) - log_z_N[part, None]
            out_CV.exp_().mul_(soft_N[part, None])
            out_CV.scatter_add_(1, targets_C[:, None], hit_N[part, None])
            grad_NV[part] = out_CV
        return grad_NV, None, None, None


def _chunks(logits_NV: Tensor, targets_N: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Pieces and where they lie. The planner measures two and counts the rest like the second."""
    rows = max(1, CHUNK_LOGITS // logits_NV.shape[-1])
    parts = (slice(start, start + rows) for start in range(0, max(1, len(targets_N)), rows))
    return zip(parts, logits_NV.split(rows), targets_N.split(rows), strict=True)


def _scaled(logits_CV: Tensor, temperature: float) -> Tensor:
    return logits_CV.float() if temperature == 1.0 else logits_CV.float() / temperature


def per_document(values_N: Tensor, batch: MicroBatch) -> Tensor:
    """Sum values over the targets of each document, shape (R,)."""
    return values_N.new_zeros(batch.rows).index_add(0, batch.row_N, values_N)


def nll_sum(logp_N: Tensor, weights_N: Tensor) -> Tensor:
    """Negative log-likelihood summed over targets; divide by the global number of supervised tokens."""
    return -(logp_N * weights_N).sum()


def z_sum(log_z_N: Tensor, weights_N: Tensor) -> Tensor:
    """log(Z)^2 summed over targets (Chowdhery et al. 2022, PaLM, section 5), the pull of softmax denominators to one;
    divide by the global number of supervised tokens."""
    return (log_z_N.square() * weights_N).sum()


def dpo_losses(
    chosen_P: Tensor, rejected_P: Tensor, kind: Literal["sigmoid", "ipo", "hinge"], beta: float, smoothing: float
) -> Tensor:
    """Loss of each pair from policy-minus-reference log-ratios, shape (P,).

    sigmoid: Rafailov et al. 2023, equation 7, with the label smoothing of cDPO (Mitchell 2023). ipo: Azar et al. 2023,
    equation 17, on log-ratios *averaged* over the reply's tokens, which the caller passes in. hinge: Zhao et al. 2023.
    """
    margin_P = chosen_P - rejected_P
    if kind == "sigmoid":
        return -F.logsigmoid(beta * margin_P) * (1 - smoothing) - F.logsigmoid(-beta * margin_P) * smoothing
    if kind == "ipo":
        return (margin_P - 1 / (2 * beta)) ** 2
    return torch.relu(1 - beta * margin_P)


def clipped_policy_loss(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate of each token and whether it was clipped, shape (N,) both.

    Shao et al. 2024 (GRPO), equation 3, with the asymmetric clip of DAPO (Yu et al. 2025). The caller sums it over
    tokens and divides by the global number of tokens (DAPO, equation 8), which favours no reply for being short.
    """
    ratio_N = torch.exp(logp_N - old_logp_N)
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    loss_N = -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    return loss_N, (clipped_N * advantage_N < ratio_N * advantage_N)


def kl_to_reference(logp_N: Tensor, reference_N: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) at each sampled token (Schulman 2020, "k3"), (N,)."""
    difference_N = reference_N - logp_N
    return torch.exp(difference_N) - difference_N - 1
