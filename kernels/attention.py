"""Flash attention over packed documents, forward and backward, beside its plain PyTorch reference.

Shape suffixes: T query tokens of all documents, S key tokens, H query heads, G key/value heads (H a multiple of G),
D width of q and k, E width of v. Documents follow one another along T; `cu_seqlens` holds their N + 1 borders.
"""

import math
import struct
from typing import Any, NamedTuple

import torch

from .attention_backward_tiles import key_value_kernel, query_kernel
from .attention_exact_tiles import exact_attention_kernel
from .attention_tiles import attention_kernel, delta_kernel, zero_slack_kernel
from .jit import NEWER, architecture, box_of, cdiv, compute_type, fits_box, is_exact, use_triton, wide_type

LOG2_E = 1.0 / math.log(2.0)
WHOLE = {width: (width, 0) for width in (16, 32, 64, 128, 256)}
WIDTHS = WHOLE | {80: (64, 16), 96: (64, 32), 192: (128, 64)}  # head width -> the two parts of a tile

BOXED_SUMS = 8  # columns that four threads of a tensor core's tile hold side by side


def width_parts(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """The two parts of a tile; in fp32 and fp64 always two, whose products round less than one long chain of sums."""
    halves = is_exact(dtype) and WIDTHS[width][1] == 0 and width > 16
    return (width // 2, width // 2) if halves else WIDTHS[width]


class Tile(NamedTuple):
    """A launch: query rows and key rows of one tile, warps, and software-pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


class Features(NamedTuple):
    """Everything about a call but its tensors. `window` counts the query itself: 1 sees only the own key."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float


def attention_tile(arch: str, part: str, width: int, value_width: int, dtype: torch.dtype) -> Tile:
    """The configuration, a plain function of the architecture, the pass (forward, keys, queries), widths and dtype; on
    sm_90 the fastest tiles spill under newer compilers, which get slower ones."""
    wide = max(width, value_width)
    if dtype == torch.float64:
        return Tile(16, 16, 4, 1)
    if dtype == torch.float32:
        return _exact_tile(arch, part, wide)
    tiles = {"forward": _forward_tile, "keys": _keys_tile, "queries": _queries_tile}
    return tiles[part](arch, wide)


def key_boxes(arch: str, width: int, value_width: int, dtype: torch.dtype) -> bool:
    """Whether the forward pass has Hopper's copy engine (TMA) bring keys and values, and adds up each row in as many
    parts as its threads hold: 6 to 7 % fewer instructions at width 128. At 64 its own cost more than they spare, at 256
    they spill under one compiler or the other."""
    return arch == "sm_90" and width == value_width == 128 and not is_exact(dtype)


def _exact_tile(arch: str, part: str, wide: int) -> Tile:
    """fp32 runs on fused multiply-adds: a thread holds whole rows of both factors, so the width bounds the tile.

    dQ holds q, dout and dQ beside them: on NVIDIA its keys come through shared memory (two stages), not registers. On
    AMD four warps have twice the registers of eight.
    """
    if arch.startswith("gfx"):
        if part == "forward":
            return Tile(32, 32, 4, 1)
        if part == "keys":
            return Tile(16, 16 if wide == 256 else 32, 4, 1)
        return Tile(32 if wide <= 80 else 16, 32 if wide <= 128 else 16, 4, 1)
    if part == "queries":
        return Tile(16, 16, 8, 2) if wide >= 192 else Tile(32, 32, 8, 2)
    if part == "keys" and wide >= 128:
        return Tile(16, 16, 8, 1 if NEWER and (arch, wide) == ("sm_90", 128) else 2)
    if part == "keys" and wide in (80, 96) and arch != "sm_80":
        narrow = (arch, wide) == ("sm_120", 96) or (NEWER and (arch, wide) == ("sm_89", 80))
        return Tile(16 if narrow else 32, 32, 8, 2)
    if part == "keys":
        return Tile(32, 16 if arch == "sm_120" or (NEWER and wide <= 64) else 32, 8, 1)
    if wide == 256:
        return Tile(16, 16, 8, 1)
    return Tile(16 if arch in ("sm_89", "sm_120") and wide == 96 else 32, 32, 8, 1)


def keys_passes(arch: str, width: int, value_width: int, dtype: torch.dtype) -> dict[str, dict[str, bool]]:
    """The launches that make dK and dV by their names, and which of the two each makes. In fp32 at width 256 both would
    fill an NVIDIA card's registers: a launch each, for a quarter more products."""
    if is_exact(dtype) and max(width, value_width) == 256 and not arch.startswith("gfx"):
        return {"keys": dict(KEYS=True, VALUES=False), "values": dict(KEYS=False, VALUES=True)}
    return {"keys": dict(KEYS=True, VALUES=True)}


def _forward_tile(arch: str, wide: int) -> Tile:
    """Each is the shortest hot loop that neither spills nor passes the card's shared memory, features on and off; on
    sm_90 it is the fastest of those, measured on an H200."""
    if arch.startswith("gfx"):
        return Tile(128, 64, 4, 1) if wide <= 128 else Tile(64, 32, 4, 1)
    if arch == "sm_90":
        keys = 128 if 64 < wide <= 128 else 64
        return Tile(128, keys, 8, {128: 2, 256: 1 if NEWER else 2}.get(wide, 3))
    if arch == "sm_100":
        return Tile(128, 32 if wide == 256 else 128 if wide <= 64 else 64, 8, 2)
    if wide > 128:
        return Tile(64, 32, 4, 2) if wide < 256 or arch == "sm_80" else Tile(64, 64, 8, 1)
    if arch == "sm_80":
        return Tile(128, 128 if wide == 128 else 64, 4 if wide <= 64 else 8, 2)
    if arch == "sm_89":
        return {64: Tile(64, 128, 4, 2), 128: Tile(128, 64, 8, 2)}.get(wide, Tile(64, 64, 4, 2))
    return {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 1)}.get(wide, Tile(64, 64, 4, 2))


def _keys_tile(arch: str, wide: int) -> Tile:
    if arch.startswith("gfx"):
        return Tile(32, 64 if wide <= 128 else 32, 4, 1)
    if arch == "sm_90":
        if wide == 256:  # dK and dV of 64 keys fill the registers: HMMA there
            return Tile(64, 32, 8, 2)
        if NEWER and 64 < wide <= 128:
            return Tile(32, 128, 8, 2)
        return Tile(64 if wide <= 64 and not NEWER else 32, 64, 4, 3) if wide <= 128 else Tile(32, 64, 8, 2)
    if wide <= 64:
        tiles = {"sm_80": Tile(64, 64, 4, 2), "sm_89": Tile(64, 128, 8, 2), "sm_100": Tile(32, 128, 4, 2)}
        return tiles.get(arch, Tile(32, 128, 8, 2))
    if arch == "sm_100":
        if wide == 256:  # dK and dV of 64 keys fill the tensor memory: HMMA there
            return Tile(32, 32, 8, 1)
        return Tile(32, 128, 8, 2) if wide <= 128 else Tile(32, 64, 8, 1)
    if wide in (80, 96):  # two-part tiles: eight warps spill
        return Tile(16, 32, 4, 2) if arch == "sm_120" and wide == 96 else Tile(32, 64, 4, 2)
    return {128: Tile(64, 64, 8, 1), 192: Tile(64, 32, 8, 1)}.get(wide, Tile(32, 32, 8, 1))


def _queries_tile(arch: str, wide: int) -> Tile:
    if arch.startswith("gfx"):
        return Tile(64, 32, 4, 1)
    if arch == "sm_90":
        if wide < 128:
            return Tile(64, 64, 4, 3)
        return {128: Tile(128, 64, 8, 3), 192: Tile(128, 64, 8, 2)}.get(wide, Tile(128, 32, 8, 2))
    if arch == "sm_100" and wide <= 128:
        return Tile(128, 64, 8, 2)
    if arch == "sm_120" and wide >= 96:
        return {96: Tile(64, 32, 4, 2), 128: Tile(64, 64, 8, 1)}.get(wide, Tile(32, 32, 4, 1))
    if wide == 256:
        return {"sm_80": Tile(64, 32, 8, 1), "sm_89": Tile(32, 32, 4, 1)}.get(arch, Tile(64, 32, 4, 1))
    return Tile(64, 64 if wide <= 128 else 32, 4, 1)


def attention_reference(q_THD, k_SGD, v_SGE, cu_seqlens=None, *, cu_seqlens_k=None, causal=True, window=None,
                        softcap=None, sinks_H=None, scale=None) -> torch.Tensor:  # fmt: skip
    """The plain PyTorch twin of `flash_attention`: forms every score, softmax in fp32 as transformers' eager code."""
    tokens, heads, width = q_THD.shape
    scale = width**-0.5 if scale is None else scale
    borders_q = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    borders_k = cu_seqlens_k.tolist() if cu_seqlens_k is not None else borders_q
    if cu_seqlens is None:
        borders_k = [0, k_SGD.shape[0]]
    group = heads // k_SGD.shape[1]
    pieces = []
    for document in range(len(borders_q) - 1):
        rows, keys = slice(*borders_q[document : document + 2]), slice(*borders_k[document : document + 2])
        q_HTD = q_THD[rows].transpose(0, 1)
        k_HSD = k_SGD[keys].transpose(0, 1).repeat_interleave(group, 0)
        v_HSE = v_SGE[keys].transpose(0, 1).repeat_interleave(group, 0)
        pieces.append(_reference_document(q_HTD, k_HSD, v_HSE, causal, window, softcap, sinks_H, scale))
    slack = q_THD.new_zeros(tokens - borders_q[-1], heads, v_SGE.shape[2])
    return torch.cat([*pieces, slack])


def _reference_document(q_HTD, k_HSD, v_HSE, causal, window, softcap, sinks_H, scale) -> torch.Tensor:
    s_HTS = torch.matmul(q_HTD, k_HSD.transpose(1, 2)) * scale
    if softcap is not None:
        s_HTS = softcap * torch.tanh(s_HTS / softcap)
    queries, keys = s_HTS.shape[1:]
    row = torch.arange(queries, device=s_HTS.device)[:, None] + keys - queries
    column = torch.arange(keys, device=s_HTS.device)[None]
    keep_TS = torch.ones(queries, keys, dtype=torch.bool, device=s_HTS.device)
    if causal:
        keep_TS = column <= row
    if window is not None:
        keep_TS = keep_TS & (column > row - window)
    some_T1 = keep_TS.any(1, keepdim=True)
    s_HTS = s_HTS.masked_fill(~keep_TS & some_T1, float("-inf")).masked_fill(~some_T1, 0.0)
    if sinks_H is not None:
        sink_HT1 = sinks_H[:, None, None].expand(-1, queries, 1).to(s_HTS.dtype)
        s_HTS = torch.cat([s_HTS, sink_HT1], 2)
    s_HTS = s_HTS.to(wide_type(s_HTS.dtype))
    p_HTS = torch.softmax(s_HTS, -1)[..., :keys].to(q_HTD.dtype) if keys else s_HTS[..., :0].to(q_HTD.dtype)
    return (torch.matmul(p_HTS, v_HSE) * some_T1).transpose(0, 1)


def flash_attention(q_THD, k_SGD, v_SGE, cu_seqlens=None, *, cu_seqlens_k=None, causal=True, window=None,
                    softcap=None, sinks_H=None, scale=None, tile=None) -> torch.Tensor:  # fmt: skip
    """softmax(q k^T scale) v within each document, (T,H,D), (S,G,D), (S,G,E) -> (T,H,E), differentiable.

    `cu_seqlens` (N+1 int32, first 0) packs documents; rows after the last border come back as zeros, as do rows that
    see no key. `cu_seqlens_k` gives the keys borders of their own, aligned at the end: a chunk of queries behind its
    cache. `window` counts keys including the query's own, `softcap` is cap * tanh(score / cap), `sinks_H` a learned
    logit per head that takes part in the softmax and carries no value. `tile` overrides the shape of the tiles (tests).
    Nothing waits for the device.
    """
    _check(q_THD, k_SGD, v_SGE, cu_seqlens, cu_seqlens_k, causal, window, softcap, sinks_H, scale)
    if not use_triton(q_THD):
        return attention_reference(
            q_THD, k_SGD, v_SGE, cu_seqlens, cu_seqlens_k=cu_seqlens_k, causal=causal, window=window, softcap=softcap,
            sinks_H=sinks_H, scale=scale,
        )  # fmt: skip
    if cu_seqlens is None:
        cu_seqlens, cu_seqlens_k = (_one_document(x.shape[0], q_THD.device) for x in (q_THD, k_SGD))
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    scale = q_THD.shape[2] ** -0.5 if scale is None else scale
    features = Features(causal, window, softcap, scale)
    return _Attention.apply(q_THD, k_SGD, v_SGE, sinks_H, cu_seqlens, cu_seqlens_k, features, tile)


def _one_document(length: int, device: torch.device) -> torch.Tensor:
    """Its borders, made on the device itself: copying them there would wait for it."""
    return torch.arange(2, dtype=torch.int32, device=device) * length


def places(rows: int, documents: int, block: int) -> int:
    """Programs that hold every tile of `documents` documents; `tile_of` finds a program's own."""
    return (rows + documents * (block - 1)) // block


def _check(q, k, v, cu_q, cu_k, causal, window, softcap, sinks, scale) -> None:
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3:
        raise ValueError("flash_attention: q, k and v must be (tokens, heads, width)")
    if k.shape[:2] != v.shape[:2] or k.shape[2] != q.shape[2]:
        raise ValueError(f"flash_attention: k {tuple(k.shape)} must match v {tuple(v.shape)} and q {tuple(q.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"flash_attention: {q.shape[1]} query heads must be a multiple of {k.shape[1]} key heads")
    if use_triton(q) and (q.shape[2] not in WIDTHS or v.shape[2] not in WIDTHS):
        raise ValueError(f"flash_attention: head widths {q.shape[2]}/{v.shape[2]} must be of {sorted(WIDTHS)}")
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"flash_attention: dtypes {q.dtype}, {k.dtype}, {v.dtype} must be one")
    if cu_q is None and cu_k is None and q.shape[0] != k.shape[0] and not causal:
        return
    if cu_k is None and cu_q is not None and q.shape[0] != k.shape[0]:
        raise ValueError(f"flash_attention: {q.shape[0]} queries but {k.shape[0]} keys; give cu_seqlens_k")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"flash_attention: window {window}, must be at least 1, with causal=True")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"flash_attention: softcap {softcap}, must be above 0; None is off")
    if scale is not None and scale <= 0:
        raise ValueError(f"flash_attention: scale {scale}, must be above 0")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"flash_attention: sinks {tuple(sinks.shape)}, must be one per query head ({q.shape[1]},)")


def _switches(q: torch.Tensor, v: torch.Tensor, features: Features) -> dict[str, Any]:
    """The compile-time arguments; C takes a score to base 2, INNER and CAP are the softcap."""
    (d1, d2), (e1, e2) = (width_parts(x.shape[2], q.dtype) for x in (q, v))
    cap, exact = features.softcap, is_exact(q.dtype)
    c = features.scale * LOG2_E if cap is None else LOG2_E
    return dict(
        C=c, C_LOW=c - struct.unpack("f", struct.pack("f", c))[0] if q.dtype == torch.float32 else 0.0, EXACT=exact,
        INNER=0.0 if cap is None else features.scale / cap, CAP=cap or 0.0, D1=d1, D2=d2, E1=e1, E2=e2,
        CAUSAL=features.causal, WINDOW=features.window is not None, SOFTCAP=cap is not None, PRECISION="ieee",
        COMPUTE=compute_type(q.dtype),
    )  # fmt: skip


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, cu_q, cu_k, features: Features, tile: Tile | None):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        tokens, heads, width = q.shape
        out = torch.empty(tokens, heads, v.shape[2], dtype=q.dtype, device=q.device)
        lse = torch.empty(heads, tokens, dtype=wide_type(q.dtype), device=q.device)  # EXACT: the row maximum
        inverse = torch.empty_like(lse) if is_exact(q.dtype) else lse
        arch = architecture(q.device)
        shape = tile or attention_tile(arch, "forward", width, v.shape[2], q.dtype)
        boxed = key_boxes(arch, width, v.shape[2], q.dtype)
        if boxed:
            k, v = (x if fits_box(x) else x.clone(memory_format=torch.contiguous_format) for x in (k, v))
        # the backward pass takes delta from the output: rounded to fp16 it would be off by more than eager code is
        keeps_rest = q.dtype == torch.float16 and any(ctx.needs_input_grad)
        rest = torch.empty_like(out) if keeps_rest else None
        documents = cu_q.numel() - 1
        if tokens and documents > 0 and q.dtype == torch.float32:
            switches = _switches(q, v, features)
            for name in ("EXACT", "PRECISION"):  # of the general kernel
                del switches[name]
            exact_attention_kernel[(places(tokens, documents, shape.queries), heads)](
                q, k, v, lse if sinks is None else sinks, out, lse, inverse, cu_q, cu_k, documents, *q.stride()[:2],
                *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], tokens, features.window or 0,
                heads // k.shape[1], BM=shape.queries, BN=shape.keys, SINKS=sinks is not None, num_warps=shape.warps,
                num_stages=shape.stages, **switches,
            )  # fmt: skip
        elif tokens and documents > 0:
            engine = boxed and k.shape[0] > 0  # it knows no empty tensor
            k_box, v_box = (box_of(x, shape.keys) if engine else x for x in (k, v))
            attention_kernel[(places(tokens, documents, shape.queries), heads)](
                q, k, v, k_box, v_box, lse if sinks is None else sinks, out, out if rest is None else rest, lse,
                inverse, cu_q, cu_k, documents, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2],
                tokens, features.window or 0, heads // k.shape[1], BOXES=engine, SUMS=BOXED_SUMS if boxed else 1,
                REST=keeps_rest, BM=shape.queries, BN=shape.keys, SINKS=sinks is not None, num_warps=shape.warps,
                num_stages=shape.stages, **_switches(q, v, features),
            )  # fmt: skip
        _zero_slack(out, cu_q)
        if rest is not None:
            _zero_slack(rest, cu_q)
        ctx.save_for_backward(q, k, v, sinks, cu_q, cu_k, out, rest, lse, inverse)
        ctx.features, ctx.tile = features, tile
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, sinks, cu_q, cu_k, out, rest, lse, inverse = ctx.saved_tensors
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        features: Features = ctx.features
        switches = _switches(q, v, features)
        delta = torch.empty_like(lse) if switches["EXACT"] else _delta(out, rest, dout, lse)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        shared = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
        numbers = (lse.shape[1], features.window or 0, q.shape[1] // k.shape[1])
        arch, documents = architecture(q.device), cu_q.numel() - 1
        shape = ctx.tile or attention_tile(arch, "queries", q.shape[2], v.shape[2], q.dtype)
        # first, since in fp32 it makes delta for the other
        if q.shape[0] and documents > 0:
            query_kernel[(places(q.shape[0], documents, shape.queries), q.shape[1])](
                q, k, v, dout, lse, inverse, delta, dq, cu_q, cu_k, documents, *shared, *dq.stride()[:2], *numbers,
                BM=shape.queries, BN=shape.keys, num_warps=shape.warps, num_stages=shape.stages, SCALE=features.scale,
                **switches,
            )  # fmt: skip
        shape = ctx.tile or attention_tile(arch, "keys", q.shape[2], v.shape[2], q.dtype)
        passes = keys_passes(arch, q.shape[2], v.shape[2], q.dtype) if k.shape[0] and documents > 0 else {}
        for makes in passes.values():
            key_value_kernel[(places(k.shape[0], documents, shape.keys), k.shape[1])](
                q, k, v, dout, lse, inverse, delta, dk, dv, cu_q, cu_k, documents, *shared, *dk.stride()[:2],
                *dv.stride()[:2], *numbers, BM=shape.queries, BN=shape.keys, num_warps=shape.warps,
                num_stages=shape.stages, SCALE=features.scale, **makes, **switches,
            )  # fmt: skip
        _zero_slack(dq, cu_q)
        _zero_slack(dk, cu_k)
        _zero_slack(dv, cu_k)
        return dq, dk, dv, _sinks_gradient(sinks, lse, inverse, delta, cu_q, switches), None, None, None, None


def _delta(out: torch.Tensor, rest: torch.Tensor | None, dout: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    delta = torch.empty_like(lse)
    tokens, heads, width = out.shape
    e1, e2 = WIDTHS[width]
    if tokens:
        delta_kernel[(cdiv(tokens, 64), heads)](
            out, out if rest is None else rest, dout, delta, tokens, *out.stride()[:2], *dout.stride()[:2], tokens,
            E1=e1, E2=e2, REST=rest is not None, BLOCK=64, num_warps=4,
            COMPUTE=compute_type(out.dtype),
        )  # fmt: skip
    return delta


def _sinks_gradient(sinks, lse_HT, inverse_HT, delta_HT, cu_q, switches):
    """d loss / d sink = -sum over rows of p(sink) * delta; slack rows have no part in it."""
    if sinks is None:
        return None
    live_T = torch.arange(lse_HT.shape[1], device=lse_HT.device) < cu_q[-1]
    if switches["EXACT"]:  # in fp64: the two terms of the exponent nearly cancel where the sink is the row's maximum
        sink_H1, lse_HT, delta_HT = sinks[:, None].double() * LOG2_E, lse_HT.double() * switches["C"], delta_HT.double()
        p_HT = torch.exp2(sink_H1 - lse_HT) * inverse_HT.double()
    else:
        p_HT = torch.exp2(sinks[:, None].to(lse_HT.dtype) * LOG2_E - lse_HT)
    return -torch.where(live_T, p_HT * delta_HT, 0.0).sum(1, dtype=torch.float64).to(sinks.dtype)


def _zero_slack(tensor: torch.Tensor, cu: torch.Tensor) -> None:
    rows, width = tensor.shape[0], tensor[0].numel() if tensor.shape[0] else 0
    if rows:
        zero_slack_kernel[(cdiv(rows, 64),)](
            tensor, cu, cu.numel() - 1, rows, width, WIDTH=width, BLOCK=64, COLUMNS=64, num_warps=4
        )
