"""What each operation of a forward and backward pass costs: FLOPs, and bytes that go through a card's memory.

A dispatch mode that sees every operation, best under FakeTensorMode, where nothing is computed. FLOPs come from torch's
own registry (torch.utils.flop_counter). Bytes are counted twice: as eager PyTorch moves them, each operation reading
its inputs and writing its outputs; and as a compiler that fuses every run of pointwise operations and reductions
between two matrix products would, reading what comes from outside the run once and writing only what outlives it.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Kind = Literal["matmul", "attention", "pointwise"]
FREE = ("empty", "detach", "view", "alias", "lift")
ROWS = ("embedding", "index_select", "index", "gather")  # they read as much as they write, not the table


@dataclass(frozen=True)
class Op:
    """One operation, or one fused run of them. `weight_bytes` is the smaller operand of a matrix product."""

    kind: Kind
    flops: int
    eager_bytes: int
    fused_bytes: int
    launches: int
    operands: int = 0
    """Numbers in a matrix product's two inputs: what float8 has to scale and round."""
    kernel: bool = False
    """One of ours (kernels/), launched by itself."""


@dataclass
class _Run:
    """Pointwise operations since the last matrix product."""

    eager_bytes: int = 0
    launches: int = 0
    read: dict[int, int] = field(default_factory=dict)
    made: dict[int, tuple[weakref.ref[Any], int]] = field(default_factory=dict)


class OpCosts(TorchDispatchMode):
    """Collects `ops` in the order they run. Call `finish()` once at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.times = 1
        """How often each pointwise operation counts that runs now."""
        self._run = _Run()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        packet = func._overloadpacket
        name = packet.__name__
        if "scaled_dot_product" in name:
            self._anchor(Op("attention", attention_flops(name, inputs), *_moved(inputs, outputs)))
        elif name == "_grouped_mm":
            self._anchor(Op("matmul", grouped_flops(*inputs[:2]), *_moved(inputs, outputs), _numbers(inputs[:2])))
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self._anchor(Op("matmul", flops, *_moved(inputs, outputs), _numbers(inputs)))
        elif not name.startswith(FREE) and not _is_view(func, inputs, outputs):
            self._add(name, inputs, outputs)
        return out

    def launched(self, kind: Kind, flops: int, moved_bytes: int) -> None:
        """Add one launch of a kernel of our own, which no dispatcher sees."""
        self._anchor(Op(kind, flops, moved_bytes, moved_bytes, 1, kernel=True))

    def finish(self) -> list[Op]:
        """Close the last run and return every operation."""
        run, self._run = self._run, _Run()
        if run.launches:
            alive = sum(size for made, size in run.made.values() if made() is not None)
            self.ops.append(Op("pointwise", 0, run.eager_bytes, sum(run.read.values()) + alive, run.launches))
        return self.ops

    def _anchor(self, op: Op) -> None:
        self.finish()
        self.ops.append(op)

    def _add(self, name: str, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        run = self._run
        run.launches += self.times
        written = sum(map(_bytes, outputs))
        if name.startswith(ROWS):
            run.eager_bytes += self.times * 2 * written
        else:
            run.eager_bytes += self.times * (written + sum(map(_bytes, inputs)))
            for tensor in inputs:
                key = id(tensor.untyped_storage())
                if key not in run.made or run.made[key][0]() is None:
                    run.read[key] = max(run.read.get(key, 0), _bytes(tensor))
        for tensor in outputs:
            storage = tensor.untyped_storage()
            run.made[id(storage)] = (weakref.ref(storage), _bytes(tensor))


def attention_flops(name: str, inputs: list[Tensor]) -> int:
    """Forward: scores and values, 2 FLOPs a product; backward: the scores again and four gradients. Not halved for
    causal masks. Query (B, H, T, K), key (B, H, S, K), value (B, H, S, V), after the output's gradient if backward."""
    backward = "backward" in name
    query, key, value = inputs[1:4] if backward else inputs[:3]
    batch, heads, rows, width = query.shape
    pairs = batch * heads * rows * key.shape[-2]
    return 2 * pairs * (3 * width + 2 * value.shape[-1] if backward else width + value.shape[-1])


def grouped_flops(left: Tensor, right: Tensor) -> int:
    """Of experts' products, for which torch has no formula: every row meets one expert's matrix, (S, K) x (E, K, N);
    backward, rows are summed over within each expert, (K, S) x (S, N)."""
    return 2 * left.shape[-2] * left.shape[-1] * right.shape[-1]


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _moved(inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> tuple[int, int, int]:
    moved = sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
    return moved, moved, 1


def _bytes(tensor: Tensor) -> int:
    """An expanded tensor is read from the little it is made of."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _is_view(func: Any, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> bool:
    """True if nothing is computed: every output lies in an input's storage, and no input is written."""
    if func._schema.is_mutable:
        return False
    held = {tensor.untyped_storage()._cdata for tensor in inputs}
    return all(tensor.untyped_storage()._cdata in held for tensor in outputs)
