"""Linear cross-entropy on the PyTorch path (no interpreter): chunks, and a head split over two ranks."""

import subprocess
import sys

import pytest
import torch
from shipyard.kernels import linear_cross_entropy as module
from shipyard.kernels.linear_cross_entropy import linear_cross_entropy, reference_log_probs, token_log_probs


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_chunks_equal_whole_logits(monkeypatch, softcap):
    monkeypatch.setattr(module, "CHUNK_TOKENS", 16)
    torch.manual_seed(0)
    x = torch.randn(50, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(150, 24, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 150, (50,)).index_fill(0, torch.tensor([3, 7]), -100)
    loss, log_p = linear_cross_entropy(x, weight, targets, softcap=softcap, z_loss=1e-2)
    want_p, want_lse = reference_log_probs(x, weight, targets, softcap=softcap)
    torch.testing.assert_close(log_p, want_p)
    want = -want_p.sum() + 1e-2 * want_lse.square().sum()
    got = torch.autograd.grad(loss, [x, weight])
    for mine, theirs in zip(got, torch.autograd.grad(want, [x, weight]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, w: token_log_probs(x, w, targets), (x, weight), fast_mode=True)


def test_a_frozen_head_gets_no_gradient(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(10, 8, requires_grad=True)
    weight, targets = torch.randn(30, 8), torch.randint(0, 30, (10,))
    made = []
    monkeypatch.setattr(module, "_added", lambda total, part: made.append(part) or part)
    (frozen,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets)[0], x)
    assert not made
    (trained,) = torch.autograd.grad(linear_cross_entropy(x, weight.requires_grad_(), targets)[0], x)
    assert made
    assert torch.equal(frozen, trained)


WORKER = """
import sys, torch, torch.distributed as dist
from shipyard.kernels.linear_cross_entropy import linear_cross_entropy
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
x = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
weight = torch.randn(30, 8, dtype=torch.float64)
targets = torch.randint(0, 30, (20,)); targets[4] = -100
mine = weight[rank * 15 : rank * 15 + 15].clone().requires_grad_()
whole = weight.clone().requires_grad_()
loss, _ = linear_cross_entropy(x, mine, targets, z_loss=1e-3, group=dist.group.WORLD)
want, _ = linear_cross_entropy(x, whole, targets, z_loss=1e-3)
dx, dw = torch.autograd.grad(loss, [x, mine])
want_dx, want_dw = torch.autograd.grad(want, [x, whole])
for a, b in ((loss, want), (dx, want_dx), (dw, want_dw[rank * 15 : rank * 15 + 15])):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
dist.destroy_process_group()
"""


def test_two_ranks_with_half_the_vocabulary_each(tmp_path):
    command = [sys.executable, "-c", WORKER]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")]) for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
