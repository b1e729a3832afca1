"""Exact traffic and arithmetic of each kernel, counted by the sanitizer at one shape.

`python -m shipyard.kernels.traffic` prints JSON; it starts itself again with TRITON_INTERPRET=1 where that is not set.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch

LENGTHS = (512, 300, 212)  # documents of the pack
HEADS, GROUPS, WIDTH = 2, 1, 128
HEAD_TOKENS, VOCABULARY, HEAD_WIDTH = 256, 1024, 256


def causal_flops(forward: bool) -> int:
    """Multiply-adds that causal attention needs, times two: 2 products forward, 5 backward."""
    pairs = sum(length * (length + 1) // 2 for length in LENGTHS)
    return (2 if forward else 5) * 2 * pairs * WIDTH * HEADS


def head_flops() -> int:
    """The logits, once: forward reads them, backward makes them anew; the products that follow are PyTorch's own."""
    return 2 * HEAD_TOKENS * VOCABULARY * HEAD_WIDTH


def count() -> list[dict]:
    """Rows of name, launches, bytes issued and minimum (each distinct byte once per launch),
    FLOPs issued and useful."""
    from .attention import flash_attention
    from .interpreter import Sanitizer
    from .linear_cross_entropy import token_log_probs
    from .rms_norm import rms_norm
    from .rope import inverse_frequencies, rope, rope_tables
    from .swiglu import swiglu

    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    leaf = lambda *shape: torch.randn(*shape, dtype=torch.float32).bfloat16().requires_grad_()
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    cos, sin = rope_tables(torch.arange(tokens)[None], inverse_frequencies(WIDTH, 5e5)[0])
    targets = torch.randint(0, VOCABULARY, (HEAD_TOKENS,))
    rows: list[dict] = []

    def measure(name: str, run: Callable, inputs: list[torch.Tensor], forward_flops: int, backward_flops: int) -> None:
        with Sanitizer() as report:
            outs = run(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        rows.append(_row(name, report, forward_flops))
        with Sanitizer() as report:
            torch.autograd.grad(outs, inputs, [torch.ones_like(o) for o in outs])
        rows.append(_row(f"{name} backward", report, backward_flops))

    qkv = [leaf(tokens, HEADS, WIDTH), leaf(tokens, GROUPS, WIDTH), leaf(tokens, GROUPS, WIDTH)]
    measure("attention", lambda q, k, v: flash_attention(q, k, v, cu), qkv, causal_flops(True), causal_flops(False))
    measure("rope", lambda q, k: rope(q, k, cos, sin), [leaf(1, tokens, 4, WIDTH), leaf(1, tokens, 1, WIDTH)], 0, 0)
    measure("rms_norm", lambda x, w: rms_norm(x, w, 1e-6), [leaf(256, 512), leaf(512)], 0, 0)
    measure("swiglu", swiglu, [leaf(256, 512), leaf(256, 512)], 0, 0)
    log_probs = lambda x, w: token_log_probs(x, w, targets)
    head = [leaf(HEAD_TOKENS, HEAD_WIDTH), leaf(VOCABULARY, HEAD_WIDTH)]
    measure("linear_cross_entropy", log_probs, head, head_flops(), head_flops())
    return rows


def _row(name: str, report, useful: int) -> dict:
    report.check()
    return {
        "name": name,
        "launches": report.launches,
        "bytes_issued": sum(report.bytes_issued.values()),
        "bytes_minimum": sum(report.bytes_minimum.values()),
        "flops_issued": report.flops_issued,
        "flops_useful": useful,
    }


def measured() -> list[dict]:
    """`count()` in a process of its own."""
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "shipyard.kernels.traffic"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(count() if os.environ.get("TRITON_INTERPRET") == "1" else measured()))
