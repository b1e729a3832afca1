import pytest
import torch
from shipyard.kernels.accuracy import FEW, hold_bars, run_all_ways
from shipyard.kernels.attention import Tile, attention_reference, flash_attention, places
from shipyard.kernels.attention_tiles import tile_of
from shipyard.kernels.interpreter import Sanitizer, poisoned
from shipyard.kernels.jit import jit, tl

SMALL = Tile(16, 16, 4, 1)
FEATURES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 20},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks_H": True},
    "all": {"window": 9, "softcap": 3.0, "sinks_H": True},
}


def borders(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def sample(lengths, heads=4, groups=2, width=16, value_width=None, dtype=torch.float64, slack=0, gain=1.0):
    torch.manual_seed(0)
    tokens = sum(lengths) + slack
    shapes = [(tokens, heads, width), (tokens, groups, width), (tokens, groups, value_width or width)]
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [(q * gain).to(dtype), k.to(dtype), v.to(dtype)], borders(lengths)


def both_ways(inputs, cu, tile=None, careful=None, **features):
    """outputs and gradients of the kernel, of eager code in the same dtype (in fp32 the careful one), and in fp64."""
    if features.get("sinks_H"):
        torch.manual_seed(5)
        inputs = [*inputs, torch.randn(inputs[0].shape[1]).to(inputs[0].dtype)]
    features.pop("sinks_H", None)
    mine = lambda q, k, v, sinks=None: flash_attention(q, k, v, cu, sinks_H=sinks, tile=tile, **features)
    reference = lambda q, k, v, sinks=None: attention_reference(q, k, v, cu, sinks_H=sinks, **features)
    with Sanitizer() as report:
        results = run_all_ways(mine, reference, inputs, careful=careful)
    report.check()
    assert not any(poisoned(x).any() for x in results[0])
    if len(inputs) == 4 and inputs[3].dtype == torch.float32 and inputs[3].numel() < FEW:
        return [result[:-1] for result in results]  # test_attention_accuracy_of_the_sinks_gradient judges these
    return results


@pytest.mark.parametrize(("feature", "width"), [*((feature, 16) for feature in FEATURES), ("all", 256)])
def test_attention_equals_the_formula_in_fp64(feature, width):
    """Many small tiles: empty documents, single tokens, exact multiples, slack at the end; values and gradients. At
    width 256 dK and dV come from a launch each."""
    inputs, cu = sample([5, 0, 1, 32, 39], slack=7, groups=2, width=width)
    mine, _, exact = both_ways(inputs, cu, SMALL, **FEATURES[feature])
    for x, y in zip(mine, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)
    assert (mine[0][-7:] == 0).all()
    assert all((grad[-7:] == 0).all() for grad in mine[1:4])


@pytest.mark.parametrize(
    ("feature", "width"), [("causal", 16), ("all", 16), pytest.param("all", 256, marks=pytest.mark.kernels_full)]
)
def test_attention_gradcheck(feature, width):
    inputs, cu = sample([3, 0, 18], heads=2, groups=1, width=width)
    features = dict(FEATURES[feature])
    leaves = [x.requires_grad_() for x in inputs]
    if features.pop("sinks_H", None):
        leaves.append(torch.randn(2, dtype=torch.float64, requires_grad=True))
    call = lambda q, k, v, sinks=None: flash_attention(q, k, v, cu, sinks_H=sinks, tile=SMALL, **features)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_attention_accuracy_by_width(dtype, width, value_width):
    inputs, cu = sample([30, 0, 130], 2, 1, width, value_width, dtype, slack=3)
    hold_bars(f"attention {dtype} {width}/{value_width}", *both_ways(inputs, cu))


@pytest.mark.parametrize("feature", FEATURES)
def test_attention_accuracy_by_feature(feature):
    inputs, cu = sample([127, 64, 1], 8, 4, 64, dtype=torch.bfloat16)
    hold_bars(f"attention bf16 {feature}", *both_ways(inputs, cu, **FEATURES[feature]))


@pytest.mark.kernels_full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_attention_accuracy_everywhere(dtype, feature, width, value_width):
    inputs, cu = sample([1, 63, 64, 0, 65, 127], 2, 1, width, value_width, dtype, slack=5)
    hold_bars(f"attention {dtype} {feature} {width}/{value_width}", *both_ways(inputs, cu, **FEATURES[feature]))


@pytest.mark.kernels_full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("feature", ["causal", "all"])
def test_attention_accuracy_over_many_tiles(dtype, feature):
    inputs, cu = sample([0, 1000, 9], 1, 1, 64, dtype=dtype)
    hold_bars(f"attention {dtype} {feature} 1000 tokens", *both_ways(inputs, cu, **FEATURES[feature]))


@pytest.mark.kernels_full
@pytest.mark.parametrize("feature", ["sinks", "all"])
def test_attention_accuracy_of_the_sinks_gradient(feature):
    """One number a head, a sum of terms of either sign: in fp32, fewer than FEW of them tell whose luck was better.
    Without softcap and window 1.13 of the careful eager code's error; so beside the plain one."""
    inputs, cu = sample([40], 128, 1, 16, dtype=torch.float32)
    careful = feature != "sinks"
    mine, eager, exact = (result[-1:] for result in both_ways(inputs, cu, careful=careful, **FEATURES[feature]))
    assert exact[0].shape == (128,)
    hold_bars(f"attention {torch.float32} {feature} of 128 heads", mine, eager, exact)


@pytest.mark.parametrize("kind", ["large logits", "equal maxima", "one-hot rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_accuracy_on_adversarial_inputs(kind, dtype):
    inputs, cu = sample([65, 127], 2, 2, 64, dtype=dtype, gain=12.0 if kind == "large logits" else 1.0)
    q, k, v = inputs
    if kind == "equal maxima":
        k = k[:1].expand_as(k).clone()
    if kind == "one-hot rows":  # each query's own key wins by far
        k = torch.nn.functional.one_hot(torch.arange(192) % 64, 64).to(dtype)[:, None].repeat(1, 2, 1)
        q = k * 400
    mine, eager, exact = both_ways([q, k, v], cu)
    hold_bars(f"attention {dtype} {kind}", mine, eager, exact, cancels=kind != "large logits")


def test_only_fp16_keeps_what_rounding_took_from_its_output():
    """At most half of its last bit; the adversarial inputs above need it. No call without a gradient makes it."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        (q, k, v), cu = sample([40, 9], 2, 1, 16, dtype=dtype, slack=3)
        saved = flash_attention(q.requires_grad_(), k, v, cu, tile=SMALL).grad_fn.saved_tensors
        out, rest = saved[6].double(), saved[7]
        assert (rest is not None) == (dtype == torch.float16)
        if rest is not None:
            assert (rest.double().abs() <= out.abs() * 2**-11 + 2**-25).all()
            assert (rest[:49] != 0).double().mean() > 0.9
            assert (rest[49:] == 0).all()


@pytest.mark.parametrize(
    ("width", "dtype"), [(32, torch.bfloat16), pytest.param(256, torch.float32, marks=pytest.mark.kernels_full)]
)
def test_laws_bit_for_bit(width, dtype):
    """A document alone equals itself in any pack and order, forward and backward; two runs agree."""
    lengths = [40, 17, 64]
    inputs, cu = sample(lengths, 4, 2, width, dtype=dtype)
    tile = Tile(32, 16, 4, 1)

    def run(parts, cu):
        leaves = [x.detach().requires_grad_() for x in parts]
        out = flash_attention(*leaves, cu, tile=tile, window=30)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.sin(out.detach().float()).to(out.dtype))]

    whole = run(inputs, cu)
    assert all(torch.equal(x, y) for x, y in zip(whole, run(inputs, cu), strict=True))
    spans = [slice(cu[i], cu[i + 1]) for i in range(3)]
    order = [2, 0, 1]
    turned = run([torch.cat([x[spans[i]] for i in order]) for x in inputs], borders([lengths[i] for i in order]))
    new_cu = borders([lengths[i] for i in order])
    for place, i in enumerate(order):
        alone = run([x[spans[i]] for x in inputs], borders([lengths[i]]))
        for x, y, z in zip(whole, alone, turned, strict=True):
            assert torch.equal(x[spans[i]], y)
            assert torch.equal(z[new_cu[place] : new_cu[place + 1]], y)


def test_prefill_in_chunks_equals_the_whole():
    """Also when a chunk's border falls inside a tile; the cache is the keys so far."""
    (q, k, v), cu = sample([75], 2, 1, 32, dtype=torch.bfloat16)
    tile = Tile(32, 16, 4, 1)
    for features in ({}, {"window": 22}):
        whole = flash_attention(q, k, v, cu, tile=tile, **features)
        done = []
        for start, end in ((0, 20), (20, 21), (21, 64), (64, 75)):
            cu_q, cu_k = borders([end - start]), borders([end])
            done.append(flash_attention(q[start:end], k[:end], v[:end], cu_q, cu_seqlens_k=cu_k, tile=tile, **features))
        assert torch.equal(torch.cat(done), whole)


def test_rows_that_see_nothing_are_zero():
    """More queries than keys: the first rows stand before every key. No NaN, forward or backward."""
    (q, k, v), _ = sample([40], 2, 1, 16)
    mine = lambda q, k, v: flash_attention(q, k, v, borders([40, 0]), cu_seqlens_k=borders([9, 0]), tile=SMALL)
    reference = lambda q, k, v: attention_reference(q, k, v, borders([40, 0]), cu_seqlens_k=borders([9, 0]))
    results = run_all_ways(mine, reference, [q, k[:9].clone(), v[:9].clone()])
    assert (results[0][0][:31] == 0).all()
    for x, y in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


def test_views_and_no_documents():
    (q, k, v), cu = sample([20, 13], 2, 2, 16)
    fused = torch.cat([q, k, v], 1)
    views = fused[:, :2], fused[:, 2:4], fused[:, 4:]
    assert torch.equal(flash_attention(*views, cu, tile=SMALL), flash_attention(q, k, v, cu, tile=SMALL))
    assert flash_attention(q[:0], k[:0], v[:0], borders([])).shape == (0, 2, 16)


def test_attention_refusals():
    (q, k, v), cu = sample([4], 4, 2, 16)
    for change, words in (
        (dict(window=0), "window 0"), (dict(window=3, causal=False), "with causal"), (dict(softcap=-1.0), "softcap"),
        (dict(sinks_H=torch.zeros(3)), "one per query head"), (dict(scale=-1.0), "scale"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            flash_attention(q, k, v, cu, **change)
    with pytest.raises(ValueError, match="multiple of"):
        flash_attention(q[:, :3], k, v, cu)
    with pytest.raises(ValueError, match="head widths 24"):
        flash_attention(torch.zeros(4, 4, 24), torch.zeros(4, 2, 24), torch.zeros(4, 2, 24), cu)


@jit
def name_tiles(cu, documents, found, BLOCK: tl.constexpr):
    document, start, length, first = tile_of(cu, documents, BLOCK)
    at = found + tl.program_id(0) * 4
    tl.store(at, document)
    tl.store(at + 1, start)
    tl.store(at + 2, length)
    tl.store(at + 3, first)


@pytest.mark.parametrize("slack", [0, 100])
@pytest.mark.parametrize("lengths", [[64], [65], [0, 0, 5], [7, 0, 16, 17, 0, 0, 1, 48], [1] * 40 + [0, 33]])
def test_every_tile_has_one_program_and_few_programs_have_none(lengths, slack):
    """Of any documents, empty ones among them, in blocks of 16; the last tile of a document comes first."""
    cu, want = borders(lengths), []
    programs = places(sum(lengths) + slack, len(lengths), 16)
    found = torch.zeros(programs, 4, dtype=torch.int32)
    name_tiles[(programs,)](cu, len(lengths), found, BLOCK=16)
    named = [tuple(row) for row in found.tolist()]
    for document, length in enumerate(lengths):
        want += [(document, int(cu[document]), length, first) for first in reversed(range(0, length, 16))]
    assert [row for row in named if row[3] < row[2]] == want
    assert programs - len(want) <= len(lengths) + slack // 16


def tiles_that_see(lengths, window):
    """Tiles of 16 x 16 in which some query sees some key, by trying every pair."""
    seen = {
        (document, row // 16, key // 16)
        for document, length in enumerate(lengths)
        for row in range(length)
        for key in range(row + 1)
        if window is None or key > row - window
    }
    return len(seen)


@pytest.mark.parametrize("window", [None, 9])
def test_attention_multiplies_only_tiles_that_see_something(window):
    """The counted FLOPs are those of such tiles: two products forward; four for dK and dV and three for dQ."""
    lengths, heads, width = [5, 0, 32, 39], 4, 16
    inputs, cu = sample(lengths, heads, dtype=torch.bfloat16, width=width)
    with Sanitizer() as forward:
        out = flash_attention(*(x.requires_grad_() for x in inputs), cu, window=window, tile=SMALL)
    with Sanitizer() as backward:
        out.float().sum().backward()
    product = 2 * 16 * 16 * width * heads * tiles_that_see(lengths, window)
    assert (forward.flops_issued, backward.flops_issued) == (2 * product, 7 * product)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_tile_that_moves_no_maximum_changes_no_bit(dtype, softcap):
    """Rows in a chunk of their own meet fewer masked tiles than in the whole, and others without a mask: also the
    log-sum-exp, which half a word's rounding does not hide, is the same."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(96, 1, 16).to(dtype).requires_grad_() for _ in range(3))

    def log_sum_exp(first: int) -> torch.Tensor:
        borders, keys = (torch.tensor([0, length], dtype=torch.int32) for length in (96 - first, 96))
        out = flash_attention(q[first:], k, v, borders, cu_seqlens_k=keys, softcap=softcap, tile=Tile(32, 16, 4, 1))
        return torch.stack(out.grad_fn.saved_tensors[8:])[:, 0]

    whole = log_sum_exp(0)
    for first in (5, 16, 27):
        assert torch.equal(log_sum_exp(first), whole[:, first:])
