"""Our Triton kernels as the planner runs them: what is around a launch is the real code, the launch itself is counted.

The autograd functions of kernels/ allocate, save and multiply under FakeTensorMode as they do on a card, so that what
they hold and what they hand to cuBLAS is measured. A launch moves each of its tensors once, and its matrix products
follow from their shapes; no Triton is needed for that.

Shape suffixes: T query tokens, S key tokens, H query heads, G key heads, D width of q and k (of the model in the head),
E width of v, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import attention, documents, huggingface, linear_cross_entropy, rms_norm, rope, swiglu
from .op_costs import Kind, OpCosts

MODULES = (attention, linear_cross_entropy, rms_norm, rope, swiglu)
Flops = Callable[..., int]


def _attention_flops(products_of_d: int, products_of_e: int) -> Flops:
    """Of a launch that makes so many products over each pair of tokens; not halved for causal masks. Documents are as
    long as each other here, so (T, H, D) queries and (S, G, D) keys of N documents make T * S / N pairs."""

    def flops(q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, *tensors: Tensor) -> int:
        (tokens, heads, width), value_width = q_THD.shape, v_SGE.shape[2]
        borders = next(tensor for tensor in tensors if not tensor.is_floating_point())
        pairs = heads * tokens * k_SGD.shape[0] // (borders.numel() - 1)
        return 2 * pairs * (products_of_d * width + products_of_e * value_width)

    return flops


def _head_flops(x_TD: Tensor, weight_VD: Tensor, *tensors: Tensor) -> int:
    return 2 * x_TD.shape[0] * weight_VD.numel()


PRODUCTS: dict[str, tuple[Kind, Flops]] = {
    "attention_kernel": ("attention", _attention_flops(1, 1)),  # q k, p v
    "exact_attention_kernel": ("attention", _attention_flops(1, 1)),  # in fp32
    "query_kernel": ("attention", _attention_flops(2, 1)),  # q k again, dout v, dq
    "key_value_kernel": ("attention", _attention_flops(2, 2)),  # q k again, dout v, dk, dv
    "key_value_kernel KEYS": ("attention", _attention_flops(2, 1)),  # without dv
    "key_value_kernel VALUES": ("attention", _attention_flops(1, 1)),  # q k again, dv
    "log_prob_kernel": ("matmul", _head_flops),
    "logit_gradient_kernel": ("matmul", _head_flops),
}
"""Launches that multiply matrices; the others are bound by memory. Delta, which the fp32 dq kernel makes in a sweep of
its own, is not among them."""


class _Counted:
    """Stands in a kernel's place: `kernel[grid](...)` is noted."""

    def __init__(self, name: str, costs: OpCosts) -> None:
        self.name, self.costs = name, costs

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **switches: Any) -> None:
        tensors = list({id(each): each for each in arguments if isinstance(each, Tensor)}.values())
        if self.name == "zero_slack_kernel":  # reads where documents end; rows after that are few
            tensors = tensors[1:]
        made = [name for name in ("KEYS", "VALUES") if switches.get(name)]
        name = f"{self.name} {made[0]}" if len(made) == 1 else self.name  # of dK and dV only one
        kind, flops = PRODUCTS.get(name, ("pointwise", lambda *given: 0))
        self.costs.launched(kind, flops(*tensors), sum(each.numel() * each.element_size() for each in tensors))


@contextlib.contextmanager
def counted_launches(costs: OpCosts) -> Iterator[None]:
    """Count launches in place of making them, whatever the tensors' device."""
    before = [(module, name, value) for module in MODULES for name, value in vars(module).items()]
    try:
        for module, name, _ in before:
            if name.endswith("_kernel"):
                setattr(module, name, _Counted(name, costs))
            elif name == "use_triton":
                setattr(module, name, lambda tensor: True)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextlib.contextmanager
def plugged(model: nn.Module, path: str, ends: list[int], head_elsewhere: bool, costs: OpCosts) -> Iterator[None]:
    """The model computed by `path` (`stock`: as it is) as on a GPU, launches counted. Each row's documents end at
    `ends`: fake position ids cannot be read. `head_elsewhere` says that ranks share the head's weight."""
    if path == "stock":
        yield
        return
    base = next(module for module in model.modules() if isinstance(module, huggingface.PreTrainedModel))

    @cache
    def packing_of(positions: Tensor, rows: int, length: int, device: torch.device) -> documents.Packing:
        return documents.Packing([ends] * rows, length, device)

    before = huggingface.packing_of, huggingface.sdpa_each
    huggingface.packing_of, huggingface.sdpa_each = packing_of, documents.sdpa_by_bucket
    if head_elsewhere:
        base.lm_head.weight.ds_id = 0  # pyright: ignore[reportAttributeAccessIssue]
    plug = huggingface.plug_path(base, "triton" if path == "triton" else "torch")
    try:
        with counted_launches(costs) if path == "triton" else contextlib.nullcontext():
            yield
    finally:
        plug.remove()
        huggingface.packing_of, huggingface.sdpa_each = before
