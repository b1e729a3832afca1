"""Sampling replies from the policy in place: batched, one cache, and random numbers that belong to the reply.

Every reply draws from its own counter-based stream, so what is sampled depends neither on the rank that samples it nor
on who else is in the batch.

Shape legend: P prompts, G replies a prompt, B = P*G rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache


@dataclass(frozen=True)
class Reply:
    """Sampled ids, the end token included unless the limit came first, and their log-probabilities when sampled."""

    ids: list[int]
    log_probs: list[float]


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Set[int],
    temperature: float = 0.0,
    seeds: Sequence[Sequence[int]] | None = None,
    replies: int = 1,
) -> list[list[Reply]]:
    """Sample `replies` replies to each prompt (greedy at temperature 0). `seeds` gives each prompt's key for Philox.

    A prompt is read once, however many replies it gets.
    """
    assert temperature == 0 or seeds is not None, "sampling needs a seed for every prompt"
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        width = max(map(len, prompts))
        ids_PT = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
        mask_PT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        cache = DynamicCache()
        logits_PV = _forward(model, ids_PT, mask_PT, (mask_PT.cumsum(-1) - 1).clamp(min=0), cache)
        if replies > 1:
            cache.batch_repeat_interleave(replies)
        uniform_BT = _uniforms(seeds, replies, max_new_tokens) if seeds is not None and temperature > 0 else None
        rows = _decode(
            model,
            logits_PV.repeat_interleave(replies, 0),
            mask_PT.repeat_interleave(replies, 0),
            cache,
            (max_new_tokens, temperature, torch.tensor(sorted(end_ids), device=device)),
            uniform_BT,
        )
    finally:
        model.train(was_training)
    return [rows[start : start + replies] for start in range(0, len(rows), replies)]


def _decode(
    model: nn.Module,
    logits_BV: Tensor,
    mask_BT: Tensor,
    cache: DynamicCache,
    limits: tuple[int, float, Tensor],
    uniform_BT: Tensor | None,
) -> list[Reply]:
    max_new_tokens, temperature, ends = limits
    rows = len(logits_BV)
    ids: list[list[int]] = [[] for _ in range(rows)]
    log_probs: list[list[float]] = [[] for _ in range(rows)]
    alive = np.arange(rows)
    position_B = mask_BT.sum(-1)
    for turn in range(max_new_tokens):
        uniform_B = uniform_BT[alive, turn] if uniform_BT is not None else None
        token_B, logp_B = _sample(logits_BV, temperature, uniform_B)
        for row, token, logp in zip(alive.tolist(), token_B.tolist(), logp_B.tolist(), strict=True):
            ids[row].append(token)
            log_probs[row].append(logp)
        going_B = ~torch.isin(token_B, ends)
        if turn == max_new_tokens - 1 or not going_B.any():
            break
        if not going_B.all():  # rows that ended leave the batch
            keep = going_B.nonzero().flatten()
            cache.batch_select_indices(keep)
            token_B, mask_BT, position_B = token_B[keep], mask_BT[keep], position_B[keep]
            alive = alive[keep.cpu().numpy()]
        mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
        logits_BV = _forward(model, token_B[:, None], mask_BT, position_B[:, None], cache)
        position_B = position_B + 1
    return [Reply(row_ids, row_logp) for row_ids, row_logp in zip(ids, log_probs, strict=True)]


def _forward(model: nn.Module, ids_BT: Tensor, mask_BS: Tensor, positions_BT: Tensor, cache: DynamicCache) -> Tensor:
    out = model(
        input_ids=ids_BT,
        attention_mask=mask_BS,
        position_ids=positions_BT,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1].float()


def _sample(logits_BV: Tensor, temperature: float, uniform_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling from one uniform number a row; fp64 sums, so that 49k addends lose nothing."""
    logp_BV = torch.log_softmax(logits_BV / (temperature or 1.0), dim=-1)
    if uniform_B is None:
        token_B = logits_BV.argmax(-1)
    else:
        cumulative_BV = logp_BV.double().exp().cumsum(-1)
        threshold_B1 = (uniform_B.to(cumulative_BV.device) * cumulative_BV[:, -1])[:, None]
        token_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)
    return token_B, logp_BV.gather(-1, token_B[:, None])[:, 0]


def _uniforms(seeds: Sequence[Sequence[int]], replies: int, length: int) -> Tensor:
    """Numbers in [0, 1), fp64, one row of `length` a reply, from the prompt's own Philox stream."""
    streams = [np.random.Generator(np.random.Philox(seed=list(seed))).random((replies, length)) for seed in seeds]
    return torch.from_numpy(np.concatenate(streams))
