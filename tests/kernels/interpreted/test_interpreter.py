"""The interpreter rounds as a GPU does, and the sanitizer catches each fault that is planted."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from shipyard.kernels.arithmetic import bf16_decode, bf16_encode, tf32_round
from shipyard.kernels.interpreter import Sanitizer, poisoned
from shipyard.kernels.jit import jit
from triton.tools.tensor_descriptor import TensorDescriptor


@jit
def copy_kernel(x, y, count, shift, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at + shift, mask=at < count, other=0.0), mask=at < count)


@jit
def copy_boxes(box, y, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    at = (first + tl.arange(0, BLOCK))[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(y + at, box.load([first, 0]))


@jit
def everyone_writes(x, y, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), tl.program_id(0))


@jit
def one_address(x, y, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK) * 0, tl.arange(0, BLOCK))


@jit
def reads_neighbour(x, y, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    tl.store(y + program * BLOCK + at, tl.load(y + (1 - program) * BLOCK + at) + 1.0)


@jit
def overwrites_what_another_read(x, y, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    value = tl.load(y + BLOCK + at)
    tl.store(x + program * BLOCK + at, value)
    tl.store(y + BLOCK + at, value, mask=at < program * BLOCK)


@jit
def adds_atomically(x, y, BLOCK: tl.constexpr):
    tl.atomic_add(y + tl.arange(0, BLOCK), 1.0)


@jit
def matmul(a, b, c, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)
    square = at[:, None] * N + at[None, :]
    out = tl.dot(tl.load(a + square), tl.load(b + square), input_precision=PRECISION)
    tl.store(c + square, out.to(c.dtype.element_ty))


@jit
def add_matmul(a, b, c, N: tl.constexpr, IMPRECISE: tl.constexpr):
    at = tl.arange(0, N)
    square = at[:, None] * N + at[None, :]
    zeros = tl.zeros([N, N], tl.float32)
    product = tl.dot(tl.load(a + square), tl.load(b + square), zeros, "ieee", max_num_imprecise_acc=IMPRECISE)
    tl.store(c + square, tl.load(c + square) + product)


@jit
def sum_row(x, y, N: tl.constexpr):
    tl.store(y + tl.arange(0, 1), tl.sum(tl.load(x + tl.arange(0, N))[None, :], 1))


@jit
def add_square(x, y, BLOCK: tl.constexpr):
    value = tl.load(x + tl.arange(0, BLOCK))
    tl.store(y + tl.arange(0, BLOCK), (value + value * value).to(y.dtype.element_ty))


def test_bf16_cast_equals_torch_on_every_kind_of_float():
    rng = np.random.default_rng(0)
    edges = np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 1, 0x7FC00000], np.uint32)
    bits = np.concatenate([rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32), edges])
    floats = bits.view(np.float32)
    want = torch.from_numpy(floats).bfloat16().float().numpy()
    np.testing.assert_array_equal(bf16_decode(bf16_encode(floats)), want)


def test_bf16_arithmetic_rounds_after_each_operation():
    x = torch.randn(64).bfloat16()
    y = torch.empty(64, dtype=torch.bfloat16)
    add_square[(1,)](x, y, 64)
    assert torch.equal(y, x + x * x)


def test_tf32_dot_rounds_its_operands():
    a, b = torch.randn(32, 32), torch.randn(32, 32)
    exact = (a.double() @ b.double()).float()
    errors = {}
    for precision in ("ieee", "tf32", "tf32x3"):
        out = torch.empty(32, 32)
        matmul[(1,)](a, b, out, 32, precision)
        errors[precision] = (out - exact).abs().max().item()
    assert errors["ieee"] < 2e-5
    assert errors["tf32x3"] < 2e-5
    assert 1e-4 < errors["tf32"] < 2e-2
    assert tf32_round(np.float32([1 + 2**-10, 1 + 2**-11, 1 + 2**-12])).tolist() == [1 + 2**-10, 1 + 2**-10, 1.0]


@pytest.mark.parametrize("apart", [False, True])
def test_what_is_added_to_a_product_begins_its_chain_of_sums(apart):
    """As Triton's combine pass has it, unless the product carries a `max_num_imprecise_acc` of its own."""
    a, b, start = torch.randn(16, 16), torch.randn(16, 16), torch.randn(16, 16) * 1e4
    done = start.clone()
    add_matmul[(1,)](a, b, done, 16, 1 if apart else None)
    chain = torch.zeros(16, 16) if apart else start
    for k in range(16):
        chain = (chain.double() + a[:, k, None].double() * b[k].double()).float()
    assert torch.equal(done, start + chain if apart else chain)


def test_a_row_is_added_in_halves():
    """1 vanishes beside 2**24; beside another 1 it does not."""
    x, y = torch.tensor([2.0**24, 1.0, 0.0, 1.0]), torch.empty(1)
    sum_row[(1,)](x, y, 4)
    assert y.item() == 2**24 + 2


def test_clean_launch_has_no_fault_and_exact_counts():
    x, y = torch.randn(100), torch.zeros(100)
    with Sanitizer() as report:
        copy_kernel[(4,)](x, y, 100, 0, 32)
    report.check()
    assert torch.equal(x, y)
    assert report.bytes_issued == {"x": 400, "y": 400}
    assert report.bytes_minimum == {"x": 400, "y": 400}
    with Sanitizer() as report:
        matmul[(1,)](torch.ones(16, 16), torch.ones(16, 16), torch.zeros(16, 16), 16, "ieee")
    assert report.flops_issued == 2 * 16**3


def test_a_descriptor_is_watched_like_a_pointer():
    """Its box reads zeros past the tensor's end, which moves no byte; the poison of torch.empty shows through it."""
    x, y = torch.randn(20, 8), torch.full((32, 8), -1.0)
    with Sanitizer() as report:
        copy_boxes[(2,)](TensorDescriptor.from_tensor(x, [16, 8]), y, 16, 8)
    report.check()
    assert torch.equal(y, torch.cat([x, torch.zeros(12, 8)]))
    assert report.bytes_issued == {"box": 640, "y": 1024}
    with Sanitizer() as report:
        copy_boxes[(1,)](TensorDescriptor.from_tensor(torch.empty(16, 8), [16, 8]), y, 16, 8)
    assert any("uninitialised" in fault for fault in report.faults)


@pytest.mark.parametrize("shift", [1, -1, 200_000])
def test_out_of_bounds_load(shift):
    with Sanitizer() as report, pytest.raises(Exception, match="out of bounds"):
        copy_kernel[(4,)](torch.randn(100), torch.zeros(100), 100, shift, 32)
    with pytest.raises(AssertionError, match="out of bounds"):
        report.check()


def test_out_of_bounds_store_through_a_view():
    """The gap of a strided view belongs to somebody else, though it lies in the same allocation."""
    y = torch.zeros(2, 50)[:, :40]
    with Sanitizer(), pytest.raises(Exception, match=r"out of bounds: y .*store of 8 elements"):
        copy_kernel[(1,)](torch.randn(64), y, 48, 0, 64)


def test_uninitialised_read():
    with Sanitizer() as report:
        copy_kernel[(1,)](torch.empty(32), torch.zeros(32), 32, 0, 32)
    assert any("uninitialised" in fault for fault in report.faults)


def test_unwritten_output_shows():
    with Sanitizer() as report:
        out = torch.empty(32)
        copy_kernel[(1,)](torch.randn(32), out, 20, 0, 32)
    report.check()
    assert poisoned(out).sum() == 12


@pytest.mark.parametrize(
    "kernel", [everyone_writes, one_address, reads_neighbour, overwrites_what_another_read, adds_atomically]
)
def test_races(kernel):
    with Sanitizer() as report:
        kernel[(2,)](torch.zeros(64), torch.zeros(64), 32)
    assert any("race" in fault for fault in report.faults)


def test_the_environment_is_the_interpreter():
    assert triton.knobs.runtime.interpret
