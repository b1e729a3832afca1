"""Triton's CPU interpreter made faithful, with a sanitizer.

As shipped, TRITON_INTERPRET=1 computes on the bit patterns of bf16 and truncates casts to it. `install()` mends that:
casts round to nearest even, arithmetic on bf16 rounds after each operation, a TF32 dot rounds its operands as the
tensor core does, a dot adds up in an order that depends on neither the processor nor the place in the tile, its sum
with what follows is folded into it where the compiler does so, and tl.sum adds halves to halves.
`Sanitizer` watches each launch for what a GPU would only show as a rare wrong number.

    with Sanitizer() as report:
        out = flash_attention(q, k, v, cu_seqlens=cu_seqlens)
    report.check()

Needs TRITON_INTERPRET=1 in the environment before triton is first imported.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter as stock
from triton.tools.tensor_descriptor import TensorDescriptor

from .arithmetic import add_halves, bf16_decode, bf16_encode, multiply, tf32_round

Builder: Any = stock.InterpreterBuilder
Handle: Any = stock.TensorHandle
NEVER, MANY = -1, -2  # program ids in the shadow memory: nobody yet, more than one
GUARD_BYTES = 1 << 16
POISON = {1: 0xA5, 2: 0xFFED, 4: 0xFFC0DEAD, 8: 0xFFF8DEADBEEFCAFE}  # NaNs with a signature, by item size in bytes
LOG2_E = 1.4426950408889634
BIT_OPS = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}


# -- faithful arithmetic ----------------------------------------------------------------------------------------------


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _cast(self, source: Any, target: Any) -> Any:
    kind = target.scalar
    if _is_bf16(source) and kind == tl.bfloat16:
        return source
    data = bf16_decode(source.data) if _is_bf16(source) else source.data
    if kind == tl.bfloat16:
        return Handle(bf16_encode(data), kind)
    return Handle(data.astype(stock._get_np_dtype(target)), kind)


def _float_to_float(self, source: Any, target: Any, rounding: Any) -> Any:
    if "RTZ" in str(rounding):
        raise NotImplementedError("round to zero is not modelled; cast with the default rounding")
    if target.scalar.primitive_bitwidth == 8 or source.dtype.scalar.primitive_bitwidth == 8:
        raise NotImplementedError("fp8 is not modelled")
    return _cast(self, source, target)


_stock_binary, _stock_unary, _stock_fma = Builder.binary_op, Builder.unary_op, Builder.create_fma
_stock_sum = stock.ReduceOps.sum


def _binary(self, left: Any, right: Any, op: Any) -> Any:
    if op is np.add and "factors" in {**left.attr, **right.attr}:
        return _fold(left, right)
    if not (_is_bf16(left) and _is_bf16(right)) or op in BIT_OPS:
        return _stock_binary(self, left, right, op)
    out = op(bf16_decode(left.data), bf16_decode(right.data))
    return Handle(out, tl.int1) if out.dtype == np.bool_ else Handle(bf16_encode(out), tl.bfloat16)


def _unary(self, value: Any, op: Any) -> Any:
    if _is_bf16(value):
        return Handle(bf16_encode(op(bf16_decode(value.data))), tl.bfloat16)
    return _stock_unary(self, value, op)


def _exp(self, value: Any) -> Any:
    """A card has only 2 ** x: the product with log2 e rounds, an error that grows with |x|."""
    if value.dtype.scalar != tl.float32:
        return self.unary_op(value, np.exp)
    return Handle(np.exp2(value.data * np.float32(LOG2_E)), tl.float32)


def _fma(self, x: Any, y: Any, z: Any) -> Any:
    if z.dtype.scalar not in (tl.float32, tl.bfloat16):
        return _stock_fma(self, x, y, z)
    x64, y64, z64 = ((bf16_decode(h.data) if _is_bf16(h) else h.data).astype(np.float64) for h in (x, y, z))
    exact = (x64 * y64 + z64).astype(np.float32)  # one rounding, as the hardware does
    return Handle(bf16_encode(exact) if _is_bf16(z) else exact, z.dtype.scalar)


def _sum(self, value: Any) -> Any:
    if value.dtype.scalar == tl.bfloat16:
        total = np.sum(bf16_decode(value.handle.data), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(bf16_encode(total), value.dtype)
    if value.dtype.scalar != tl.float32 or self.axis is None:
        return _stock_sum(self, value)
    total = add_halves(value.handle.data, self.axis)
    return self.to_tensor(total if self.keep_dims else total.squeeze(self.axis), value.dtype)


def _fold(left: Any, right: Any) -> Any:
    """dot(a, b, 0) + c becomes dot(a, b, c), as in the compiler (triton-combine): the chain of sums begins at c. A
    product with `max_num_imprecise_acc`, a number that means nothing for these types, is left as it is."""
    product, other = (left, right) if "factors" in left.attr else (right, left)
    x, y, half = product.attr["factors"]
    return Handle(multiply(x, y, other.data, half), product.dtype.scalar)


def _dot(self, a: Any, b: Any, acc: Any, precision: Any, max_imprecise: Any) -> Any:
    x, y = (bf16_decode(h.data) if _is_bf16(h) else h.data for h in (a, b))
    name, kind = str(precision).upper(), a.dtype.scalar
    if ACTIVE is not None:
        ACTIVE.flops_issued += 2 * int(np.prod(x.shape[:-2])) * x.shape[-2] * x.shape[-1] * y.shape[-1]
    if acc.data.dtype != np.float32 or kind.is_int() or kind == tl.float64:
        return Handle(np.matmul(x.astype(acc.data.dtype), y.astype(acc.data.dtype)) + acc.data, acc.dtype.scalar)
    if kind != tl.float32 or "TF32" not in name:
        out = Handle(multiply(x, y, acc.data, kind != tl.float32), acc.dtype.scalar)
        if not max_imprecise and not acc.data.any():
            out.attr["factors"] = (x, y, kind != tl.float32)
        return out
    big_x, big_y = tf32_round(x), tf32_round(y)
    out = acc.data
    if "X3" in name:
        small_x, small_y = tf32_round(x - big_x), tf32_round(y - big_y)
        out = multiply(big_x, small_y, multiply(small_x, big_y, out, True), True)
    return Handle(multiply(big_x, big_y, out, True), acc.dtype.scalar)


# -- the sanitizer ----------------------------------------------------------------------------------------------------


@dataclass
class Shadow:
    """What is known about one storage during one launch; `copy` holds its bytes between two guard zones."""

    home: torch.UntypedStorage
    copy: torch.Tensor
    names: set[str]
    item: int
    legal: np.ndarray
    writer: np.ndarray
    reader: np.ndarray

    @property
    def start(self) -> int:
        return self.copy.data_ptr()


@dataclass
class Sanitizer:
    """Records every launch of a kernel inside its `with` block. Counts are bytes and floating-point operations.

    `bytes_issued` counts every access of every program, `bytes_minimum` each distinct byte once per launch and
    direction; both by tensor argument name. torch.empty is filled with a poison that no kernel may read.
    """

    faults: list[str] = field(default_factory=list)
    bytes_issued: Counter = field(default_factory=Counter)
    bytes_minimum: Counter = field(default_factory=Counter)
    flops_issued: int = 0
    atomics: int = 0
    launches: int = 0
    shadows: list[Shadow] = field(default_factory=list, repr=False)

    def __enter__(self) -> "Sanitizer":
        global ACTIVE
        assert ACTIVE is None, "sanitizers do not nest"
        ACTIVE = self
        self._poisoner = _Poisoner()
        self._poisoner.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        global ACTIVE
        self._poisoner.__exit__(*error)
        ACTIVE = None

    def check(self) -> None:
        """Raises AssertionError with the first faults, if any."""
        assert not self.faults, "; ".join(self.faults[:4])

    def fault(self, kind: str, shadow_names: Any, detail: str) -> None:
        program = tuple(stock.interpreter_builder.grid_idx)
        self.faults.append(f"{kind}: {'/'.join(sorted(shadow_names))} in program {program}, {detail}")

    def adopt(self, named: list[tuple[str, torch.Tensor]]) -> dict[int, Shadow]:
        """Copies the storages of all tensor arguments between guard zones; keys are the storages' addresses."""
        self.launches += 1
        found: dict[int, Shadow] = {}
        for name, tensor in named:
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            if key not in found:
                total = size + 2 * GUARD_BYTES
                copy = torch.full((total,), 0xA5, dtype=torch.uint8)
                if size:
                    copy[GUARD_BYTES : GUARD_BYTES + size] = torch.tensor([], dtype=torch.uint8).set_(storage)
                legal, nobody = np.zeros(total, bool), np.full(total, NEVER, np.int32)
                found[key] = Shadow(storage, copy, set(), tensor.element_size(), legal, nobody, nobody.copy())
            item = tensor.element_size()
            elements = torch.zeros(size // item, dtype=torch.bool)
            if tensor.numel():
                torch.as_strided(elements, tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
            legal = found[key].legal[GUARD_BYTES : GUARD_BYTES + size // item * item]
            legal |= elements.numpy().repeat(item)
            found[key].names.add(name)
        self.shadows = list(found.values())
        return found

    def settle(self) -> None:
        """Closes a launch: counts the distinct bytes."""
        for shadow in self.shadows:
            name = "/".join(sorted(shadow.names))
            touched = int(np.count_nonzero(shadow.writer != NEVER) + np.count_nonzero(shadow.reader != NEVER))
            self.bytes_minimum[name] += touched * shadow.item
        self.shadows = []

    def access(self, pointers: Any, mask: np.ndarray, values: np.ndarray | None) -> bool:
        """Checks one masked load (`values` is None) or store; False when it must not be carried out."""
        item = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = np.asarray(pointers.data)[np.broadcast_to(mask, pointers.data.shape)].astype(np.int64)
        if addresses.size == 0:
            return True
        for shadow in self.shadows:
            inside = (addresses >= shadow.start) & (addresses < shadow.start + len(shadow.legal))
            if inside.all():
                return self._access_one(shadow, addresses - shadow.start, item, values)
        self.fault("out of bounds", ["?"], f"{addresses.size} accesses of no single tensor, first {addresses[0]:#x}")
        return False

    def _access_one(self, shadow: Shadow, at: np.ndarray, item: int, values: np.ndarray | None) -> bool:
        kind = "load" if values is None else "store"
        program = int(np.ravel_multi_index(stock.interpreter_builder.grid_idx, stock.interpreter_builder.grid_dim))
        self.bytes_issued["/".join(sorted(shadow.names))] += at.size * item
        if not shadow.legal[at].all():
            self.fault("out of bounds", shadow.names, f"{kind} of {int((~shadow.legal[at]).sum())} elements")
            return False
        writers = shadow.writer[at]
        others = (writers != NEVER) & (writers != program)
        if others.any():
            self.fault("race", shadow.names, f"{kind} of what program {int(writers[others][0])} writes")
        assert item == shadow.item, "views of one storage as two item sizes are not modelled"
        readers = shadow.reader[at]
        if values is None:
            shadow.reader[at] = np.where((readers == NEVER) | (readers == program), program, MANY)
            return True
        if ((readers != NEVER) & (readers != program)).any():
            self.fault("race", shadow.names, "store to what another program reads")
        if len(np.unique(at)) != at.size:
            self.fault("race", shadow.names, "two lanes of one program store to one address")
        shadow.writer[at] = program  # the shadow of an element is that of its first byte
        return True

    def loaded(self, values: np.ndarray, mask: np.ndarray) -> None:
        """Looks for the poison among the values that one load brought."""
        data = np.ascontiguousarray(values)
        bits = data.view(f"u{data.dtype.itemsize}")
        if data.dtype.itemsize > 1 and ((bits == POISON[data.dtype.itemsize]) & mask).any():
            self.fault("uninitialised read", {n for s in self.shadows for n in s.names}, "of torch.empty memory")


ACTIVE: Sanitizer | None = None


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """Boolean mask of the elements that nobody has written since torch.empty made them (inside a Sanitizer)."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    item = tensor.element_size()
    return tensor.detach().contiguous().view(kinds[item]) == POISON[item] - (1 << (8 * item))


class _Poisoner(TorchDispatchMode):
    """Fills what torch.empty and its kin return, so that a read before a write is seen."""

    EMPTY = ("aten.empty.", "aten.empty_like.", "aten.new_empty.", "aten.empty_strided.", "aten.new_empty_strided.")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if str(func).startswith(self.EMPTY) and out.device.type == "cpu" and out.numel() and out.element_size() <= 8:
            item = out.element_size()
            raw = torch.tensor([], dtype=torch.uint8).set_(out.untyped_storage()).numpy()
            raw[: len(raw) // item * item].view(f"u{item}")[:] = POISON[item]
        return out


# -- putting it into Triton -------------------------------------------------------------------------------------------

_stock_load, _stock_store = Builder.create_masked_load, Builder.create_masked_store
_stock_rmw, _stock_call = Builder.create_atomic_rmw, stock.GridExecutor.__call__
_stock_init, _stock_restore = stock.GridExecutor._init_args_hst, stock.GridExecutor._restore_args_dev
_stock_patch, _stock_numpy_type = stock._patch_lang, stock._get_np_dtype
PATCHED: set[str] = set()  # names of the language's modules that this launch has patched
NUMPY_TYPES: dict[str, np.dtype] = {}


def _load(self, pointers, mask, other, *hints, **named_hints):
    hints = (*hints, *named_hints.values())  # a descriptor's load names them, each Triton has its own
    if ACTIVE is None:
        return _stock_load(self, pointers, mask, other, *hints)
    live = np.asarray(mask.data)  # a descriptor's mask is a bare array
    if not ACTIVE.access(pointers, live, None):
        raise IndexError(ACTIVE.faults[-1])
    out = _stock_load(self, pointers, mask, other, *hints)
    ACTIVE.loaded(out.data, live)
    return out


def _store(self, pointers, value, mask, *hints):
    if ACTIVE is not None and not ACTIVE.access(pointers, mask.data, value.data):
        raise IndexError(ACTIVE.faults[-1])
    return _stock_store(self, pointers, value, mask, *hints)


def _atomic(self, *args):
    if ACTIVE is not None:
        ACTIVE.atomics += 1
        ACTIVE.fault("race", ["?"], "an atomic: its order, so its rounding, changes from run to run")
    return _stock_rmw(self, *args)


def _init_args(self, args_dev, kwargs):
    if ACTIVE is None:
        return _stock_init(self, args_dev, kwargs)
    named = [*zip(self.arg_names, args_dev, strict=False), *kwargs.items()]
    named = [(name, arg.base if isinstance(arg, TensorDescriptor) else arg) for name, arg in named]
    shadows = ACTIVE.adopt([(name, arg) for name, arg in named if isinstance(arg, torch.Tensor)])

    def guarded(arg):
        if isinstance(arg, TensorDescriptor):
            return replace(arg, base=guarded(arg.base))
        if not isinstance(arg, torch.Tensor):
            return arg
        shadow = shadows[arg.untyped_storage().data_ptr()]
        offset = GUARD_BYTES // arg.element_size() + arg.storage_offset()
        return arg.detach().new_empty(0).set_(shadow.copy.untyped_storage(), offset, arg.size(), arg.stride())

    return [guarded(arg) for arg in args_dev], {key: guarded(arg) for key, arg in kwargs.items()}


def _restore_args(self, args_dev, args_hst, kwargs, kwargs_hst):
    if ACTIVE is None:
        return _stock_restore(self, args_dev, args_hst, kwargs, kwargs_hst)
    for shadow in ACTIVE.shadows:
        size = shadow.home.nbytes()
        if size:
            raw = torch.tensor([], dtype=torch.uint8).set_(shadow.home)
            raw.copy_(shadow.copy[GUARD_BYTES : GUARD_BYTES + size])
    ACTIVE.settle()


def _call(self, *args, **kwargs):
    PATCHED.clear()
    try:
        with np.errstate(all="ignore"):  # a GPU raises no warnings for exp(-inf) or inf - inf
            return _stock_call(self, *args, **kwargs)
    finally:
        PATCHED.clear()


def _patch_language(fn):
    """Triton looks through its whole language at each call of a function inside a kernel; once a launch is enough."""
    modules = {name for name, value in fn.__globals__.items() if value is tl or value is tl.core}
    if modules and modules <= PATCHED:
        return stock._LangPatchScope()
    PATCHED.update(modules)
    return _stock_patch(fn)


def _numpy_type(kind: Any) -> np.dtype:
    """The stock function builds its table of types at each call."""
    scalar = kind.scalar
    if scalar.is_ptr():
        return np.dtype(np.uint64)
    if scalar.name not in NUMPY_TYPES:
        NUMPY_TYPES[scalar.name] = _stock_numpy_type(scalar)
    return NUMPY_TYPES[scalar.name]


def install() -> None:
    """Patches Triton's interpreter in place. A second call changes nothing."""
    Builder.cast_impl, Builder.create_fp_to_fp = _cast, _float_to_float
    Builder.binary_op, Builder.unary_op, Builder.create_fma, Builder.create_dot = _binary, _unary, _fma, _dot
    Builder.create_exp = _exp
    Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw = _load, _store, _atomic
    reduce_ops: Any = stock.ReduceOps
    reduce_ops.sum = _sum
    stock.GridExecutor._init_args_hst, stock.GridExecutor._restore_args_dev = _init_args, _restore_args
    stock.GridExecutor.__call__ = _call
    stock._patch_lang, stock._get_np_dtype = _patch_language, _numpy_type
