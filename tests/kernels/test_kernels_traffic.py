"""The useful FLOPs that the datasheet divides by, counted without their formulas: PyTorch's counter, the eager mask."""

import torch
from shipyard.kernels.attention import attention_reference
from shipyard.kernels.linear_cross_entropy import reference_log_probs
from shipyard.kernels.traffic import (
    GROUPS,
    HEAD_TOKENS,
    HEAD_WIDTH,
    HEADS,
    LENGTHS,
    VOCABULARY,
    WIDTH,
    causal_flops,
    head_flops,
)
from torch.utils.flop_counter import FlopCounterMode


def visible_pairs() -> int:
    """Query, key and head: with the unit matrix for values, eager attention's output is its probabilities."""
    tokens = sum(LENGTHS)
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    q, k = torch.zeros(tokens, HEADS, 1), torch.zeros(tokens, GROUPS, 1)
    values = torch.eye(tokens)[:, None].expand(-1, GROUPS, -1)
    return int(attention_reference(q, k, values, borders).count_nonzero())


def test_attention_flops_are_those_of_eager_code_on_the_pairs_that_the_mask_shows():
    dense = 32
    q = torch.randn(dense, HEADS, WIDTH, requires_grad=True)
    k, v = (torch.randn(dense, GROUPS, WIDTH, requires_grad=True) for _ in "kv")
    with FlopCounterMode(display=False) as forward:
        out = attention_reference(q, k, v)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    with FlopCounterMode(display=False) as again:  # the scores, which no kernel keeps
        torch.einsum("thd,sd->hts", q.detach(), k.detach()[:, 0])
    pairs = HEADS * dense * dense
    shown = visible_pairs()
    assert causal_flops(forward=True) == forward.get_total_flops() * shown // pairs
    assert causal_flops(forward=False) == (backward.get_total_flops() + again.get_total_flops()) * shown // pairs


def test_head_flops_are_those_of_eager_logits():
    x, weight = torch.randn(HEAD_TOKENS, HEAD_WIDTH), torch.randn(VOCABULARY, HEAD_WIDTH)
    with FlopCounterMode(display=False) as logits:
        reference_log_probs(x, weight, torch.zeros(HEAD_TOKENS, dtype=torch.int64))
    assert head_flops() == logits.get_total_flops()
