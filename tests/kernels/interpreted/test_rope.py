import pytest
import torch
from shipyard.kernels.accuracy import hold_bars, run_all_ways
from shipyard.kernels.interpreter import Sanitizer, poisoned
from shipyard.kernels.rope import inverse_frequencies, rope, rope_reference, rope_tables
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sample(dtype, heads=3, groups=1, width=16, pairs=8, lengths=(5, 1, 9)):
    torch.manual_seed(0)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    cos, sin = rope_tables(positions.expand(2, -1), inverse_frequencies(2 * pairs, 10000.0)[0])
    tokens = positions.shape[1]
    q = torch.randn(2, tokens, heads, width).to(dtype)
    k = torch.randn(2, tokens, groups, width).to(dtype)
    return q, k, cos, sin


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "pairs"), [(16, 8), (80, 40), (64, 16), (192, 32)])
def test_rope_accuracy(width, pairs, interleaved):
    """Odd widths and partial rotary; each rounded to the tables' dtype as eager code does, and clean in memory."""
    for dtype in DTYPES:
        q, k, cos, sin = sample(dtype, width=width, pairs=pairs)
        with Sanitizer() as report:
            mine, eager, exact = run_all_ways(rope, rope_reference, [q, k], (cos, sin, interleaved))
        report.check()
        assert not any(poisoned(x).any() for x in mine)
        hold_bars(f"rope {dtype} {width}/{2 * pairs} interleaved={interleaved}", mine, eager, exact)


def test_rope_gradcheck_on_strided_views():
    q, k, cos, sin = sample(torch.float64, width=8, pairs=3, lengths=(1, 2))
    fused = torch.cat([q, k], 2).requires_grad_()
    split = lambda x, flag: rope(x[:, :, :3], x[:, :, 3:], cos.double(), sin.double(), flag)
    for flag in (False, True):
        assert torch.autograd.gradcheck(lambda x, flag=flag: split(x, flag), fused, fast_mode=True)


def test_rope_laws():
    """Out of place; a document rotates the same in any pack; one table row serves all rows; two runs agree."""
    q, k, cos, sin = sample(torch.bfloat16)
    before = q.clone()
    out_q, out_k = rope(q, k, cos, sin)
    assert torch.equal(q, before)
    alone_q, alone_k = rope(q[:, 6:], k[:, 6:], cos[:, 6:], sin[:, 6:])
    assert torch.equal(out_q[:, 6:], alone_q)
    assert torch.equal(out_k[:, 6:], alone_k)
    assert torch.equal(rope(q, k, cos[:1], sin[:1])[0], out_q)


@pytest.mark.parametrize("scaling", [
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
     "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "truncate": False,
     "attention_factor": 1.2},
])  # fmt: skip
def test_scaling_equals_transformers(scaling):
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, head_dim=128, max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **scaling},
    )  # fmt: skip
    want, want_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, device="cpu")
    got, factor = inverse_frequencies(128, 500000.0, scaling)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert factor == pytest.approx(want_factor)


def test_rope_refusals():
    q, k, cos, sin = sample(torch.float32)
    with pytest.raises(ValueError, match="must agree with q"):
        rope(q, k[:, 1:], cos, sin)
    with pytest.raises(ValueError, match="do not fit a head of width 8"):
        rope(q[..., :8], k[..., :8], cos.repeat(1, 1, 2), sin.repeat(1, 1, 2))
    with pytest.raises(ValueError, match="must be default, llama3 or yarn"):
        inverse_frequencies(8, 1e4, {"rope_type": "magic"})
