"""The backward kernels of `attention.py`: dK and dV by key tile, dQ by query tile, so no two programs share an output.

Notation as in `attention_tiles.py`. `lse` is in base 2, so p = exp2(s * c - lse) needs no maximum.
"""

from .attention_exact_tiles import (
    add_slices,
    add_term,
    bend_scores,
    multiply,
    multiply_slices,
    raise_difference,
    read_again,
)
from .attention_tiles import (
    key_bounds,
    load_rows,
    query_bounds,
    store_rows,
    tanh,
    tile_of,
    visible,
)
from .jit import jit, tl


@jit
def probabilities(s, row_lse, row_inverse, C: tl.constexpr, C_LOW: tl.constexpr, EXACT: tl.constexpr,
                  COMPUTE: tl.constexpr):  # fmt: skip
    """Scores to softmax; the row terms broadcast against `s`."""
    if EXACT:
        return raise_difference(s, tl.minimum(row_lse, 1e30), C, C_LOW, COMPUTE) * row_inverse  # inf - inf is NaN
    return tl.exp2(tl.fma(s, tl.full([1, 1], C, COMPUTE), -row_lse))


@jit
def first_product(a, b, WIDTH: tl.constexpr, FIRST: tl.constexpr, EXACT: tl.constexpr, AGAIN: tl.constexpr,
                  PRECISION: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """a b^T over WIDTH columns. With AGAIN, a is where its rows are, of which these are columns FIRST..: what is read
    anew for each tile needs no registers in between."""
    if EXACT:
        if AGAIN:
            a = read_again(a, WIDTH, FIRST)
        return multiply_slices(a, b, WIDTH, COMPUTE)
    else:
        zeros = tl.zeros([a.shape[0], b.shape[0]], COMPUTE)
        return tl.dot(a, tl.trans(b), zeros, input_precision=PRECISION, out_dtype=COMPUTE)


@jit
def next_product(acc, a, b, WIDTH: tl.constexpr, FIRST: tl.constexpr, EXACT: tl.constexpr, AGAIN: tl.constexpr,
                 PRECISION: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """acc + a b^T, likewise."""
    if EXACT:
        if AGAIN:
            a = read_again(a, WIDTH, FIRST)
        return add_slices(acc, a, b, WIDTH, COMPUTE)
    else:
        return tl.dot(a, tl.trans(b), acc, input_precision=PRECISION, out_dtype=COMPUTE)  # pyright: ignore


@jit
def grow(acc, lost, a, b, EXACT: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr):
    """acc + a b, and with EXACT what rounding takes from that sum over the tiles."""
    if EXACT:
        return add_term(acc, lost, multiply(a, b, COMPUTE))
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=COMPUTE), lost  # pyright: ignore


@jit
def bend_tile(s, INNER: tl.constexpr, CAP: tl.constexpr, EXACT: tl.constexpr, COMPUTE: tl.constexpr):
    """Scores under the softcap, and its slope."""
    if EXACT:
        return bend_scores(s, INNER, CAP, COMPUTE)
    bend = tanh(s * INNER, COMPUTE)
    return CAP * bend, 1.0 - bend * bend


@jit
def key_value_tiles(
    dk1, dk2, dv1, dv2, lost, k1, k2, v1, v2, q, dout, lse, inverse_total, delta, q_t: tl.constexpr, do_t: tl.constexpr,
    n0, low, high, q_length, k_length, offset, window, C: tl.constexpr, C_LOW: tl.constexpr, EXACT: tl.constexpr,
    INNER: tl.constexpr, CAP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr, KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """Adds query tiles [low, high) of one head to dK (with KEYS) and dV (with VALUES); everything is transposed, keys
    down, queries across."""
    AGAIN: tl.constexpr = EXACT and D1 + D2 >= 128
    ldk1, ldk2, ldv1, ldv2 = lost
    keys = (n0 + tl.arange(0, BN))[:, None]
    rows = tl.arange(0, BM)
    q_tile = q + tl.cast(low, tl.int64) * q_t
    do_tile = dout + tl.cast(low, tl.int64) * do_t
    for m in range(low, high, BM):
        left = q_length - m
        q1 = load_rows(q_tile, rows, left, q_t, D1, 0, EDGE)
        s = first_product(k1, q1, D1, 0, EXACT, AGAIN, PRECISION, COMPUTE)
        if D2 > 0:
            q2 = load_rows(q_tile, rows, left, q_t, D2, D1, EDGE)
            s = next_product(s, k2, q2, D2, D1, EXACT, AGAIN, PRECISION, COMPUTE)
        if EDGE:
            row_lse = tl.load(lse + m + rows, mask=rows < left, other=float("inf"))
            row_inverse = row_lse
            if EXACT:
                row_inverse = tl.load(inverse_total + m + rows, mask=rows < left, other=0.0)
            row_delta = tl.load(delta + m + rows, mask=rows < left, other=0.0)
        else:
            row_lse = tl.load(lse + m + rows)
            row_inverse = row_lse
            if EXACT:
                row_inverse = tl.load(inverse_total + m + rows)
            row_delta = tl.load(delta + m + rows)
        if SOFTCAP:
            s, slope = bend_tile(s, INNER, CAP, EXACT, COMPUTE)
        p = probabilities(s, row_lse[None, :], row_inverse[None, :], C, C_LOW, EXACT, COMPUTE)
        if MASKED and CAUSAL:  # a key row past the end makes nothing but itself wrong, and is not stored
            last = (m + rows + offset)[None, :]
            p = tl.where(visible(last, keys, last + 1, window, CAUSAL, WINDOW), p, 0.0)
        do1 = load_rows(do_tile, rows, left, do_t, E1, 0, EDGE)
        low_p = p.to(dout.dtype.element_ty)
        if VALUES:
            dv1, ldv1 = grow(dv1, ldv1, low_p, do1, EXACT, PRECISION, COMPUTE)
        if KEYS:
            dp = first_product(v1, do1, E1, 0, EXACT, AGAIN, PRECISION, COMPUTE)
        if E2 > 0:
            do2 = load_rows(do_tile, rows, left, do_t, E2, E1, EDGE)
            if VALUES:
                dv2, ldv2 = grow(dv2, ldv2, low_p, do2, EXACT, PRECISION, COMPUTE)
            if KEYS:
                dp = next_product(dp, v2, do2, E2, E1, EXACT, AGAIN, PRECISION, COMPUTE)
        if KEYS:
            ds = p * (dp - row_delta[None, :])
            if SOFTCAP:
                ds = ds * slope
            low_ds = ds.to(q.dtype.element_ty)
            dk1, ldk1 = grow(dk1, ldk1, low_ds, q1, EXACT, PRECISION, COMPUTE)
            if D2 > 0:
                dk2, ldk2 = grow(dk2, ldk2, low_ds, q2, EXACT, PRECISION, COMPUTE)
        q_tile += BM * q_t
        do_tile += BM * do_t
    return dk1, dk2, dv1, dv2, (ldk1, ldk2, ldv1, ldv2)


@jit
def key_value_kernel(
    q, k, v, dout, lse, inverse_total, delta, dk, dv, cu_q, cu_k, documents, q_t: tl.constexpr, q_h, k_t: tl.constexpr,
    k_h, v_t: tl.constexpr, v_h, do_t: tl.constexpr, do_h, dk_t, dk_h, dv_t, dv_h, lse_h, window, group,
    SCALE: tl.constexpr, C: tl.constexpr, C_LOW: tl.constexpr, EXACT: tl.constexpr, INNER: tl.constexpr,
    CAP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """One program makes BN rows of dK (with KEYS) and dV (with VALUES) of one key head, adding up the query heads of
    its group in order."""
    kv_head = tl.program_id(1)
    document, k_start, k_length, n0 = tile_of(cu_k, documents, BN)
    q_start = tl.load(cu_q + document).to(tl.int64)
    q_length = (tl.load(cu_q + document + 1) - q_start).to(tl.int32)
    offset = k_length - q_length
    rows = n0 + tl.arange(0, BN)
    k += k_start * k_t + kv_head.to(tl.int64) * k_h
    v += k_start * v_t + kv_head.to(tl.int64) * v_h
    k1 = load_rows(k, rows, k_length, k_t, D1, 0, True)
    v1 = load_rows(v, rows, k_length, v_t, E1, 0, True)
    dk1 = tl.zeros([BN, D1], COMPUTE)
    dv1 = tl.zeros([BN, E1], COMPUTE)
    k2, v2, dk2, dv2 = k1, v1, dk1, dv1
    if D2 > 0:
        k2 = load_rows(k, rows, k_length, k_t, D2, D1, True)
        dk2 = tl.zeros([BN, D2], COMPUTE)
    if E2 > 0:
        v2 = load_rows(v, rows, k_length, v_t, E2, E1, True)
        dv2 = tl.zeros([BN, E2], COMPUTE)
    lost = (dk1, dk2, dv1, dv2)  # where EXACT: what rounding took from them
    if EXACT and D1 + D2 >= 128:  # AGAIN
        k1, v1 = (k, rows, k_length, k_t), (v, rows, k_length, v_t)
        k2, v2 = k1, v1
    low, diagonal, plain, plain_end, edge, high = query_bounds(n0, q_length, offset, window, BM, BN, CAUSAL, WINDOW)
    if n0 >= k_length:
        low, diagonal, plain, plain_end, edge, high = 0, 0, 0, 0, 0, 0
    for member in range(0, group):
        head = (kv_head * group + member).to(tl.int64)
        q_head = q + q_start * q_t + head * q_h
        do_head = dout + q_start * do_t + head * do_h
        lse_head = lse + head * lse_h + q_start
        inverse_head = inverse_total + head * lse_h + q_start
        delta_head = delta + head * lse_h + q_start
        if CAUSAL:
            dk1, dk2, dv1, dv2, lost = key_value_tiles(
                dk1, dk2, dv1, dv2, lost, k1, k2, v1, v2, q_head, do_head, lse_head, inverse_head, delta_head, q_t,
                do_t, n0, low, diagonal, q_length, k_length, offset, window, C, C_LOW, EXACT, INNER, CAP, D1, D2, E1,
                E2, BM, BN, True, False, CAUSAL, WINDOW, SOFTCAP, PRECISION, COMPUTE, KEYS, VALUES)  # fmt: skip
        dk1, dk2, dv1, dv2, lost = key_value_tiles(
            dk1, dk2, dv1, dv2, lost, k1, k2, v1, v2, q_head, do_head, lse_head, inverse_head, delta_head, q_t, do_t,
            n0, plain, plain_end, q_length, k_length, offset, window, C, C_LOW, EXACT, INNER, CAP, D1, D2, E1,
            E2, BM, BN, False, False, CAUSAL, WINDOW, SOFTCAP, PRECISION, COMPUTE, KEYS, VALUES)  # fmt: skip
        dk1, dk2, dv1, dv2, lost = key_value_tiles(
            dk1, dk2, dv1, dv2, lost, k1, k2, v1, v2, q_head, do_head, lse_head, inverse_head, delta_head, q_t, do_t,
            n0, edge, high, q_length, k_length, offset, window, C, C_LOW, EXACT, INNER, CAP, D1, D2, E1,
            E2, BM, BN, True, True, CAUSAL, WINDOW, SOFTCAP, PRECISION, COMPUTE, KEYS, VALUES)  # fmt: skip
    dk += k_start * dk_t + kv_head.to(tl.int64) * dk_h
    dv += k_start * dv_t + kv_head.to(tl.int64) * dv_h
    if EXACT:
        dk1, dk2, dv1, dv2 = dk1 + lost[0], dk2 + lost[1], dv1 + lost[2], dv2 + lost[3]
    if KEYS:
        store_rows(dk, rows, k_length, dk_t, dk1 * SCALE, D1, 0)
    if VALUES:
        store_rows(dv, rows, k_length, dv_t, dv1, E1, 0)
    if KEYS and D2 > 0:
        store_rows(dk, rows, k_length, dk_t, dk2 * SCALE, D2, D1)
    if VALUES and E2 > 0:
        store_rows(dv, rows, k_length, dv_t, dv2, E2, E1)


@jit
def query_tiles(
    dq1, dq2, lost, q1, q2, do1, do2, row_lse, row_inverse, row_delta, k, v, k_t: tl.constexpr, v_t: tl.constexpr, m0,
    low, high, k_length, offset, window, C: tl.constexpr, C_LOW: tl.constexpr, EXACT: tl.constexpr, INNER: tl.constexpr,
    CAP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, ONLY_DELTA: tl.constexpr, MASKED: tl.constexpr, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Adds key tiles [low, high) to dQ, or with ONLY_DELTA to delta = sum(p * dp)."""
    AGAIN: tl.constexpr = EXACT and D1 + D2 >= 192
    ldq1, ldq2, ldelta = lost
    last = (m0 + tl.arange(0, BM) + offset)[:, None]
    columns = tl.arange(0, BN)
    k_tile = k + tl.cast(low, tl.int64) * k_t
    v_tile = v + tl.cast(low, tl.int64) * v_t
    for n in range(low, high, BN):
        k1 = load_rows(k_tile, columns, k_length - n, k_t, D1, 0, EDGE)
        s = first_product(q1, k1, D1, 0, EXACT, AGAIN, PRECISION, COMPUTE)
        if D2 > 0:
            k2 = load_rows(k_tile, columns, k_length - n, k_t, D2, D1, EDGE)
            s = next_product(s, q2, k2, D2, D1, EXACT, AGAIN, PRECISION, COMPUTE)
        if SOFTCAP:
            s, slope = bend_tile(s, INNER, CAP, EXACT, COMPUTE)
        p = probabilities(s, row_lse[:, None], row_inverse[:, None], C, C_LOW, EXACT, COMPUTE)
        if MASKED:
            keep = visible(last - n, columns[None, :], k_length - n, window, CAUSAL, WINDOW)
            p = tl.where(keep, p, 0.0)
        v1 = load_rows(v_tile, columns, k_length - n, v_t, E1, 0, EDGE)
        dp = first_product(do1, v1, E1, 0, EXACT, AGAIN, PRECISION, COMPUTE)
        if E2 > 0:
            v2 = load_rows(v_tile, columns, k_length - n, v_t, E2, E1, EDGE)
            dp = next_product(dp, do2, v2, E2, E1, EXACT, AGAIN, PRECISION, COMPUTE)
        if ONLY_DELTA:
            row_delta, ldelta = add_term(row_delta, ldelta, tl.sum(p * dp, 1))
        else:
            ds = p * (dp - row_delta[:, None])
            if SOFTCAP:
                ds = ds * slope
            low_ds = ds.to(k.dtype.element_ty)
            dq1, ldq1 = grow(dq1, ldq1, low_ds, k1, EXACT, PRECISION, COMPUTE)
            if D2 > 0:
                dq2, ldq2 = grow(dq2, ldq2, low_ds, k2, EXACT, PRECISION, COMPUTE)
        k_tile += BN * k_t
        v_tile += BN * v_t
    return dq1, dq2, row_delta, (ldq1, ldq2, ldelta)


@jit
def query_sweep(
    dq1, dq2, lost, q1, q2, do1, do2, row_lse, row_inverse, row_delta, k, v, k_t: tl.constexpr, v_t: tl.constexpr, m0,
    low, plain, plain_end, edge, high, k_length, offset, window, C: tl.constexpr, C_LOW: tl.constexpr,
    EXACT: tl.constexpr, INNER: tl.constexpr, CAP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr,
    E2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ONLY_DELTA: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The ranges of `key_bounds`, one after the other."""
    if WINDOW:
        dq1, dq2, row_delta, lost = query_tiles(
            dq1, dq2, lost, q1, q2, do1, do2, row_lse, row_inverse, row_delta, k, v, k_t, v_t, m0, low,
            tl.minimum(plain, high), k_length, offset, window, C, C_LOW, EXACT, INNER, CAP, D1, D2, E1, E2, BM, BN,
            ONLY_DELTA, True, True, CAUSAL, WINDOW, SOFTCAP, PRECISION, COMPUTE)  # fmt: skip
    dq1, dq2, row_delta, lost = query_tiles(
        dq1, dq2, lost, q1, q2, do1, do2, row_lse, row_inverse, row_delta, k, v, k_t, v_t, m0, plain, plain_end,
        k_length, offset, window, C, C_LOW, EXACT, INNER, CAP, D1, D2, E1, E2, BM, BN,
        ONLY_DELTA, False, False, CAUSAL, WINDOW, SOFTCAP, PRECISION, COMPUTE)  # fmt: skip
    if CAUSAL:
        dq1, dq2, row_delta, lost = query_tiles(
            dq1, dq2, lost, q1, q2, do1, do2, row_lse, row_inverse, row_delta, k, v, k_t, v_t, m0, plain_end, edge,
            k_length, offset, window, C, C_LOW, EXACT, INNER, CAP, D1, D2, E1, E2, BM, BN,
            ONLY_DELTA, True, False, CAUSAL, WINDOW, SOFTCAP, PRECISION, COMPUTE)  # fmt: skip
    dq1, dq2, row_delta, lost = query_tiles(
        dq1, dq2, lost, q1, q2, do1, do2, row_lse, row_inverse, row_delta, k, v, k_t, v_t, m0, edge, high,
        k_length, offset, window, C, C_LOW, EXACT, INNER, CAP, D1, D2, E1, E2, BM, BN,
        ONLY_DELTA, True, True, CAUSAL, WINDOW, SOFTCAP, PRECISION, COMPUTE)  # fmt: skip
    return dq1, dq2, row_delta, lost


@jit
def query_kernel(
    q, k, v, dout, lse, inverse_total, delta, dq, cu_q, cu_k, documents, q_t: tl.constexpr, q_h, k_t: tl.constexpr, k_h,
    v_t: tl.constexpr, v_h, do_t: tl.constexpr, do_h, dq_t, dq_h, lse_h, window, group, SCALE: tl.constexpr,
    C: tl.constexpr, C_LOW: tl.constexpr, EXACT: tl.constexpr, INNER: tl.constexpr, CAP: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program makes BM rows of dQ of one head of one document."""
    head = tl.program_id(1)
    document, q_start, q_length, m0 = tile_of(cu_q, documents, BM)
    k_start = tl.load(cu_k + document).to(tl.int64)
    k_length = (tl.load(cu_k + document + 1) - k_start).to(tl.int32)
    offset = k_length - q_length
    rows = m0 + tl.arange(0, BM)
    q += q_start * q_t + head.to(tl.int64) * q_h
    dout += q_start * do_t + head.to(tl.int64) * do_h
    k += k_start * k_t + (head // group).to(tl.int64) * k_h
    v += k_start * v_t + (head // group).to(tl.int64) * v_h
    at = head.to(tl.int64) * lse_h + q_start + rows
    row_lse = tl.load(lse + at, mask=rows < q_length, other=float("inf"))
    row_inverse = row_lse
    if EXACT:
        row_inverse = tl.load(inverse_total + at, mask=rows < q_length, other=0.0)
        row_delta = tl.zeros([BM], COMPUTE)
    else:
        row_delta = tl.load(delta + at, mask=rows < q_length, other=0.0)
    q1 = load_rows(q, rows, q_length, q_t, D1, 0, True)
    do1 = load_rows(dout, rows, q_length, do_t, E1, 0, True)
    dq1 = tl.zeros([BM, D1], COMPUTE)
    q2, do2, dq2 = q1, do1, dq1
    if D2 > 0:
        q2 = load_rows(q, rows, q_length, q_t, D2, D1, True)
        dq2 = tl.zeros([BM, D2], COMPUTE)
    if E2 > 0:
        do2 = load_rows(dout, rows, q_length, do_t, E2, E1, True)
    if EXACT and D1 + D2 >= 192:  # AGAIN
        q1, do1 = (q, rows, q_length, q_t), (dout, rows, q_length, do_t)
        q2, do2 = q1, do1
    lost = (dq1, dq2, row_delta)  # where EXACT: what rounding took from them, zero as they are
    low, plain, plain_end, edge, high = key_bounds(m0, k_length, offset, window, BM, BN, CAUSAL, WINDOW)
    if m0 >= q_length:
        low, plain, plain_end, edge, high = 0, 0, 0, 0, 0
    if EXACT:
        dq1, dq2, row_delta, lost = query_sweep(
            dq1, dq2, lost, q1, q2, do1, do2, row_lse, row_inverse, row_delta, k, v, k_t, v_t, m0, low,
            plain, plain_end, edge, high, k_length, offset, window, C, C_LOW, EXACT, INNER, CAP, D1, D2, E1, E2, BM,
            BN, True, CAUSAL, WINDOW, SOFTCAP, PRECISION, COMPUTE)  # fmt: skip
        row_delta += lost[2]
        tl.store(delta + at, row_delta, mask=rows < q_length)
    dq1, dq2, row_delta, lost = query_sweep(
        dq1, dq2, lost, q1, q2, do1, do2, row_lse, row_inverse, row_delta, k, v, k_t, v_t, m0, low,
        plain, plain_end, edge, high, k_length, offset, window, C, C_LOW, EXACT, INNER, CAP, D1, D2, E1, E2, BM, BN,
        False, CAUSAL, WINDOW, SOFTCAP, PRECISION, COMPUTE)  # fmt: skip
    if EXACT:
        dq1, dq2 = dq1 + lost[0], dq2 + lost[1]
    dq += q_start * dq_t + head.to(tl.int64) * dq_h
    store_rows(dq, rows, q_length, dq_t, dq1 * SCALE, D1, 0)
    if D2 > 0:
        store_rows(dq, rows, q_length, dq_t, dq2 * SCALE, D2, D1)
