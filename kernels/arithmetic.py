"""How a card rounds, in NumPy: bf16, TF32, and matrix products whose sums have one order."""

import numpy as np

TENSOR_CORE_DEPTH = 16


def bf16_decode(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns -> float32, exact."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def bf16_encode(values: np.ndarray) -> np.ndarray:
    """float -> uint16 bit patterns, round to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def tf32_round(values: np.ndarray) -> np.ndarray:
    """float32 -> float32 with a 10-bit mantissa, to nearest, ties away from zero (cvt.rna.tf32.f32)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def multiply(a: np.ndarray, b: np.ndarray, acc: np.ndarray, half: bool) -> np.ndarray:
    """acc + a @ b in fp32, every element's sum in the same order wherever in a tile it stands.

    CUDA cores do one fused multiply-add after the other. With `half` (operands of 11 mantissa bits or fewer) it is the
    tensor core: 16 exact products join the accumulator with one rounding; that the card truncates a little inside such
    a step is not modelled. A BLAS would choose the order by the shape and the processor, and then neither bits nor
    errors would mean anything.
    """
    a_t = np.ascontiguousarray(np.swapaxes(a, -1, -2), np.float64)
    b, total = np.ascontiguousarray(b, np.float64), acc.astype(np.float64)
    product = np.empty_like(total)
    rounded = np.empty(total.shape, np.float32)
    depth, inner = TENSOR_CORE_DEPTH if half else 1, a_t.shape[-2]
    for k in range(inner):
        np.multiply(a_t[..., k, :, None], b[..., k, None, :], out=product)  # exact: at most two 24-bit mantissas
        total += product
        if (k + 1) % depth == 0 or k + 1 == inner:
            rounded[...] = total
            total[...] = rounded
    return total.astype(np.float32)


def multiply_short(a: np.ndarray, b: np.ndarray, chain: int) -> np.ndarray:
    """a @ b in fp32 from chains of at most `chain` fused multiply-adds, which are added in pairs."""
    zeros = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32)
    slices = [slice(k, k + chain) for k in range(0, a.shape[-1], chain)]
    parts = [multiply(a[..., at], b[..., at, :], zeros, False) for at in slices]
    while len(parts) > 1:
        odd = parts[len(parts) // 2 * 2 :]
        parts = [x + y for x, y in zip(parts[::2], parts[1::2], strict=False)] + odd
    return parts[0] if parts else zeros


def add_halves(values: np.ndarray, axis: int) -> np.ndarray:
    """Sum over an axis, which stays with length one: halves are added to halves, as the lanes of a warp do. What
    a thread holds itself it adds first, one by one: eight terms or so, hardly less exact."""
    values = np.moveaxis(values, axis, 0)
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    return np.moveaxis(values, 0, axis)
