"""The Triton side of `attention.py`: FlashAttention-2 (Dao 2023, arXiv:2307.08691) over packed documents.

A document is a run of query rows and one of keys; query i of a document stands at key position i + offset, with
offset = keys - queries (bottom-right alignment), so that a chunk of a prefill sees the cache before it. Key tiles start
at the document's first key, whatever the pack: that, and tiles without effect being exact no-ops, makes a document's
result the same bits alone, packed and in chunks.

Widths are split in two powers of two (80 = 64 + 16, 192 = 128 + 64): D1 + D2 for q and k, E1 + E2 for v. Scores stay
unscaled and in base 2: p = exp2(s * c - m * c), one fused multiply-add per score. Masked tiles (the diagonal, the edge
of a window, the tail) run in their own loops, so the long loop has no mask.

EXACT (fp32 and fp64) spends a few instructions a score to stay below the error of eager fp32 code: the exponent is
made good for its rounding, the row maximum and 1 / sum are kept apart instead of as one log-sum-exp, every width is
split in two halves whose products are added, and so is each tile's: short chains of sums round less than long ones.
"""

from .jit import jit, tl


@jit
def tanh_series(y):
    """tanh(x) / x - 1 over y = x * x, below 0.55."""
    near = tl.fma(y, 1.57394409e-2, -5.23025580e-2)
    near = tl.fma(near, y, 1.33152157e-1)
    near = tl.fma(near, y, -3.33327681e-1)
    return near * y


@jit
def tanh(x, COMPUTE: tl.constexpr):
    """tanh to an ulp or two of fp32: a polynomial below 0.55, where 1 - 2 / (e^2x + 1) cancels."""
    far = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
    if tl.float64 == COMPUTE:
        return far
    near = tl.fma(tanh_series(x * x), x, x)
    return tl.where(tl.abs(x) < 0.55, near, far)


@jit
def raise_two(x, C: tl.constexpr, C_LOW: tl.constexpr, EXACT: tl.constexpr, COMPUTE: tl.constexpr):
    """2 ** (x * C) for x <= 0; EXACT makes good the rounding of x * C and of C itself: half an ulp beside exp2's own.
    Zero gives one to the last bit either way."""
    if not EXACT:
        return tl.exp2(x * C)
    x = tl.maximum(x, -1e30)  # -inf would make the correction NaN
    power = x * C
    lost = tl.fma(x, tl.full(x.shape, C, COMPUTE), -power) + x * C_LOW
    y = tl.exp2(power)
    return tl.fma(y, lost * 0.6931471805599453, y)


@jit
def load_rows(base, rows, limit, stride, WIDTH: tl.constexpr, FIRST: tl.constexpr, EDGE: tl.constexpr):
    """(rows, WIDTH) tile of columns FIRST.. of a matrix; with EDGE, rows at or past `limit` read as zero.

    A row's sixteens are added apart from its units: the compiler then sees that a thread's rows lie a constant apart,
    and keeps one pointer instead of one a row (a twentieth of the hot loop, and the registers that else spill).
    """
    near = (rows & 15)[:, None] * stride + (FIRST + tl.arange(0, WIDTH))[None, :]
    at = near + ((rows & -16) * stride)[:, None]
    if EDGE:
        return tl.load(base + at, mask=(rows < limit)[:, None], other=0.0)
    return tl.load(base + at)


@jit
def load_keys(base, box, head, first, rows, limit, stride, WIDTH: tl.constexpr, COUNT: tl.constexpr, EDGE: tl.constexpr,
              BOXES: tl.constexpr):  # fmt: skip
    """`load_rows` from column 0. With BOXES Hopper's copy engine brings the tile, from row `first` of `head`, and no
    thread makes an address; a tile at an edge it leaves to `load_rows`: another document's rows would come along.
    """
    if BOXES and not EDGE:
        return tl.reshape(box.load([head, first, 0]), [COUNT, WIDTH])
    else:
        return load_rows(base, rows, limit, stride, WIDTH, 0, EDGE)


@jit
def store_rows(base, rows, limit, stride, tile, WIDTH: tl.constexpr, FIRST: tl.constexpr):
    at = rows[:, None] * stride + (FIRST + tl.arange(0, WIDTH))[None, :]
    tl.store(base + at, tile.to(base.dtype.element_ty), mask=(rows < limit)[:, None])


@jit
def store_result(out, rest, rows, limit, stride, tile, WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    """Stores a tile, and with REST also what its rounding to the type of `out` loses."""
    store_rows(out, rows, limit, stride, tile, WIDTH, FIRST)
    if REST:
        store_rows(rest, rows, limit, stride, tile - tile.to(out.dtype.element_ty).to(tile.dtype), WIDTH, FIRST)


@jit
def add_product(acc, a, b, EXACT: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr):
    """acc + a b. EXACT adds the product as one term: the rounding errors of a chain of sums grow with its length."""
    if EXACT:
        acc += tl.dot(a, b, tl.zeros_like(acc), input_precision=PRECISION, out_dtype=COMPUTE)
        return acc
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=COMPUTE)  # pyright: ignore


@jit
def tile_of(cu, documents, BLOCK: tl.constexpr):
    """The document of this program, where that begins, its length, and the first row of the program's tile; a program
    that has no tile gets rows past the document's end.

    Document d begins at place (cu[d] + d (BLOCK - 1)) // BLOCK: wherever it starts, it has a place for each of its
    tiles, and all documents together have less than one each to spare. So a launch needs to know no longest document,
    and a short one costs no program for rows that only the longest has. The last tile, in causal attention the longest,
    starts first. The search goes by scalars, one border at a time: counting a vector of borders made sm_80 and sm_90
    spill, as if the threads of a program no longer shared their document.
    """
    place = tl.program_id(0)
    low, high = 0, documents
    while high - low > 1:
        middle = (low + high) // 2
        begun = (tl.load(cu + middle) + middle * (BLOCK - 1)) // BLOCK <= place
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    document = low
    start = tl.load(cu + document)
    end = tl.load(cu + document + 1)
    after = (end + (document + 1) * (BLOCK - 1)) // BLOCK
    left = after - 1 - place  # below zero in the rows after the last document
    return document, start.to(tl.int64), end - start, tl.where(left < 0, end - start, left * BLOCK)


@jit
def visible(last, keys, key_length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys a row sees; `last` is the key it stands at. One comparison a score, two with a window."""
    if CAUSAL:
        keep = keys <= tl.minimum(last, key_length - 1)
    else:
        keep = keys < key_length
    if WINDOW:
        keep = keep & (keys > last - window)
    return keep


@jit
def key_bounds(m0, key_length, offset, window, BM: tl.constexpr, BN: tl.constexpr,
               CAUSAL: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """Key ranges of one tile of queries: the window's edge [low, plain), the unmasked [plain, plain_end), the diagonal
    [plain_end, edge) and what passes the last key [edge, high)."""
    low, plain, high = 0, 0, key_length
    plain_end = key_length // BN * BN
    if CAUSAL:
        high = tl.minimum(key_length, tl.maximum(m0 + BM + offset, 0))
        plain_end = tl.minimum(key_length, tl.maximum(m0 + offset + 1, 0)) // BN * BN
    if WINDOW:
        low = tl.maximum(m0 + offset - window + 1, 0) // BN * BN
        plain = (tl.maximum(m0 + BM + offset - window, 0) + BN - 1) // BN * BN
        plain = tl.minimum(plain, (high + BN - 1) // BN * BN)
        plain_end = tl.maximum(plain_end, plain)
    edge = tl.maximum(plain_end, tl.minimum((high + BN - 1) // BN * BN, key_length // BN * BN))
    return low, plain, plain_end, edge, high


@jit
def query_bounds(n0, query_length, offset, window, BM: tl.constexpr, BN: tl.constexpr,
                 CAUSAL: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """Query ranges of one tile of keys: the diagonal [low, diagonal), the unmasked [plain, plain_end) and
    what meets the window's edge or passes the last query [edge, high)."""
    low, plain, high = 0, 0, query_length
    plain_end = query_length // BM * BM
    if WINDOW:
        high = tl.minimum(query_length, tl.maximum(n0 + BN - 1 + window - offset, 0))
        plain_end = tl.minimum(plain_end, tl.maximum(n0 + window - offset, 0) // BM * BM)
    if CAUSAL:
        low = tl.maximum(n0 - offset, 0) // BM * BM
        plain = (tl.maximum(n0 + BN - 1 - offset, 0) + BM - 1) // BM * BM
        plain = tl.minimum(plain, (high + BM - 1) // BM * BM)
        plain_end = tl.maximum(plain_end, plain)
    whole = query_length // BM * BM
    diagonal = tl.maximum(tl.minimum(plain, whole), low)
    edge = tl.maximum(tl.minimum(plain_end, whole), low)
    return low, diagonal, plain, plain_end, edge, high


@jit
def forward_tiles(
    acc1, acc2, top, total, q1, q2, k, v, k_box, v_box, kv_head, k_start, k_t: tl.constexpr, v_t: tl.constexpr, m0, low,
    high, key_length, offset, window, BOXES: tl.constexpr, SUMS: tl.constexpr, C: tl.constexpr, C_LOW: tl.constexpr,
    EXACT: tl.constexpr, INNER: tl.constexpr, CAP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr,
    E2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Runs key tiles [low, high) through the online softmax; `total` is the denominator, `top` the row maximum, times C
    where not EXACT. The document begins at row `k_start` of k_box and v_box.

    MASKED hides scores, EDGE also guards loads where a tile may pass the last key. With SUMS, `total` is that many sums
    a row, as many as four threads hold of it side by side: only after the last tile does one need another's numbers.
    """
    last = (m0 + tl.arange(0, BM) + offset)[:, None]
    columns = tl.arange(0, BN)
    c = tl.full([1], C, COMPUTE)
    first = tl.cast(k_start, tl.int32)
    k_tile = k + tl.cast(low, tl.int64) * k_t
    v_tile = v + tl.cast(low, tl.int64) * v_t
    for n in range(low, high, BN):
        k1 = load_keys(k_tile, k_box, kv_head, first + n, columns, key_length - n, k_t, D1, BN, EDGE, BOXES)
        s = tl.dot(q1, tl.trans(k1), tl.zeros([BM, BN], COMPUTE), input_precision=PRECISION, out_dtype=COMPUTE)
        if D2 > 0:
            k2 = load_rows(k_tile, columns, key_length - n, k_t, D2, D1, EDGE)
            s = add_product(s, q2, tl.trans(k2), EXACT, PRECISION, COMPUTE)
        if SOFTCAP:
            # an fma, whose result no compiler folds into what comes next: one loop would round otherwise than another
            s = tl.fma(tanh(s * INNER, COMPUTE), tl.full([1, 1], CAP, COMPUTE), tl.zeros([1, 1], COMPUTE))
        if MASKED:
            s = tl.where(visible(last - n, columns[None, :], key_length - n, window, CAUSAL, WINDOW), s, float("-inf"))
        highest = tl.max(s, 1)
        top_new = tl.maximum(top, highest if EXACT else highest * C)
        shift = top_new
        if MASKED:
            shift = tl.where(top_new == float("-inf"), 0.0, shift)  # a row that has seen no key yet
        if EXACT:
            p = raise_two(s - shift[:, None], C, C_LOW, True, COMPUTE)
            fade = tl.reshape(raise_two((top - shift)[:, None], C, C_LOW, True, COMPUTE), [BM])
        else:  # a tile that moves no maximum fades by one to the last bit: a fused top * C - shift would not
            p = tl.exp2(tl.fma(s, c[None, :], -shift[:, None]))
            fade = tl.exp2(top - shift)
        parts = p if SUMS == 1 else tl.reshape(p, [BM, BN // SUMS, SUMS])
        total = tl.fma(total, fade if SUMS == 1 else fade[:, None], tl.sum(parts, 1))
        top = top_new
        p = p.to(v.dtype.element_ty)
        v1 = load_keys(v_tile, v_box, kv_head, first + n, columns, key_length - n, v_t, E1, BN, EDGE, BOXES)
        acc1 = add_product(acc1 * fade[:, None], p, v1, EXACT, PRECISION, COMPUTE)
        if E2 > 0:
            v2 = load_rows(v_tile, columns, key_length - n, v_t, E2, E1, EDGE)
            acc2 = add_product(acc2 * fade[:, None], p, v2, EXACT, PRECISION, COMPUTE)
        k_tile += BN * k_t
        v_tile += BN * v_t
    return acc1, acc2, top, total


@jit
def attention_kernel(
    q, k, v, k_box, v_box, sinks, out, rest, lse, inverse_total, cu_q, cu_k, documents, q_t, q_h, k_t: tl.constexpr,
    k_h, v_t: tl.constexpr, v_h, o_t, o_h, lse_h, window, group, BOXES: tl.constexpr, SUMS: tl.constexpr,
    REST: tl.constexpr, INNER: tl.constexpr, CAP: tl.constexpr, C: tl.constexpr, C_LOW: tl.constexpr,
    EXACT: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, E1: tl.constexpr, E2: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program makes BM rows of one head of one document."""
    head = tl.program_id(1)
    document, q_start, q_length, m0 = tile_of(cu_q, documents, BM)
    k_start = tl.load(cu_k + document).to(tl.int64)
    k_length = (tl.load(cu_k + document + 1) - k_start).to(tl.int32)
    offset = k_length - q_length
    rows = m0 + tl.arange(0, BM)
    q += q_start * q_t + head.to(tl.int64) * q_h
    kv_head = head // group
    k += k_start * k_t + kv_head.to(tl.int64) * k_h
    v += k_start * v_t + kv_head.to(tl.int64) * v_h
    q1 = load_rows(q, rows, q_length, q_t, D1, 0, True)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(q, rows, q_length, q_t, D2, D1, True)
    acc1 = tl.zeros([BM, E1], COMPUTE)
    acc2 = acc1
    if E2 > 0:
        acc2 = tl.zeros([BM, E2], COMPUTE)
    top = tl.full([BM], float("-inf"), COMPUTE)
    total = tl.zeros([BM] if SUMS == 1 else [BM, SUMS], COMPUTE)
    if SINKS:  # a key that everyone sees and that carries no value
        top = tl.zeros([BM], COMPUTE) + tl.load(sinks + head).to(COMPUTE) * 1.4426950408889634
        if EXACT:
            top = top / C
        total += 1.0 / SUMS
    low, plain, plain_end, edge, high = key_bounds(m0, k_length, offset, window, BM, BN, CAUSAL, WINDOW)
    if m0 >= q_length:
        low, plain, plain_end, edge, high = 0, 0, 0, 0, 0
    if WINDOW:
        acc1, acc2, top, total = forward_tiles(
            acc1, acc2, top, total, q1, q2, k, v, k_box, v_box, kv_head, k_start, k_t, v_t, m0, low,
            tl.minimum(plain, high), k_length, offset, window, BOXES, SUMS, C, C_LOW, EXACT, INNER, CAP, D1, D2, E1, E2,
            BM, BN, True, True, CAUSAL, WINDOW, SOFTCAP, PRECISION, COMPUTE)  # fmt: skip
    acc1, acc2, top, total = forward_tiles(
        acc1, acc2, top, total, q1, q2, k, v, k_box, v_box, kv_head, k_start, k_t, v_t, m0, plain, plain_end,
        k_length, offset, window, BOXES, SUMS, C, C_LOW, EXACT, INNER, CAP, D1, D2, E1, E2, BM, BN, False, False,
        CAUSAL, WINDOW, SOFTCAP, PRECISION, COMPUTE)  # fmt: skip
    if CAUSAL:
        acc1, acc2, top, total = forward_tiles(
            acc1, acc2, top, total, q1, q2, k, v, k_box, v_box, kv_head, k_start, k_t, v_t, m0, plain_end, edge,
            k_length, offset, window, BOXES, SUMS, C, C_LOW, EXACT, INNER, CAP, D1, D2, E1, E2, BM, BN, True, False,
            CAUSAL, WINDOW, SOFTCAP, PRECISION, COMPUTE)  # fmt: skip
    acc1, acc2, top, total = forward_tiles(
        acc1, acc2, top, total, q1, q2, k, v, k_box, v_box, kv_head, k_start, k_t, v_t, m0, edge, high,
        k_length, offset, window, BOXES, SUMS, C, C_LOW, EXACT, INNER, CAP, D1, D2, E1, E2, BM, BN, True, True,
        CAUSAL, WINDOW, SOFTCAP, PRECISION, COMPUTE)  # fmt: skip
    total = total if SUMS == 1 else tl.sum(total, 1)
    seen = total > 0.0
    inverse = tl.where(seen, 1.0 / total, 0.0)
    out += q_start * o_t + head.to(tl.int64) * o_h
    rest += q_start * o_t + head.to(tl.int64) * o_h
    store_result(out, rest, rows, q_length, o_t, acc1 * inverse[:, None], E1, 0, REST)
    if E2 > 0:
        store_result(out, rest, rows, q_length, o_t, acc2 * inverse[:, None], E2, E1, REST)
    # a row without keys gets +inf, which makes its probabilities zero in the backward pass
    at = head.to(tl.int64) * lse_h + q_start + rows
    if EXACT:  # the sum would round away what its parts know
        tl.store(lse + at, tl.where(seen, top, float("inf")), mask=rows < q_length)
        tl.store(inverse_total + at, inverse, mask=rows < q_length)
    else:
        row_lse = tl.where(seen, top + tl.log2(total), float("inf"))
        tl.store(lse + at, row_lse, mask=rows < q_length)


@jit
def delta_part(out, rest, dout, rows, left, o_t, do_t, WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
               COMPUTE: tl.constexpr):  # fmt: skip
    """sum(dout * out) over WIDTH columns."""
    o = load_rows(out, rows, left, o_t, WIDTH, FIRST, True).to(COMPUTE)
    if REST:
        o += load_rows(rest, rows, left, o_t, WIDTH, FIRST, True).to(COMPUTE)
    return tl.sum(o * load_rows(dout, rows, left, do_t, WIDTH, FIRST, True).to(COMPUTE), 1)


@jit
def delta_kernel(out, rest, dout, delta, tokens, o_t, o_h, do_t, do_h, delta_h, E1: tl.constexpr, E2: tl.constexpr,
                 REST: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """delta = sum(dout * out) per row: what the softmax's own derivative subtracts."""
    head = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    rows = tl.arange(0, BLOCK)
    left = tokens - start
    out += start * o_t + head * o_h
    rest += start * o_t + head * o_h
    dout += start * do_t + head * do_h
    total = delta_part(out, rest, dout, rows, left, o_t, do_t, E1, 0, REST, COMPUTE)
    if E2 > 0:
        total += delta_part(out, rest, dout, rows, left, o_t, do_t, E2, E1, REST, COMPUTE)
    tl.store(delta + head * delta_h + start + rows, total, mask=rows < left)


@jit
def zero_slack_kernel(out, cu, documents, tokens, row_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                      COLUMNS: tl.constexpr):  # fmt: skip
    """Writes zeros to the rows after the last document; `out` is (tokens, WIDTH) with dense rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slack = (rows >= tl.load(cu + documents)) & (rows < tokens)
    for first in range(0, WIDTH, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        at = rows[:, None] * row_stride + columns[None, :]
        zeros = tl.zeros([BLOCK, COLUMNS], out.dtype.element_ty)
        tl.store(out + at, zeros, mask=slack[:, None] & (columns < WIDTH)[None, :])
