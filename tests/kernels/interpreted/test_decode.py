import pytest
import torch
from shipyard.kernels.accuracy import CardProducts, hold_bars
from shipyard.kernels.attention import Tile, flash_attention
from shipyard.kernels.decode import decode_attention, decode_reference
from shipyard.kernels.interpreter import Sanitizer, poisoned

SLOTS = 16


def sample(lengths, heads=6, groups=2, width=32, dtype=torch.bfloat16):
    """Pages in a shuffled order, as a server's allocator leaves them; unused entries of the table point nowhere."""
    torch.manual_seed(0)
    need = [-(-length // SLOTS) for length in lengths]
    order = torch.randperm(sum(need) + 3)
    table = torch.full((len(lengths), max(need) + 1), 2**30, dtype=torch.int32)
    for row, count in enumerate(need):
        table[row, :count], order = order[:count].to(torch.int32), order[count:]
    pages = torch.randn(2, sum(need) + 3, SLOTS, groups, width, dtype=torch.float64).to(dtype)
    q = torch.randn(len(lengths), heads, width, dtype=torch.float64).to(dtype)
    return q, pages[0].clone(), pages[1].clone(), table, torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_decode_accuracy(dtype):
    q, k, v, table, lengths = sample([1, 63, 0, 64, 65, 700], dtype=dtype)
    with Sanitizer() as report:
        mine = decode_attention(q, k, v, table, lengths)
    report.check()
    assert not poisoned(mine).any()
    assert (mine[2] == 0).all()
    exact = decode_reference(q.double(), k.double(), v.double(), table, lengths)
    if dtype == torch.float64:
        torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-12)
    else:
        hold_bars(f"decode {dtype}", [mine], [eager_decode(q, k, v, table, lengths)], [exact])


def eager_decode(*inputs):
    """PyTorch's code with the products that serve one query: of fp32, a GEMV whose lanes share a product's depth."""
    with CardProducts(careful=True):
        return decode_reference(*inputs)


@pytest.mark.parametrize("kind", ["large logits", "equal maxima"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_decode_accuracy_on_adversarial_inputs(kind, dtype):
    """Three splits, whose maxima differ by far or not at all, at a wider head."""
    q, k, v, table, lengths = sample([700, 257], 4, 1, 128, dtype)
    q, k = (q * 12, k) if kind == "large logits" else (q, k[:1, :1].expand_as(k).clone())
    mine = decode_attention(q, k, v, table, lengths)
    exact = decode_reference(q.double(), k.double(), v.double(), table, lengths)
    hold_bars(f"decode {dtype} {kind}", [mine], [eager_decode(q, k, v, table, lengths)], [exact])


def test_decode_accuracy_over_many_splits():
    """40 parts to join, and few keys, whose products' rounding is all there is."""
    q, k, v, table, lengths = sample([9600, 5], 4, 1, 64, torch.float32)
    mine = decode_attention(q, k, v, table, lengths)
    exact = decode_reference(q.double(), k.double(), v.double(), table, lengths)
    eager = eager_decode(q, k, v, table, lengths)
    for row in range(2):
        hold_bars(f"decode {torch.float32} {lengths[row]} keys", *([x[row]] for x in (mine, eager, exact)))


def test_decode_is_batch_invariant():
    """Each sequence alone, in any order, and with a longer table gives the same bits."""
    q, k, v, table, lengths = sample([70, 600, 5])
    whole = decode_attention(q, k, v, table, lengths)
    order = [2, 0, 1]
    assert torch.equal(decode_attention(q[order], k, v, table[order], lengths[order]), whole[order])
    wide = torch.cat([table, table], 1)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(decode_attention(q[one], k, v, wide[one], lengths[one]), whole[one])


def test_decode_agrees_with_prefill():
    """The last row of a causal prefill equals decoding against the same keys (in other tiles, so not to the bit)."""
    q, k, v, table, lengths = sample([90], dtype=torch.float64)
    pages = table[0, :6].long()
    keys, values = (x[pages].flatten(0, 1)[:90] for x in (k, v))
    cu_q, cu_k = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 90], dtype=torch.int32)
    prefill = flash_attention(q, keys, values, cu_q, cu_seqlens_k=cu_k, tile=Tile(16, 16, 4, 1))
    torch.testing.assert_close(decode_attention(q, k, v, table, lengths), prefill, rtol=1e-11, atol=1e-12)


def test_decode_refusals():
    q, k, v, table, lengths = sample([5])
    with pytest.raises(ValueError, match="do not fit"):
        decode_attention(q[:, :5], k, v, table, lengths)
    with pytest.raises(ValueError, match="power of two"):
        decode_attention(q[..., :24], k[..., :24], v[..., :24], table, lengths)
    with pytest.raises(ValueError, match="one row per sequence"):
        decode_attention(q, k, v, table, lengths.repeat(2))
