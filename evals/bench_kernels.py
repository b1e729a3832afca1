"""Times every kernel on a real GPU against PyTorch and, where installed, flash-attn and Liger; prints a table.

`shipyard bench kernels [--out docs/kernels.md]`. On a machine without a GPU it says so in one sentence and succeeds.
Times are medians of `triton.testing.do_bench` in milliseconds. Attention's operations are those that the mask leaves, 2
products forward and 5 backward.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.attention import flash_attention
from ..kernels.datasheet_page import CARD, put_card
from ..kernels.decode import decode_attention
from ..kernels.jit import HAS_TRITON, architecture
from ..kernels.linear_cross_entropy import linear_cross_entropy
from ..kernels.rms_norm import rms_norm, rms_norm_reference
from ..kernels.rope import inverse_frequencies, rope, rope_reference, rope_tables
from ..kernels.shipped import WIDTHS
from ..kernels.swiglu import swiglu, swiglu_reference

TOKENS, HEADS, GROUPS, WIDTH, MODEL, HIDDEN, VOCABULARY = 8192, 32, 8, 128, 4096, 14336, 128256
OURS = "shipyard"
DOCUMENTS = {
    "one document of 8192": [TOKENS],
    "24 documents of 8 to 2048": [2048, 1024, 1024, 512, 512, 512, 512, 256, 256, 256, 256, 128, 128, 128, 128, 64, 64,
                                  64, 64, 32, 32, 16, 16, 8],
}  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one implementation; `flops` of the forward and backward pass where matrix products dominate."""

    kernel: str
    implementation: str
    forward_ms: float
    backward_ms: float | None
    flops: tuple[float, float] = (0.0, 0.0)


def reason_to_skip() -> str | None:
    """A plain sentence where nothing can be timed."""
    if not HAS_TRITON:
        return "bench_kernels: skipped, triton is not installed."
    if not torch.cuda.is_available():
        return "bench_kernels: skipped, this machine has no GPU; what is known without one is in docs/kernels.md."
    return None


def leaf(*shape: int) -> torch.Tensor:
    """A bf16 parameter on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def clock(
    kernel: str, implementation: str, run: Callable, inputs: list[torch.Tensor], flops: tuple[float, float] = (0.0, 0.0)
) -> Timing:
    """Times the forward pass, then the backward pass alone."""
    from triton.testing import do_bench

    median: Callable[..., Any] = do_bench
    forward = float(median(lambda: run(*inputs), return_mode="median"))
    out = run(*inputs)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    grads = [torch.randn_like(o) for o in outs]
    backward = None
    if outs:
        backward = float(
            median(lambda: torch.autograd.grad(outs, inputs, grads, retain_graph=True), return_mode="median")
        )
    return Timing(kernel, implementation, forward, backward, flops)


def peer(
    kernel: str, implementation: str, run: Callable, inputs: list[torch.Tensor], flops: tuple[float, float] = (0.0, 0.0)
) -> Timing:
    """The same for somebody else's code, which may not take a shape: the line then has the reason's first words."""
    try:
        return clock(kernel, implementation, run, inputs, flops)
    except Exception as error:  # every library has kinds of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Timing(kernel, f"{implementation}: not here ({reason[:60]})", math.nan, None)


def attention_timings() -> Iterator[Timing]:
    """Every shipped width in one long causal document, GQA 32/8; and a packed row at width 128."""
    for width, value_width in WIDTHS:
        yield from attention_beside_peers("one document of 8192", width, value_width)
    yield from attention_beside_peers("24 documents of 8 to 2048", WIDTH, WIDTH)


def attention_beside_peers(documents: str, width: int, value_width: int) -> Iterator[Timing]:
    """Ours, SDPA's two fast backends where there is one document, FlexAttention, flash-attn."""
    lengths = DOCUMENTS[documents]
    tokens = sum(lengths)
    name = f"attention {width}/{value_width}, {documents}"
    inputs = [leaf(tokens, HEADS, width), leaf(tokens, GROUPS, width), leaf(tokens, GROUPS, value_width)]
    scores = HEADS * sum(length * (length + 1) / 2 for length in lengths)
    flops = (2 * scores * (width + value_width), 2 * scores * (3 * width + 2 * value_width))
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    yield clock(name, OURS, lambda q, k, v: flash_attention(q, k, v, cu), inputs, flops)
    split = lambda x: x.transpose(0, 1)[None]
    sdpa = lambda q, k, v: F.scaled_dot_product_attention(split(q), split(k), split(v), is_causal=True, enable_gqa=True)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if len(lengths) == 1 else ():
        with sdpa_kernel(backend):
            row = peer(name, f"SDPA, {backend.name.lower()}", sdpa, inputs, flops)
        yield row
    if width == value_width:
        yield peer(name, "FlexAttention", flex_attention_of(lengths), inputs, flops)
    if importlib.util.find_spec("flash_attn"):
        varlen, longest = importlib.import_module("flash_attn").flash_attn_varlen_func, max(lengths)
        theirs = lambda q, k, v: varlen(q, k, v, cu, cu, longest, longest, causal=True)
        yield peer(name, "flash-attn", theirs, inputs, flops)


def flex_attention_of(lengths: list[int]) -> Callable:
    """FlexAttention, compiled, over these documents."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()
    rule = lambda b, h, i, j: (i >= j) & (of[i] == of[j])
    mask = create_block_mask(rule, None, None, len(of), len(of), device="cuda")
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    split = lambda x: x.transpose(0, 1)[None]
    return lambda q, k, v: compiled(split(q), split(k), split(v), block_mask=mask, enable_gqa=True)


def elementwise_timings() -> Iterator[Timing]:
    """RoPE, RMSNorm and SwiGLU at 8192 tokens."""
    qk = [leaf(1, TOKENS, HEADS, WIDTH), leaf(1, TOKENS, GROUPS, WIDTH)]
    cos, sin = rope_tables(torch.arange(TOKENS, device="cuda")[None], inverse_frequencies(WIDTH, 5e5)[0])
    xw = [leaf(TOKENS, MODEL), leaf(MODEL)]
    gates = [leaf(TOKENS, HIDDEN), leaf(TOKENS, HIDDEN)]
    for name, mine, reference, inputs in (
        ("rope", lambda q, k: rope(q, k, cos, sin), lambda q, k: rope_reference(q, k, cos, sin), qk),
        ("rms_norm", lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference(x, w, 1e-5), xw),
        ("swiglu", swiglu, swiglu_reference, gates),
    ):
        yield clock(name, OURS, mine, inputs)
        yield peer(name, "PyTorch", reference, inputs)
        yield peer(name, "PyTorch, compiled", torch.compile(reference, dynamic=False), inputs)
    if importlib.util.find_spec("liger_kernel"):
        theirs = importlib.import_module("liger_kernel.ops")
        yield peer("swiglu", "Liger", lambda g, u: theirs.LigerSiLUMulFunction.apply(g, u), gates)
        yield peer("rms_norm", "Liger", lambda x, w: theirs.LigerRMSNormFunction.apply(x, w, 1e-5), xw)
        whole = [torch.cat([part, part], -1) for part in (cos, sin)]  # it wants the table twice over
        turned = lambda q, k: theirs.LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *whole)
        yield peer("rope", "Liger", turned, qk)


def head_and_decode_timings() -> Iterator[Timing]:
    """The 128,256-wide head over 4096 tokens, and 64 sequences decoding against 4096 keys each."""
    xw = [leaf(4096, MODEL), leaf(VOCABULARY, MODEL)]
    targets = torch.randint(0, VOCABULARY, (4096,), device="cuda")
    flops = (2.0 * 4096 * MODEL * VOCABULARY, 4.0 * 4096 * MODEL * VOCABULARY)
    name, eager = "linear_cross_entropy", lambda x, w: F.cross_entropy((x @ w.T).float(), targets)
    yield clock(name, OURS, lambda x, w: linear_cross_entropy(x, w, targets)[0], xw, flops)
    yield peer(name, "PyTorch", eager, xw, flops)
    yield peer(name, "PyTorch, compiled", torch.compile(eager, dynamic=False), xw, flops)
    if importlib.util.find_spec("liger_kernel"):
        fused = importlib.import_module("liger_kernel.ops").LigerFusedLinearCrossEntropyFunction
        yield peer(name, "Liger", lambda x, w: fused.apply(x, w, targets)[0], xw, flops)
    with torch.no_grad():
        q, pages = leaf(64, HEADS, WIDTH), leaf(64 * 256, 16, GROUPS, WIDTH)
        table = torch.arange(64 * 256, device="cuda", dtype=torch.int32).view(64, 256)
        lengths = torch.full((64,), 4096, device="cuda", dtype=torch.int32)
        keys = pages.view(64, 4096, GROUPS, WIDTH).transpose(1, 2)
        sdpa = lambda q: F.scaled_dot_product_attention(q[:, :, None], keys, keys, enable_gqa=True)
        yield clock("decode", OURS, lambda q: decode_attention(q, pages, pages, table, lengths), [q])
        yield peer("decode", "SDPA, no pages", sdpa, [q])


def matrix_ceiling() -> float:
    """TFLOP/s of a large bf16 product here: what a kernel of products can hope for."""
    from triton.testing import do_bench

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    median: Callable[..., Any] = do_bench
    return 2 * 8192**3 / float(median(lambda: a @ b, return_mode="median")) / 1e9


def setting(ceiling: float) -> list[str]:
    """The card, in a title, and what was installed."""
    import triton

    device = torch.device("cuda")
    card = f"{torch.cuda.get_device_name()} ({architecture(device)})"
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    return [
        CARD + card,
        "",
        f"Written by `shipyard bench kernels --out docs/kernels.md`: {versions}, bf16, medians. Shapes are Llama 3 "
        f"8B's ({HEADS} query and {GROUPS} key heads, {MODEL} wide, {VOCABULARY} tokens known), attention in every "
        f"shipped width; TFLOP/s count what the mask leaves. A product of 8192 x 8192 matrices runs at {ceiling:.0f} "
        "TFLOP/s there. Liger makes the head's gradient in its forward pass: read its two columns together.",
        "",
    ]


def markdown(rows: Sequence[Timing], title: list[str]) -> str:
    """The section: the card and versions, then the table."""
    head = [
        "| kernel | implementation | forward ms | backward ms | forward TFLOP/s | backward TFLOP/s | ours is faster |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    ours = {row.kernel: row for row in rows if row.implementation == OURS}
    return "\n".join([*title, *head, *(_line(row, ours[row.kernel]) for row in rows)])


def _line(row: Timing, ours: Timing) -> str:
    number = lambda value, places=3: "-" if value is None or value != value else f"{value:.{places}f}"
    rate = lambda flops, ms: number(flops / ms / 1e9 if flops and ms else None, 0)
    times = ""
    if row is not ours and row.forward_ms == row.forward_ms:
        whole = lambda timing: timing.forward_ms + (timing.backward_ms or 0.0)
        times = f"{row.forward_ms / ours.forward_ms:.2f}x, with backward {whole(row) / whole(ours):.2f}x"
    return (
        f"| {row.kernel} | {row.implementation} | {number(row.forward_ms)} | {number(row.backward_ms)} | "
        f"{rate(row.flops[0], row.forward_ms)} | {rate(row.flops[1], row.backward_ms)} | {times} |"
    )


def bench_kernels(out: Path | None = None) -> str:
    """The table, also put into the page `out`; or one sentence that says why there is none."""
    if reason := reason_to_skip():
        return reason
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # a backward pass is timed by itself, many times over
    rows = [*attention_timings(), *elementwise_timings(), *head_and_decode_timings()]
    section = markdown(rows, setting(matrix_ceiling()))
    if out is not None:
        put_card(out, section)
    return section


if __name__ == "__main__":
    print(bench_kernels())
