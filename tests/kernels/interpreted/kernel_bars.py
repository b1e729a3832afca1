"""The accuracy bar: error against fp64 no larger than that of PyTorch's eager code in the same dtype."""

import json
import os

import torch

RMS_BAR, MAX_BAR = 1.0, 2.0
SLACK = 1.02  # two roundings of the same length differ by luck in the third digit


def hold_bars(name: str, mine, eager, exact, cancels: bool = False) -> None:
    """Compares lists of tensors; `exact` is fp64. Appends the ratios to $SHIPYARD_KERNEL_RATIOS where that is set.

    With `cancels` the exact gradients are nearly zero: errors below an eighth of eps of the largest tensor are equal.
    """
    scale = max(z.abs().max().item() for z in exact) * cancels
    for index, (x, y, z) in enumerate(zip(mine, eager, exact, strict=True)):
        assert x.dtype == y.dtype, name
        assert not x.isnan().any(), f"{name}[{index}] has NaN"
        error, theirs = (x.double() - z).flatten(), (y.double() - z).flatten()
        eps = torch.finfo(x.dtype).eps
        floor = eps * max(z.abs().max().item() * 2**-6, scale / 8) + 1e-300  # exact results have no error to beat
        rms = error.pow(2).mean().sqrt().item() / max(theirs.pow(2).mean().sqrt().item(), floor)
        worst = error.abs().max().item() / max(theirs.abs().max().item(), floor)
        if path := os.environ.get("SHIPYARD_KERNEL_RATIOS"):
            with open(path, "a") as file:
                file.write(json.dumps({"name": f"{name}[{index}]", "rms": rms, "max": worst}) + "\n")
        assert rms <= RMS_BAR * SLACK, f"{name}[{index}]: RMS error {rms:.3f} of eager's"
        assert worst <= MAX_BAR, f"{name}[{index}]: maximum error {worst:.3f} of eager's"


def run_all_ways(mine, reference, inputs, extras=()):
    """Outputs and input gradients of `mine`, and of `reference` in the inputs' dtype and in fp64."""
    results = []
    generator = torch.Generator().manual_seed(7)
    seeds = None
    for function, wide in ((mine, False), (reference, False), (reference, True)):
        leaves = [x.detach().to(torch.float64 if wide else x.dtype).requires_grad_() for x in inputs]
        outs = function(*leaves, *extras)
        outs = outs if isinstance(outs, tuple) else (outs,)
        seeds = seeds or [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outs]
        grads = torch.autograd.grad(outs, leaves, [s.to(o.dtype) for s, o in zip(seeds, outs, strict=True)])
        results.append([o.detach() for o in outs] + list(grads))
    return results
