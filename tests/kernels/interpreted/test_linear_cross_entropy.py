import pytest
import torch
import torch.nn.functional as F
from shipyard.kernels.accuracy import hold_bars, run_all_ways
from shipyard.kernels.interpreter import Sanitizer, poisoned
from shipyard.kernels.linear_cross_entropy import linear_cross_entropy, reference_log_probs, token_log_probs


def sample(dtype=torch.float64, tokens=20, width=24, vocabulary=150, gain=1.0):
    torch.manual_seed(0)
    x = (torch.randn(tokens, width, dtype=torch.float64) * gain).to(dtype)
    weight = torch.randn(vocabulary, width, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[1::5] = -100
    return x, weight, targets


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_fp64_equals_pytorch_cross_entropy(softcap):
    """Loss, z-loss, log-probabilities and gradients, against PyTorch on whole logits; a short last tile everywhere."""
    x, weight, targets = sample(tokens=70)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with Sanitizer() as report:
        loss, log_p = linear_cross_entropy(x, weight, targets, softcap=softcap, z_loss=1e-2)
        mine = torch.autograd.grad(loss, leaves)
    report.check()
    logits = x @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    live = targets != -100
    want = F.cross_entropy(logits, targets, reduction="sum") + 1e-2 * logits.logsumexp(-1)[live].square().sum()
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(log_p[live], logits.log_softmax(-1)[live, targets[live]])
    assert (log_p[~live] == 0).all()
    for got, expected in zip(mine, torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("std", [3.0, 25.0])
def test_linear_cross_entropy_accuracy(dtype, std, softcap):
    """At logits of a trained model's spread and of a wild one's. (Where all logits are near zero, or all at the cap,
    the rounding of the output is all that remains, and both sides share it.)"""
    x, weight, targets = sample(dtype, 65, 320, 300, std / 320**0.5)
    mine_of = lambda x, w: token_log_probs(x, w, targets, softcap=softcap)
    reference = lambda x, w: reference_log_probs(x, w, targets, softcap=softcap)
    with Sanitizer() as report:
        mine, eager, exact = run_all_ways(mine_of, reference, [x, weight], careful=True)
    report.check()
    assert not any(poisoned(x).any() for x in mine)
    hold_bars(f"linear_cross_entropy {dtype} std={std} softcap={softcap}", mine, eager, exact)


def test_linear_cross_entropy_gradcheck():
    """Log-probabilities and their log-sum-exp; the loss with its z-loss, cap and another ignored id."""
    x, weight, targets = sample(tokens=6, width=5, vocabulary=9)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    for softcap in (None, 3.0):
        call = lambda x, w, cap=softcap: token_log_probs(x, w, targets, softcap=cap)
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    other = targets.masked_fill(targets < 0, 8)
    call = lambda x, w: linear_cross_entropy(x, w, other, ignore_index=8, softcap=3.0, z_loss=0.1)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_a_token_does_not_know_its_neighbours():
    x, weight, targets = sample(torch.bfloat16, 70)
    order = torch.randperm(70)
    whole, turned = token_log_probs(x, weight, targets), token_log_probs(x[order], weight, targets[order])
    assert torch.equal(whole[0][order], turned[0])


def test_linear_cross_entropy_refusals():
    x, weight, targets = sample()
    with pytest.raises(ValueError, match="must share a width"):
        token_log_probs(x[:, 1:], weight, targets)
    with pytest.raises(ValueError, match="one per token"):
        token_log_probs(x, weight, targets[1:])
    assert token_log_probs(x[:0], weight, targets[:0])[0].shape == (0,)
