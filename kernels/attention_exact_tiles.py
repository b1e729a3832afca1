"""fp32 attention on fused multiply-adds: sums that round less than a library's, and the forward kernel made of them.

A product's depth is cut in slices whose sums are added in pairs, as the warps of a library's block share it. What
rounding takes from the sums over tiles is kept beside them (Knuth's and Dekker's two-sums). The exponent is made good
for its rounding, and the row maximum and 1 / sum stay apart instead of as one log-sum-exp. All of it together is a
tenth of the instructions that the products take, so one loop serves masked and unmasked tiles.

Notation as in `attention_tiles.py`.
"""

from .attention_tiles import key_bounds, load_rows, raise_two, store_rows, tile_of, visible
from .jit import jit, tl


@jit
def round_product(x, y):
    """x * y, rounded: an fma, whose result no compiler folds into what comes next."""
    return tl.fma(x, y, tl.zeros_like(x))


@jit
def raise_difference(s, top, C: tl.constexpr, C_LOW: tl.constexpr, COMPUTE: tl.constexpr):
    """2 ** ((s - top) * C) for s <= top; the rounding of the difference, of its product and of C itself is made good:
    half an ulp beside exp2's own. A difference of zero gives one to the last bit."""
    s, top = tl.maximum(s, -1e30), tl.maximum(top, -1e30)  # -inf would make the corrections NaN
    x = s - top
    power = x * C
    lost = tl.fma(x, tl.full(x.shape, C, COMPUTE), -power) + (x * C_LOW + (s - (x + top)) * C)
    y = tl.exp2(power)
    return tl.fma(y, lost * 0.6931471805599453, y)


@jit
def exact_tanh(x, COMPUTE: tl.constexpr):
    """tanh, what its rounding to COMPUTE takes from it, and the slope 1 - tanh^2 without its cancellation: in fp32 a
    polynomial below 0.625 (Cephes), else 1 - gap with gap = 2 e^-2x / (1 + e^-2x)."""
    size = tl.abs(x)
    low: tl.constexpr = 3.85192606e-8 if tl.float32 == COMPUTE else 0.0  # pyright: ignore  # of 2 log2 e
    fall = raise_two(-size, 2.8853900817779268, low, True, COMPUTE)
    gap = 2.0 * fall / (1.0 + fall)
    bend = 1.0 - gap
    rest = (1.0 - bend) - gap
    slope = gap * (2.0 - gap)
    if tl.float32 == COMPUTE:
        y = x * x
        near = tl.fma(y, -5.70498872745e-3, 2.06390887954e-2)
        near = tl.fma(near, y, -5.37397155531e-2)
        near = tl.fma(near, y, 1.33314422036e-1)
        near = tl.fma(near, y, -3.33332819422e-1) * y
        small = tl.fma(near, size, size)
        rest = tl.where(size < 0.625, tl.fma(near, size, size - small), rest)
        bend = tl.where(size < 0.625, small, bend)
        slope = tl.where(size < 0.625, tl.fma(-bend, bend, tl.full(x.shape, 1.0, COMPUTE)), slope)
    return tl.where(x < 0, -bend, bend), tl.where(x < 0, -rest, rest), slope


@jit
def bend_scores(s, INNER: tl.constexpr, CAP: tl.constexpr, COMPUTE: tl.constexpr):
    """CAP tanh(s INNER), the rounding of that product and of INNER made good, and the slope 1 - tanh^2."""
    inner = tl.full(s.shape, INNER, COMPUTE)
    inner_low = (tl.full([1, 1], INNER, tl.float64) - tl.full([1, 1], INNER, COMPUTE)).to(COMPUTE)
    x = round_product(s, inner)
    bend, rest, slope = exact_tanh(x, COMPUTE)
    low = tl.fma(slope, tl.fma(s, inner, -x) + s * inner_low, rest)
    return tl.fma(bend, tl.full(s.shape, CAP, COMPUTE), low * CAP), slope


@jit
def add_term(acc, lost, term):
    """acc + term, and with `lost` what rounding took from that sum; a term of zero changes no bit."""
    grown = acc + term
    return grown, lost + (term - (grown - acc))


@jit
def fade_and_add(acc, lost, fade, term):
    """`add_term` to acc * fade."""
    kept = round_product(acc, fade)
    return add_term(kept, tl.fma(lost, fade, tl.fma(acc, fade, -kept)), term)


@jit
def reciprocal(total, lost):
    """1 / (total + lost), and what that lacks: a card's division is two ulps off. Zero for zero."""
    seen = total > 0.0
    inverse = tl.where(seen, 1.0 / total, 0.0)
    rest = tl.fma(-total, inverse, tl.full(total.shape, 1.0, total.dtype)) - lost * inverse
    return inverse, tl.where(seen, inverse * rest, 0.0)


@jit
def multiply(a, b, COMPUTE: tl.constexpr):
    """a b as a term of its own. `max_num_imprecise_acc` says nothing of fp32: it keeps Triton from making what is added
    to the product the start of its chain of fused multiply-adds, whose rounding errors grow with its length."""
    zeros = tl.zeros([a.shape[0], b.shape[1]], COMPUTE)
    return tl.dot(a, b, zeros, input_precision="ieee", out_dtype=COMPUTE, max_num_imprecise_acc=1)


@jit
def multiply_slices(a, b, WIDTH: tl.constexpr, COMPUTE: tl.constexpr):
    """a b^T over their WIDTH columns in chains of 16 multiply-adds, which round as little as a good library's, their
    sums added in pairs. Each slice takes every second, fourth ... column: what a thread has loaded side by side it
    parts without asking another thread."""
    if WIDTH <= 16:
        return multiply(a, tl.trans(b), COMPUTE)
    else:
        a1, a2 = tl.split(tl.reshape(a, [a.shape[0], WIDTH // 2, 2]))
        b1, b2 = tl.split(tl.reshape(b, [b.shape[0], WIDTH // 2, 2]))
        near = multiply_slices(a1, b1, WIDTH // 2, COMPUTE)
        return near + multiply_slices(a2, b2, WIDTH // 2, COMPUTE)


@jit
def add_slices(acc, a, b, WIDTH: tl.constexpr, COMPUTE: tl.constexpr):
    """acc + a b^T, likewise. A wide product is added half by half: of two equal trees of sums LLVM makes one of pairs
    (sm_100's FFMA2 under Triton 3.7.1), which holds every factor of the first until it has all of the second, and
    spills."""
    if WIDTH < 128:
        return acc + multiply_slices(a, b, WIDTH, COMPUTE)
    else:
        a1, a2 = tl.split(tl.reshape(a, [a.shape[0], WIDTH // 2, 2]))
        b1, b2 = tl.split(tl.reshape(b, [b.shape[0], WIDTH // 2, 2]))
        acc += multiply_slices(a1, b1, WIDTH // 2, COMPUTE)
        return acc + multiply_slices(a2, b2, WIDTH // 2, COMPUTE)


@jit
def read_again(place, WIDTH: tl.constexpr, FIRST: tl.constexpr):
    """`load_rows` from (base, rows, limit, stride), volatile: no compiler keeps the tile in registers over a loop."""
    base, rows, limit, stride = place
    at = rows[:, None] * stride + (FIRST + tl.arange(0, WIDTH))[None, :]
    return tl.load(base + at, mask=(rows < limit)[:, None], other=0.0, volatile=True)


@jit
def sink_state(sink, BM: tl.constexpr, C: tl.constexpr, C_LOW: tl.constexpr, COMPUTE: tl.constexpr):
    """Row maximum, denominator and what that lacks, of a key that everyone sees and that carries no value: the
    denominator is 2 ** (sink log2 e - top C), where `top` is rounded."""
    sink = tl.zeros([BM], COMPUTE) + sink
    log2_e = tl.full([BM], 1.4426950408889634, COMPUTE)
    log2_e_low = 1.92596303e-8 if tl.float32 == COMPUTE else 0.0  # log2 e - fp32(log2 e)
    top = sink * 1.4426950408889634 / C
    raised, power = round_product(sink, log2_e), round_product(top, tl.full([BM], C, COMPUTE))
    low = tl.fma(sink, log2_e, -raised) - tl.fma(top, tl.full([BM], C, COMPUTE), -power)
    low += sink * log2_e_low - top * C_LOW
    return top, tl.full([BM], 1.0, COMPUTE), ((raised - power) + low) * 0.6931471805599453


@jit
def exact_attention_kernel(
    q, k, v, sinks, out, lse, inverse_total, cu_q, cu_k, documents, q_t, q_h, k_t: tl.constexpr, k_h,
    v_t: tl.constexpr, v_h, o_t, o_h, lse_h, window, group, INNER: tl.constexpr, CAP: tl.constexpr, C: tl.constexpr,
    C_LOW: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program makes BM rows of one head of one document."""
    head = tl.program_id(1)
    document, q_start, q_length, m0 = tile_of(cu_q, documents, BM)
    k_start = tl.load(cu_k + document).to(tl.int64)
    k_length = (tl.load(cu_k + document + 1) - k_start).to(tl.int32)
    offset = k_length - q_length
    rows = m0 + tl.arange(0, BM)
    q += q_start * q_t + head.to(tl.int64) * q_h
    q1 = load_rows(q, rows, q_length, q_t, D1, 0, True)
    k += k_start * k_t + (head // group).to(tl.int64) * k_h
    v += k_start * v_t + (head // group).to(tl.int64) * v_h
    acc1, top = tl.zeros([BM, E1], COMPUTE), tl.full([BM], float("-inf"), COMPUTE)
    lost1, total = acc1, tl.zeros([BM], COMPUTE)
    total_lost = total
    if D2 > 0:
        q2 = load_rows(q, rows, q_length, q_t, D2, D1, True)
    if E2 > 0:
        acc2 = tl.zeros([BM, E2], COMPUTE)
        lost2 = acc2
    if SINKS:
        top, total, total_lost = sink_state(tl.load(sinks + head), BM, C, C_LOW, COMPUTE)
    low, _, _, _, high = key_bounds(m0, k_length, offset, window, BM, BN, CAUSAL, WINDOW)
    columns = tl.arange(0, BN)
    for n in range(low, tl.where(m0 < q_length, high, low), BN):
        key = n + columns
        s = multiply_slices(q1, load_rows(k, key, k_length, k_t, D1, 0, True), D1, COMPUTE)
        if D2 > 0:
            s = add_slices(s, q2, load_rows(k, key, k_length, k_t, D2, D1, True), D2, COMPUTE)
        if SOFTCAP:
            s = bend_scores(s, INNER, CAP, COMPUTE)[0]
        keep = visible((rows + offset)[:, None], key[None, :], k_length, window, CAUSAL, WINDOW)
        s = tl.where(keep, s, float("-inf"))
        shift = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(shift == float("-inf"), 0.0, shift)  # a row that has seen no key yet
        p = raise_difference(s, shift[:, None], C, C_LOW, COMPUTE)
        fade = raise_difference(top, shift, C, C_LOW, COMPUTE)
        top = tl.maximum(top, tl.max(s, 1))
        total, total_lost = fade_and_add(total, total_lost, fade, tl.sum(p, 1))
        v1 = load_rows(v, key, k_length, v_t, E1, 0, True)
        acc1, lost1 = fade_and_add(acc1, lost1, fade[:, None], multiply(p, v1, COMPUTE))
        if E2 > 0:
            v2 = load_rows(v, key, k_length, v_t, E2, E1, True)
            acc2, lost2 = fade_and_add(acc2, lost2, fade[:, None], multiply(p, v2, COMPUTE))
    inverse, low_inverse = reciprocal(total, total_lost)
    out += q_start * o_t + head.to(tl.int64) * o_h
    store_share(out, rows, q_length, o_t, acc1, lost1, inverse, low_inverse, E1, 0)
    if E2 > 0:
        store_share(out, rows, q_length, o_t, acc2, lost2, inverse, low_inverse, E2, E1)
    # a row without keys gets +inf, which makes its probabilities zero in the backward pass
    at = head.to(tl.int64) * lse_h + q_start + rows
    tl.store(lse + at, tl.where(total > 0.0, top, float("inf")), mask=rows < q_length)
    tl.store(inverse_total + at, inverse + low_inverse, mask=rows < q_length)


@jit
def store_share(out, rows, limit, stride, acc, lost, inverse, low_inverse, WIDTH: tl.constexpr, FIRST: tl.constexpr):
    """Stores (acc + lost) (inverse + low_inverse)."""
    inverse, low_inverse = inverse[:, None], low_inverse[:, None]
    share = tl.fma(acc, inverse, tl.fma(acc, low_inverse, lost * inverse))
    store_rows(out, rows, limit, stride, share, WIDTH, FIRST)
