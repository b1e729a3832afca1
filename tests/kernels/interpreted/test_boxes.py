"""Keys that Hopper's copy engine brings (width 128 in half a word): the laws hold there as where threads load them."""

import pytest
import torch
from shipyard.kernels import attention
from shipyard.kernels.accuracy import hold_bars, run_all_ways
from shipyard.kernels.attention import Tile, attention_reference, flash_attention
from shipyard.kernels.interpreter import Sanitizer
from shipyard.kernels.jit import fits_box

TILE = Tile(32, 32, 4, 1)
LENGTHS = [40, 97, 0, 64, 33]
SPAN = slice(40, 137)  # the second of them
FEATURES = {"causal": {}, "full": {"causal": False}, "window": {"window": 50}, "softcap": {"softcap": 5.0}}


def borders(*lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def pack(dtype=torch.bfloat16, slack=9):
    torch.manual_seed(0)
    return [torch.randn(sum(LENGTHS) + slack, heads, 128).to(dtype) for heads in (4, 2, 2)]


def watched(*inputs, **features):
    with Sanitizer() as report:
        out = flash_attention(*inputs, tile=TILE, **features)
    report.check()
    return out


def test_only_sm_90_at_width_128_in_half_a_word_has_boxes():
    assert attention.key_boxes("sm_90", 128, 128, torch.bfloat16)
    for other in (("sm_80", 128, 128, torch.bfloat16), ("sm_90", 192, 128, torch.bfloat16), ("gfx942", 128, 128,
                  torch.float16), ("sm_90", 128, 128, torch.float32), ("sm_90", 64, 64, torch.float16)):  # fmt: skip
        assert not attention.key_boxes(*other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_a_document_never_meets_what_its_neighbours_hold(feature, dtype):
    """NaN before and behind it: the same bits as among numbers, and as alone. A box over its end would bring them."""
    clean = pack(dtype)
    poor = [x.clone() for x in clean]
    for x in poor:
        x[: SPAN.start], x[SPAN.stop :] = float("nan"), float("nan")
    features = FEATURES[feature]
    among = watched(*clean, borders(*LENGTHS), **features)[SPAN]
    assert torch.equal(watched(*poor, borders(*LENGTHS), **features)[SPAN], among)
    assert torch.equal(watched(*(x[SPAN] for x in clean), borders(97), **features), among)


def test_boxes_and_pointers_bring_the_same(monkeypatch):
    """With rows added up alike, not a bit tells how their keys came."""
    made, box_of = [], attention.box_of
    monkeypatch.setattr(attention, "box_of", lambda *given: made.append(box_of(*given)) or made[-1])
    monkeypatch.setattr(attention, "BOXED_SUMS", 1)
    inputs = pack()
    boxed = watched(*inputs, borders(*LENGTHS), window=70)
    assert [box.block_shape for box in made] == [[1, 32, 128]] * 2
    monkeypatch.setattr(attention, "key_boxes", lambda *_: False)
    assert torch.equal(watched(*inputs, borders(*LENGTHS), window=70), boxed)
    assert len(made) == 2


def test_prefill_in_chunks_equals_the_whole():
    (q, k, v), whole = (x[SPAN] for x in pack()), []
    for start, end in ((0, 20), (20, 21), (21, 64), (64, 97)):
        part = borders(end - start)
        whole.append(watched(q[start:end], k[:end], v[:end], part, cu_seqlens_k=borders(end)))
    assert torch.equal(torch.cat(whole), watched(q, k, v, borders(97)))


def test_sinks_count_once():
    """The sink's weight is spread over the parts of a row's sum."""
    q, k, v = (x[SPAN] for x in pack())
    sinks = torch.tensor([3.0, 1.0, -1.0, 8.0]).to(q.dtype)
    mine = lambda q, k, v, sinks: flash_attention(q, k, v, sinks_H=sinks, tile=TILE)
    reference = lambda q, k, v, sinks: attention_reference(q, k, v, sinks_H=sinks)
    hold_bars("attention bf16 sinks 128/128", *run_all_ways(mine, reference, [q, k, v, sinks]))


def test_any_view_will_do():
    """What the engine cannot read in place is copied first; without keys there is nothing to read."""
    q, k, v = pack()
    cu = borders(*LENGTHS)
    want = watched(q, k, v, cu)
    fused = torch.cat([q, k, v], 1)
    assert fits_box(fused[:, 4:6])
    assert torch.equal(watched(fused[:, :4], fused[:, 4:6], fused[:, 6:], cu), want)
    odd = torch.zeros(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape).copy_(k)
    assert not fits_box(odd)
    assert torch.equal(watched(q, odd, v, cu), want)
    one = k[:, :1].expand(-1, 2, -1)
    assert not fits_box(one)
    assert torch.equal(watched(q, one, v, cu), watched(q, one.clone(), v, cu))
    assert not watched(q, k[:0], v[:0], borders(sum(LENGTHS)), cu_seqlens_k=borders(0)).any()
