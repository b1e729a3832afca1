import pytest
import torch
from shipyard.kernels.accuracy import hold_bars, run_all_ways
from shipyard.kernels.interpreter import Sanitizer, poisoned
from shipyard.kernels.rms_norm import rms_norm, rms_norm_reference
from shipyard.kernels.swiglu import swiglu, swiglu_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (65, 576), (130, 100)])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_accuracy(dtype, rows, width, residual):
    torch.manual_seed(0)
    inputs = [torch.randn(rows, width).to(dtype) * 3, (1 + torch.randn(width) / 4).to(dtype)]
    if residual:
        inputs.append(torch.randn(rows, width).to(dtype))
    mine_of = lambda x, w, r=None: rms_norm(x, w, 1e-6, r)
    reference = lambda x, w, r=None: rms_norm_reference(x, w, 1e-6, r)
    with Sanitizer() as report:
        mine, eager, exact = run_all_ways(mine_of, reference, inputs, careful=True)
    report.check()
    assert not any(poisoned(x).any() for x in mine)
    hold_bars(f"rms_norm {dtype} {rows}x{width} residual={residual}", mine, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [0.1, 1.0, 10.0])
def test_swiglu_accuracy(dtype, std):
    """Also where exp overflows and where the sigmoid vanishes."""
    torch.manual_seed(0)
    gate = torch.cat([torch.randn(3000) * std, torch.linspace(-120, 120, 97) * (std == 10.0)]).to(dtype)
    with Sanitizer() as report:
        mine, eager, exact = run_all_ways(swiglu, swiglu_reference, [gate, torch.randn(3097).to(dtype)])
    report.check()
    assert not any(poisoned(x).any() for x in mine)
    hold_bars(f"swiglu {dtype} std={std}", mine, eager, exact)


def test_gradcheck_norm_and_swiglu():
    torch.manual_seed(0)
    x, r = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 5, dtype=torch.float64)
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, w), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, 1e-3, r), (x, w, r.requires_grad_()), fast_mode=True)
    assert torch.autograd.gradcheck(swiglu, (x, r), fast_mode=True)


def test_an_infinite_gate_stays_infinite():
    """An overflow upstream must show, as in PyTorch, and not turn into another number."""
    gate, up = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0]), torch.ones(4)
    torch.testing.assert_close(swiglu(gate, up), swiglu_reference(gate, up), equal_nan=True)


def test_rows_do_not_know_each_other():
    """Permuting the rows permutes the result, bit for bit."""
    x, w = torch.randn(40, 48).bfloat16(), torch.randn(48).bfloat16()
    order = torch.randperm(40)
    assert torch.equal(rms_norm(x, w, 1e-6)[order], rms_norm(x[order], w, 1e-6))
    assert torch.equal(swiglu(x, x.flip(0))[order], swiglu(x[order], x.flip(0)[order]))


def test_no_rows():
    assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
    assert swiglu(torch.empty(0, 8), torch.empty(0, 8)).shape == (0, 8)
