"""Muon for hidden matrices, AdamW for all other weights, in one optimizer.

Muon (Jordan et al. 2024) takes momentum and replaces it by the nearest matrix whose singular values are all one, found
by five Newton-Schulz steps. The size of the update follows Liu et al. 2025 (Moonlight, equation 4): times
0.2 sqrt(max(rows, columns)), which gives its elements the root mean square of AdamW's, so `optim.lr` and
`optim.weight_decay` mean the same for both kinds of weights. Stacked experts, (E, rows, columns), are E matrices.

Shape legend: M rows, N columns of a matrix, E matrices.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
UPDATE_RMS = 0.2


class Muon(torch.optim.AdamW):
    """Groups that say `muon: True` hold matrices; the others are AdamW's.

    Every rank computes the update of every matrix that it holds. Where an engine has cut matrices into `DTensor`s, the
    update is gathered, made orthogonal whole, and cut again, so the result is that of one rank. ZeRO lays a group's
    matrices end to end and gives each rank an equal piece of the whole: such a group has `places`, the start and shape
    of each matrix in it, and pieces of updates are gathered likewise. Gradients must be whole sums on every rank;
    `precision` is the dtype in which Newton-Schulz runs.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], precision: torch.dtype, **adamw: Any) -> None:
        self.precision = precision
        super().__init__([{"muon": False, **group} for group in groups], **adamw)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every weight that has a gradient."""
        assert closure is None
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                for held in group["params"]:
                    if held.grad is not None:
                        self._update(held, group)

    def _update(self, held: Tensor, group: dict[str, Any]) -> None:
        """Update a matrix, or this rank's piece of many. Collective in the latter case."""
        state, lr = self.state[held], group["lr"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(held)
        momentum, gradient = state["momentum_buffer"], held.grad
        assert gradient is not None
        momentum.lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(momentum, MOMENTUM)  # Nesterov
        held.mul_(1 - lr * group["weight_decay"])
        if "places" not in group:
            held.add_(orthogonal(ahead, self.precision), alpha=-lr * update_scale(held.shape))
            return
        pieces = [torch.empty_like(ahead) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, ahead)
        whole, first = torch.cat(pieces), dist.get_rank() * len(ahead)
        for start, shape in group["places"]:
            end = start + math.prod(shape)
            low, high = max(start, first), min(end, first + len(ahead))
            if low < high:  # two ranks compute a matrix that is cut
                update = orthogonal(whole[start:end].view(shape), self.precision).flatten()
                held[low - first : high - first].add_(
                    update[low - start : high - start], alpha=-lr * update_scale(shape)
                )


def update_scale(shape: Sequence[int]) -> float:
    """What gives the update of a matrix the root mean square of AdamW's (Liu et al. 2025, equation 4)."""
    return UPDATE_RMS * max(shape[-2:]) ** 0.5


def orthogonal(matrix: Tensor, precision: torch.dtype) -> Tensor:
    """The nearest (semi-)orthogonal matrix, about: singular values end between 0.7 and 1.2. Shape (..., M, N).

    A `DTensor` gives one of the same layout. Collective then.
    """
    if isinstance(matrix, DTensor):
        whole = newton_schulz(matrix.full_tensor(), precision)
        copies = DTensor.from_local(whole, matrix.device_mesh, [Replicate()] * matrix.device_mesh.ndim, run_check=False)
        return copies.redistribute(placements=matrix.placements)
    return newton_schulz(matrix, precision)


def newton_schulz(matrix: Tensor, precision: torch.dtype) -> Tensor:
    """Five quintic Newton-Schulz steps X <- aX + (bA + cA^2)X, A = XX^T, on X of Frobenius norm one (Jordan et al.)."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x_EMN = (matrix.mT if tall else matrix).to(precision)
    shape = x_EMN.shape
    x_EMN = x_EMN.reshape(-1, *shape[-2:])
    x_EMN = x_EMN / x_EMN.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):  # sums go into the products that they end: a CPU takes a quarter less for the whole
        square_EMM = x_EMN @ x_EMN.mT
        square_EMM = square_EMM.baddbmm(square_EMM, square_EMM, beta=b, alpha=c)
        x_EMN = x_EMN.baddbmm(square_EMM, x_EMN, beta=a)
    x_EMN = x_EMN.view(shape)
    return (x_EMN.mT if tall else x_EMN).to(matrix.dtype)
