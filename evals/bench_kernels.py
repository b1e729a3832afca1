"""Times every kernel on a real GPU against PyTorch and, where installed, flash-attn and Liger; prints a table.

`python -m shipyard.evals.bench_kernels`. On a machine without a GPU it says so in one sentence and succeeds.
Times are medians of `triton.testing.do_bench` in milliseconds, at Llama 3 8B's shapes in bf16. Liger's cross-entropy
makes its gradient in the forward pass, and some of its kernels work in place: read its two columns together.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.attention import flash_attention
from ..kernels.decode import decode_attention
from ..kernels.jit import HAS_TRITON, architecture
from ..kernels.linear_cross_entropy import linear_cross_entropy
from ..kernels.rms_norm import rms_norm, rms_norm_reference
from ..kernels.rope import inverse_frequencies, rope, rope_reference, rope_tables
from ..kernels.swiglu import swiglu, swiglu_reference

TOKENS, HEADS, GROUPS, WIDTH, MODEL, HIDDEN, VOCABULARY = 8192, 32, 8, 128, 4096, 14336, 128256


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one implementation; `tflops` where matrix products dominate."""

    kernel: str
    implementation: str
    forward_ms: float
    backward_ms: float | None
    tflops: float | None


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


def clock(kernel: str, implementation: str, run: Callable, inputs: list[torch.Tensor], flops: float = 0.0) -> Timing:
    """Times the forward pass, then the backward pass alone."""
    from triton.testing import do_bench

    median: Callable[..., Any] = do_bench
    forward = float(median(lambda: run(*inputs), return_mode="median"))
    out = run(*inputs)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    grads = [torch.ones_like(o) for o in outs]
    backward = None
    if outs:
        backward = float(
            median(lambda: torch.autograd.grad(outs, inputs, grads, retain_graph=True), return_mode="median")
        )
    return Timing(kernel, implementation, forward, backward, flops / forward / 1e9 if flops else None)


def attention_timings() -> list[Timing]:
    """One causal document of 8192 tokens, GQA 32/8."""
    q, k, v = leaf(TOKENS, HEADS, WIDTH), leaf(TOKENS, GROUPS, WIDTH), leaf(TOKENS, GROUPS, WIDTH)
    flops = 2 * TOKENS * TOKENS * WIDTH * HEADS
    cu = torch.tensor([0, TOKENS], dtype=torch.int32, device="cuda")
    split = lambda x: x.transpose(0, 1)[None]
    sdpa = lambda q, k, v: F.scaled_dot_product_attention(split(q), split(k), split(v), is_causal=True, enable_gqa=True)
    ours = lambda q, k, v: flash_attention(q, k, v, cu, max_seqlen=TOKENS)
    rows = [clock("attention", "shipyard", ours, [q, k, v], flops), clock("attention", "SDPA", sdpa, [q, k, v], flops)]
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, TOKENS, TOKENS, device="cuda")
    compiled = torch.compile(flex_attention)
    flex = lambda q, k, v: compiled(split(q), split(k), split(v), block_mask=mask, enable_gqa=True)
    rows.append(clock("attention", "FlexAttention", flex, [q, k, v], flops))
    if importlib.util.find_spec("flash_attn"):
        flash_attn_func = importlib.import_module("flash_attn").flash_attn_func
        rows.append(
            clock("attention", "flash-attn", lambda q, k, v: flash_attn_func(q[None], k[None], v[None], causal=True),
                  [q, k, v], flops)
        )  # fmt: skip
    return rows


def elementwise_timings() -> list[Timing]:
    """RoPE, RMSNorm and SwiGLU at 8192 tokens."""
    q, k = leaf(1, TOKENS, HEADS, WIDTH), leaf(1, TOKENS, GROUPS, WIDTH)
    cos, sin = rope_tables(torch.arange(TOKENS, device="cuda")[None], inverse_frequencies(WIDTH, 5e5)[0])
    x, weight = leaf(TOKENS, MODEL), leaf(MODEL)
    gate, up = leaf(TOKENS, HIDDEN), leaf(TOKENS, HIDDEN)
    rows = [
        clock("rope", "shipyard", lambda q, k: rope(q, k, cos, sin), [q, k]),
        clock("rope", "PyTorch", lambda q, k: rope_reference(q, k, cos, sin), [q, k]),
        clock("rms_norm", "shipyard", lambda x, w: rms_norm(x, w, 1e-5), [x, weight]),
        clock("rms_norm", "PyTorch", lambda x, w: rms_norm_reference(x, w, 1e-5), [x, weight]),
        clock("swiglu", "shipyard", swiglu, [gate, up]),
        clock("swiglu", "PyTorch", swiglu_reference, [gate, up]),
    ]
    if importlib.util.find_spec("liger_kernel"):
        liger = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        rows.append(clock("swiglu", "Liger", liger.apply, [gate, up]))
        liger = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        rows.append(clock("rms_norm", "Liger", lambda x, w: liger.apply(x, w, 1e-5), [x, weight]))
        rotate = importlib.import_module("liger_kernel.ops.rope").LigerRopeFunction
        whole = [torch.cat([part, part], -1) for part in (cos, sin)]  # it wants the table twice over
        turned = lambda q, k: rotate.apply(q.transpose(1, 2), k.transpose(1, 2), *whole)
        rows.append(clock("rope", "Liger", turned, [q, k]))
    return rows


def head_and_decode_timings() -> list[Timing]:
    """The 128,256-wide head over 4096 tokens, and 64 sequences decoding against 4096 keys each."""
    x, weight = leaf(4096, MODEL), leaf(VOCABULARY, MODEL)
    targets = torch.randint(0, VOCABULARY, (4096,), device="cuda")
    flops = 2 * 4096 * MODEL * VOCABULARY
    rows = [
        clock(
            "linear_cross_entropy", "shipyard", lambda x, w: linear_cross_entropy(x, w, targets)[0], [x, weight], flops
        ),
        clock(
            "linear_cross_entropy",
            "PyTorch",
            lambda x, w: F.cross_entropy((x @ w.T).float(), targets),
            [x, weight],
            flops,
        ),
    ]
    if importlib.util.find_spec("liger_kernel"):
        fused = importlib.import_module(
            "liger_kernel.ops.fused_linear_cross_entropy"
        ).LigerFusedLinearCrossEntropyFunction
        rows.append(
            clock("linear_cross_entropy", "Liger", lambda x, w: fused.apply(x, w, targets)[0], [x, weight], flops)
        )
    with torch.no_grad():
        q, pages = leaf(64, HEADS, WIDTH), leaf(64 * 256, 16, GROUPS, WIDTH)
        table = torch.arange(64 * 256, device="cuda", dtype=torch.int32).view(64, 256)
        lengths = torch.full((64,), 4096, device="cuda", dtype=torch.int32)
        keys = pages.view(64, 4096, GROUPS, WIDTH).transpose(1, 2)
        sdpa = lambda q: F.scaled_dot_product_attention(q[:, :, None], keys, keys, enable_gqa=True)
        rows.append(clock("decode", "shipyard", lambda q: decode_attention(q, pages, pages, table, lengths), [q]))
        rows.append(clock("decode", "SDPA", sdpa, [q]))
    return rows


def markdown(rows: list[Timing]) -> str:
    """The table, with the card and versions above it."""
    card = f"{torch.cuda.get_device_name()} ({architecture(torch.device('cuda'))}), torch {torch.__version__}"
    number = lambda value: "-" if value is None else f"{value:.3f}"
    head = [
        "| kernel | implementation | forward ms | backward ms | forward TFLOP/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    body = [
        f"| {r.kernel} | {r.implementation} | {number(r.forward_ms)} | {number(r.backward_ms)} | {number(r.tflops)} |"
        for r in rows
    ]
    return "\n".join([card, "", *head, *body])


def bench_kernels(out: Path | None = None) -> str:
    """The table, also written to `out`; or one sentence that says why there is none."""
    if reason := reason_to_skip():
        return reason
    table = markdown([*attention_timings(), *elementwise_timings(), *head_and_decode_timings()])
    if out is not None:
        out.write_text(table + "\n")
    return table


if __name__ == "__main__":
    print(bench_kernels())
