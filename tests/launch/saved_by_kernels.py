"""Run with TRITON_INTERPRET=1: what our kernels really save, launch and multiply, as JSON, for test_plan_kernels.py."""

import gc
import json
import sys
from dataclasses import replace

import torch
from saved_for_tests import PASSES, pass_of, real_model, saved_bytes
from shipyard.kernels import huggingface
from shipyard.kernels.attention import flash_attention
from shipyard.kernels.interpreter import Sanitizer
from shipyard.kernels.linear_cross_entropy import token_log_probs
from shipyard.kernels.rms_norm import rms_norm
from shipyard.kernels.rope import rope
from shipyard.kernels.swiglu import swiglu
from shipyard.launch.footprint import ActivationTracker, loss_of
from shipyard.launch.kernel_costs import counted_launches
from shipyard.launch.op_costs import OpCosts


def saved() -> dict[str, list[int]]:
    """Of each pass: the bytes that one more block saves, and all that two blocks and the loss hold by torch's tracker
    (its peak has copies in it that the interpreter makes)."""

    def plug(model: torch.nn.Module) -> None:
        base = next(module for module in model.modules() if isinstance(module, huggingface.PreTrainedModel))
        huggingface.plug(base, "triton")

    found = {}
    for name, changes in PASSES.items():
        what = replace(pass_of("none", num_hidden_layers=2), path="triton", **changes)
        blocks = saved_bytes(what, 2, plug) - saved_bytes(what, 1, plug)
        model, tracker = real_model(what, 2), ActivationTracker()
        plug(model)
        tracker.track_external(model)
        with tracker:
            loss = loss_of(model, what)
            gc.collect()  # cycles of the interpreter's
            found[name] = [blocks, tracker.held()]
            del loss
    return found


def launches() -> dict[str, list[int]]:
    """Of each kernel, forward and backward: launches, FLOPs and bytes, by the sanitizer and as the planner counts."""
    cu = torch.tensor([0, 128, 256], dtype=torch.int32)
    leaf = lambda *shape: torch.randn(*shape).bfloat16().requires_grad_()
    angles = torch.randn(1, 64, 32)
    calls = {
        "attention": (
            lambda q, k, v: flash_attention(q, k, v, cu, causal=False),
            [leaf(256, 2, 64), leaf(256, 1, 64), leaf(256, 1, 64)],
        ),
        "wide attention": (
            lambda q, k, v: flash_attention(q, k, v, cu // 2, causal=False),
            [torch.randn(128, heads, 256, requires_grad=True) for heads in (2, 1, 1)],
        ),
        "head": (
            lambda x, weight: token_log_probs(x, weight, torch.arange(128)),
            [leaf(128, 64), leaf(512, 64)],
        ),
        "rms_norm": (lambda x, weight: rms_norm(x, weight, 1e-6), [leaf(64, 128), leaf(128)]),
        "rope": (lambda q, k: rope(q, k, angles, angles), [leaf(1, 64, 2, 64), leaf(1, 64, 1, 64)]),
        "swiglu": (swiglu, [leaf(64, 128), leaf(64, 128)]),
    }
    found = {}
    for name, (run, inputs) in calls.items():

        def both(run=run, inputs=inputs) -> None:
            outs = run(*inputs)
            outs = outs if isinstance(outs, tuple) else (outs,)
            torch.autograd.grad(outs, inputs, [torch.ones_like(out) for out in outs])

        with Sanitizer() as report:
            both()
        costs = OpCosts()
        with counted_launches(costs):
            both()
        mine = [len(costs.ops), sum(op.flops for op in costs.ops), sum(op.eager_bytes for op in costs.ops)]
        found[name] = [report.launches, report.flops_issued, sum(report.bytes_minimum.values()), *mine]
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    json.dump({"saved": saved(), "launches": launches()}, sys.stdout)
