"""What one rank's forward and backward pass holds and moves, measured on the real model without computing it.

A model of one and of two blocks, built by transformers from the real shape, runs our own loss, forward and backward
under FakeTensorMode: every operation is dispatched, no number is computed, no byte allocated. Torch's MemTracker
follows each storage. Blocks are alike, so what the second one adds is what each further one adds, and the whole
model follows.

Legend: B samples, T tokens of each.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ..training.activations import KEPT, recompute
from .kernel_costs import plugged
from .op_costs import Op, OpCosts

Checkpointing = Literal["none", "selective", "alternate", "full"]
"""`alternate`: selective, but every second matrix product is recomputed too (torchtitan's selective mode, "op")."""
Loss = Literal["ours", "whole", "compiled", "fused"]
"""`ours` recomputes fp32 logits by chunks; `whole` turns all of them to fp32, as a plain cross-entropy does; `compiled`
is that one through a compiler, which never writes fp32 logits; `fused` the same over eight pieces of the sequence."""
LayerPath = Literal["stock", "torch", "triton"]
"""The layers' code: transformers' own, with a mask over all pairs of tokens of packed rows, or kernels.huggingface."""
SIZES = ("flops", "eager_bytes", "fused_bytes", "operands")


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass on one rank: everything that decides its operations."""

    config: str
    """The model's config, as JSON: hashable, so that a measurement is made once."""
    samples: int
    tokens: int
    checkpointing: Checkpointing = "none"
    dtype: str = "bfloat16"
    autocast: bool = False
    """Weights are fp32 and cast where they are used, in place of being held in `dtype`."""
    lora_rank: int = 0
    lora_targets: str = "all-linear"
    adapter_dtype: str = "float32"
    loss: Loss = "ours"
    packed: bool = False
    """Samples are documents in one long row."""
    path: LayerPath = "stock"
    head_elsewhere: bool = False
    """Ranks share the head's weight, and the loss is made from logits."""
    tensor: int = 1
    """Heads and inner widths are cut by so much; the residual stream stays whole."""


@dataclass(frozen=True)
class Block:
    """What one more block adds."""

    retained_bytes: int
    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Footprint:
    """A whole model: `layers` equal blocks and the rest. Bytes are of activations only: no weights, no gradients."""

    layers: int
    block_bytes: int
    """Kept from a block's forward until its backward."""
    peak_bytes: int
    """At the worst moment, in the loss or in the last block's backward."""
    block_peak_bytes: int
    """At the worst moment after the loss and the head are done: in the last block's backward."""
    block_ops: tuple[Op, ...]
    rest_ops: tuple[Op, ...]

    def peak_with(self, layers: float) -> float:
        """The peak if `layers` blocks' activations are held."""
        return self.peak_bytes + (layers - self.layers) * self.block_bytes

    def block_peak_with(self, layers: float) -> float:
        """The peak if `layers` blocks' activations are held, of a pipeline stage that has no head."""
        return self.block_peak_bytes + (layers - self.layers) * self.block_bytes


class ActivationTracker(MemTracker):
    """Torch's tracker, keeping the worst moment of activations (with backward's temporaries), not of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.block_peak = 0

    def leave_head(self, gradient: Tensor) -> None:
        """Called with the gradient of the last block's output: from here on, blocks only."""
        self.block_peak = 0

    def held(self) -> int:
        """Bytes of activations and temporaries now."""
        kinds = (_MemRefType.ACT, _MemRefType.TEMP)
        return sum(snap[kind] for snap in self._curr_mem_snap.values() for kind in kinds)  # pyright: ignore

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        """Torch's own asks every parameter for its gradient, and frozen ones have none to give."""
        frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        return super()._track_module_params_and_buffers(module, install_grad_hooks and not frozen)

    def _update_peak_stats(self, peak_state: Any) -> None:
        held = self.held()
        self.peak, self.block_peak = max(self.peak, held), max(self.block_peak, held)


def measure(what: Pass) -> Footprint:
    """Return the footprint of a pass. Takes a second or two, whatever the model's size; the same pass again, none."""
    layers = json.loads(what.config)["num_hidden_layers"]
    one, two = _measure_layers(what, 1), _measure_layers(what, 2)
    block = two.retained - one.retained
    more = _difference(two.ops, one.ops)
    further = (layers - 2) * block
    return Footprint(layers, block, two.peak + further, two.block_peak + further, more, _difference(one.ops, more))


@dataclass(frozen=True)
class _Measured:
    retained: int
    peak: int
    block_peak: int
    ops: tuple[Op, ...]


@lru_cache(maxsize=256)
def _measure_layers(what: Pass, layers: int) -> _Measured:
    model = build(what, layers)
    with FakeTensorMode():
        _materialise(model)
        tracker, costs = ActivationTracker(), OpCosts()
        tracker.track_external(model)
        last_block(model).register_forward_hook(
            lambda *call: _first(call[2]).register_hook(tracker.leave_head) and None
        )
        ends = [what.tokens * (number + 1) for number in range(what.samples if what.packed else 1)]
        path = plugged(model, what.path, ends, what.head_elsewhere, costs)
        with _two_chunks(costs), path, tracker, costs, _autocast(what), _whole_rows(what):  # imports are not measured
            loss = loss_of(model, what)
            retained = tracker.held()
            loss.backward()
        ops = tuple(costs.finish())
    copies = _weight_copies(model) if what.autocast else 0
    return _Measured(retained - copies, tracker.peak - copies, tracker.block_peak - copies, ops)


def _difference(two: tuple[Op, ...], one: tuple[Op, ...]) -> tuple[Op, ...]:
    """What is in the first list more often than in the second, in the first one's order."""
    left = list(one)
    more = []
    for op in two:
        if op in left:
            left.remove(op)
        else:
            more.append(op)
    return tuple(more)


def build(what: Pass, layers: int) -> nn.Module:
    """The model as training would build it, with so many blocks, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..training.models import for_training

    tree: dict[str, Any] = _cut(json.loads(what.config), what.tensor) | {"num_hidden_layers": layers}
    if layers <= tree.get("first_k_dense_replace", 0):  # a few dense blocks before many with experts: measure the many
        tree["first_k_dense_replace"] = 0
    dtype = torch.float32 if what.autocast else getattr(torch, what.dtype)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(tree.pop("model_type"), **tree), dtype=dtype)
    model.tie_weights()
    for_training(model)
    if what.lora_rank:
        from ..training.lora import add_adapters
        from ..training.recipe import Lora

        model = add_adapters(model, Lora(rank=what.lora_rank, targets=what.lora_targets), 0)  # pyright: ignore
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, what.adapter_dtype))
    if what.checkpointing == "alternate":
        _recompute_alternately(model)
    else:
        recompute(model, what.checkpointing, compiled=False)
    return model


def _materialise(model: nn.Module) -> None:
    """Put tensors without storage in place of those on the meta device; one that is shared stays shared."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in made:
                    fresh = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_weight = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if is_weight else fresh
                    made[id(tensor), "kept"] = tensor  # pyright: ignore[reportArgumentType]
                if tensor is not None:
                    held[name] = made[id(tensor)]


def last_block(model: nn.Module) -> nn.Module:
    """The last layer of the decoder."""
    from ..training.models import blocks

    return blocks(model)[-1]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _recompute_alternately(model: Any) -> None:
    """Selective recomputation, of every second matrix product as well."""

    def fresh() -> Any:
        return create_selective_checkpoint_contexts(partial(_keep_alternately, {False: 0, True: 0}))

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": fresh})


def _keep_alternately(seen: dict[bool, int], context: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
    product = operation in KEPT and "scaled_dot_product" not in str(operation)
    seen[context.is_recompute] += product
    keep = operation in KEPT and not (product and seen[context.is_recompute] % 2 == 0)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def loss_of(model: nn.Module, what: Pass) -> Tensor:
    """The loss of a micro-batch in which every token is supervised, by the code that trains."""
    from ..training.batches import MicroBatch
    from ..training.loss import nll_sum, target_log_probs

    count = what.samples * what.tokens
    rows, columns = (1, count) if what.packed else (what.samples, what.tokens)
    ids_BT = torch.zeros(rows, columns, dtype=torch.long)
    positions_BT = torch.arange(what.tokens).repeat(rows, columns // what.tokens)
    targets_N = torch.zeros(count, dtype=torch.long)
    if what.loss == "fused":
        return _fused_loss(model, ids_BT, positions_BT, targets_N)
    if what.loss == "whole":
        logits_BTV = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits
        logits_NV = logits_BTV.flatten(0, 1).float()
        del logits_BTV
        return F.cross_entropy(logits_NV, targets_N)
    if what.loss == "compiled":
        logits_BTV = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits
        logits_NV = logits_BTV.flatten(0, 1)
        del logits_BTV
        return cast(Tensor, _CompiledLoss.apply(logits_NV, targets_N))
    batch = MicroBatch(
        ids_BT=ids_BT,
        positions_BT=positions_BT,
        real_BT=torch.ones_like(ids_BT, dtype=torch.bool),
        keep_K=torch.arange(columns),
        select_N=torch.arange(count),
        targets_N=targets_N,
        weights_N=torch.ones(count),
        row_N=targets_N,
        rows=what.samples,
        tokens=count,
    )
    return nll_sum(target_log_probs(model, batch), batch.weights_N)


class _CompiledLoss(torch.autograd.Function):
    """Cross-entropy as a compiler makes it: one reduction of the logits in their own dtype, which stay for the backward
    pass, and there one kernel that writes their gradient."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        log_z_N1 = logits_NV.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits_NV, log_z_N1)
        return (log_z_N1 - logits_NV.gather(-1, targets_N[:, None])).float().mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits_NV, log_z_N1 = ctx.saved_tensors
        return (logits_NV - log_z_N1).exp_().mul_(gradient.to(logits_NV.dtype)), None


def _fused_loss(model: Any, ids_BT: Tensor, positions_BT: Tensor, targets_N: Tensor) -> Tensor:
    """Head and cross-entropy of a piece of the sequence at a time. In the logits' own dtype it keeps and makes as many
    bytes as a fused kernel, which computes in fp32 registers."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden_BTD = plain.base_model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).last_hidden_state
    losses = []
    for piece_BCD in hidden_BTD.chunk(8, dim=1):
        logits_NV = F.linear(piece_BCD, plain.lm_head.weight).flatten(0, 1)  # the tracker allows a module one call
        losses.append(F.cross_entropy(logits_NV, targets_N[: len(logits_NV)], reduction="sum"))
        del logits_NV
    return torch.stack(losses).sum()


@contextlib.contextmanager
def _autocast(what: Pass) -> Iterator[None]:
    with contextlib.ExitStack() as scope:
        if what.autocast:
            scope.enter_context(torch.autocast("cpu", getattr(torch, what.dtype)))
        yield


@contextlib.contextmanager
def _whole_rows(what: Pass) -> Iterator[None]:
    """Tell transformers that a row is one document, which it reads from position ids; fake ones cannot be read, and it
    would make a mask as if rows were packed."""
    from transformers import masking_utils

    original = masking_utils.find_packed_sequence_indices
    if not what.packed or what.path != "stock":
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


@contextlib.contextmanager
def _two_chunks(costs: OpCosts) -> Iterator[None]:
    """Run two chunks of the loss and count the second as often as there are more: hundreds of equal ones would take
    most of a measurement's time."""
    from ..training import loss

    every = loss._chunks

    def few(logits_NV: Tensor, targets_N: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        first, *rest = every(logits_NV, targets_N)
        yield first
        costs.times = len(rest)
        yield from rest[:1]
        costs.times = 1

    loss._chunks = few
    try:
        yield
    finally:
        loss._chunks = every


def _weight_copies(model: nn.Module) -> int:
    """Bytes of the half-width copies of linear layers' weights that autocast keeps until its scope ends."""
    return sum(2 * layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))


def _cut(tree: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """The shape that one of `ranks` tensor-parallel ranks holds: its heads and its columns of the inner widths."""
    cut = dict(tree)
    if ranks == 1:
        return cut
    cut["head_dim"] = tree.get("head_dim") or tree["hidden_size"] // tree["num_attention_heads"]
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"):
        if cut.get(key):
            cut[key] = max(1, cut[key] // ranks)
    return cut


def extrapolate(what: Pass, samples: int) -> Footprint:
    """The footprint over any number of samples from those over one and two: all of it is a constant and a multiple,
    unless rows are packed, whose attention may grow with the square, or the head works on pieces of a size: both are
    measured."""
    if what.packed or what.path == "triton":
        return measure(replace(what, samples=samples, packed=what.packed and samples > 1))
    one, two = measure(replace(what, samples=1)), measure(replace(what, samples=2))
    if samples <= 2:
        return (one, two)[samples - 1]

    def line(first: int, second: int) -> int:
        return first + (samples - 1) * (second - first)

    def longer(first: tuple[Op, ...], second: tuple[Op, ...]) -> tuple[Op, ...]:
        if [op.kind for op in first] != [op.kind for op in second]:  # chunks of the loss grow in number
            return tuple(replace(op, **{key: getattr(op, key) * samples // 2 for key in SIZES}) for op in second)
        pairs = zip(first, second, strict=True)
        return tuple(replace(a, **{key: line(getattr(a, key), getattr(b, key)) for key in SIZES}) for a, b in pairs)

    return Footprint(
        one.layers,
        line(one.block_bytes, two.block_bytes),
        line(one.peak_bytes, two.peak_bytes),
        line(one.block_peak_bytes, two.block_peak_bytes),
        longer(one.block_ops, two.block_ops),
        longer(one.rest_ops, two.rest_ops),
    )
