"""Every configuration the kernels ship in: which kernel, compile-time constants, argument types, warps and stages.

It asks the same functions that a launch asks (`attention_tile`, `norm_warps`, ...), so what is compiled ahead of time
for the datasheet is what a card would run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import attention, decode, linear_cross_entropy, rms_norm, rope, swiglu
from .attention import Tile
from .attention_backward_tiles import key_value_kernel, query_kernel
from .attention_exact_tiles import exact_attention_kernel
from .attention_tiles import attention_kernel, delta_kernel, zero_slack_kernel
from .jit import exponent, next_power_of_2, tl

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
WIDTHS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
PARTS = {"forward": attention_kernel, "keys": key_value_kernel, "values": key_value_kernel, "queries": query_kernel}
KINDS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
VARIANTS = ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False), (torch.float32, False))
HEADS = 8  # key heads of the assumed layout (tokens, heads, width): strides are compile-time constants
FEATURES = " window softcap sinks"


@dataclass(frozen=True)
class Configuration:
    """One compilation. `types` holds what is neither a constant nor an i32; `loops` names the hot loops in order."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str]
    warps: int
    stages: int
    loops: tuple[str, ...] = ()
    tile: Tile | None = None
    part: str = ""
    widths: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.bfloat16


def attention_configuration(
    arch: str, part: str, widths: tuple[int, int], dtype: torch.dtype = torch.bfloat16, features: bool = False,
    tile: Tile | None = None,
) -> Configuration:  # fmt: skip
    """One pass of causal attention; `features` adds window, softcap and sinks; `tile` overrides what is shipped."""
    width, value_width = widths
    passes = attention.keys_passes(arch, width, value_width, dtype)
    tile = tile or attention.attention_tile(arch, "keys" if part in passes else part, width, value_width, dtype)
    (d1, d2), (e1, e2) = (attention.width_parts(w, dtype) for w in widths)
    exact, cap = dtype == torch.float32, 30.0 if features else 0.0
    constants = dict(
        D1=d1, D2=d2, E1=e1, E2=e2, BM=tile.queries, BN=tile.keys, CAUSAL=True, WINDOW=features, SOFTCAP=features,
        SINKS=features, REST=dtype == torch.float16, PRECISION="ieee", COMPUTE=tl.float32,
        C=width**-0.5 * attention.LOG2_E, C_LOW=0.0, EXACT=exact,
        INNER=width**-0.5 / cap if cap else 0.0, CAP=cap, SCALE=width**-0.5, k_t=HEADS * width, v_t=HEADS * value_width,
    )  # fmt: skip
    boxes = part == "forward" and attention.key_boxes(arch, width, value_width, dtype)
    constants |= passes.get(part, {})
    constants |= dict(BOXES=boxes, SUMS=attention.BOXED_SUMS if boxes else 1)
    if part != "forward":
        constants |= dict(q_t=HEADS * width, do_t=HEADS * value_width)
    kernel = exact_attention_kernel if exact and part == "forward" else PARTS[part]
    types = dict.fromkeys(("q", "k", "v", "out", "rest", "dout", "dq", "dk", "dv"), KINDS[dtype])
    box = f"tensordesc<{KINDS[dtype][1:]}[1, {tile.keys}, {width}]>" if boxes else KINDS[dtype]
    types |= dict(k_box=box, v_box=box)
    types |= dict.fromkeys(("sinks", "lse", "inverse_total", "delta"), "*fp32") | {"cu_q": "*i32", "cu_k": "*i32"}
    return Configuration(
        f"attention {part} {width}/{value_width} {str(dtype).removeprefix('torch.')}" + FEATURES * features, kernel,
        {n: v for n, v in constants.items() if n in kernel.arg_names}, types, tile.warps, tile.stages,
        _loop_names(part, exact, features), tile, part, widths, dtype,
    )  # fmt: skip


def _loop_names(part: str, exact: bool, window: bool) -> tuple[str, ...]:
    """The hot loops in the order the source has them."""
    if exact and part == "forward":
        return ("plain",)  # one for all tiles
    if part in ("keys", "values"):
        return ("diagonal", "plain", "edge")
    names = (("window",) if window else ()) + ("plain", "diagonal", "edge")
    return tuple(f"delta {n}" for n in names) + names if exact and part == "queries" else names


def other_configurations(arch: str) -> list[Configuration]:
    """The kernels that have one configuration, at Llama 3 8B's widths in bf16."""
    default = 2 if arch.startswith("gfx") else 3  # where a launch names no stages, Triton takes these
    make = lambda name, kernel, constants, types, warps=4, stages=default: Configuration(
        name, kernel, {n: v for n, v in constants.items() if n in kernel.arg_names}, types, warps, stages
    )
    return [*_attention_rest(make), *_decode(make, arch), *_elementwise(make, arch), *_linear_cross_entropy(make, arch)]


def _attention_rest(make) -> Iterator[Configuration]:
    floats = dict(COMPUTE=tl.float32)
    yield make("attention delta", delta_kernel, dict(E1=128, E2=0, REST=False, BLOCK=64) | floats,
               {"out": "*bf16", "rest": "*bf16", "dout": "*bf16", "delta": "*fp32"})  # fmt: skip
    yield make("attention zero slack", zero_slack_kernel, dict(WIDTH=4096, BLOCK=64, COLUMNS=64),
               {"out": "*bf16", "cu": "*i32"})  # fmt: skip


def _decode(make, arch: str) -> Iterator[Configuration]:
    for dtype, state, end in ((torch.bfloat16, "*fp32", ""), (torch.float32, "*fp64", " float32")):
        page = dict(HEADS=32, WIDTH=128, SPLIT=decode.SPLIT_KEYS) | decode.decode_exponent(dtype, 128**-0.5)
        types = dict.fromkeys(("q", "k", "v", "out"), KINDS[dtype]) | {"page_table": "*i32", "lengths": "*i32"}
        types |= dict.fromkeys(("parts", "tops", "totals"), state)
        split = dict(GROUP=4, GROUPS=8, SLOTS=16) | decode.decode_tile(arch, dtype, 4, 128)
        yield make("decode" + end, decode.decode_kernel, page | split, types, 4, 2)
        yield make("decode join" + end, decode.join_kernel, page | dict(TILE=decode.join_heads(128)), types, 1)


def _elementwise(make, arch: str) -> Iterator[Configuration]:
    fp32, width = tl.float32, 4096
    rotary = dict(
        HEADS=32,
        KEY_HEADS=8,
        EACH=rope.HEADS_EACH,
        WIDTH=128,
        PAIRS=64,
        PAIRS_BLOCK=64,
        REST_BLOCK=1,
        BLOCK=rope.rope_block(128),
        COMPUTE=fp32,
    )
    types = dict.fromkeys(("q", "k", "out_q", "out_k"), "*bf16") | {"cos": "*fp32", "sin": "*fp32", "sign": "fp32"}
    yield make("rope", rope.rope_kernel, rotary | dict(INTERLEAVED=False), types)
    yield make("rope interleaved", rope.rope_kernel, rotary | dict(INTERLEAVED=True), types)
    norm = dict(WIDTH=width, BLOCK=next_power_of_2(width), RESIDUAL=True, EXACT=False, COMPUTE=fp32)
    types = dict.fromkeys(("x", "residual", "weight", "y", "s_out", "dy", "ds", "s_in", "dx"), "*bf16")
    types |= {"rstd": "*fp32", "dw": "*fp32", "eps": "fp32"}
    yield make("rms_norm", rms_norm.rms_norm_kernel, norm, types, rms_norm.norm_warps(width))
    rows = dict(ROWS=rms_norm.ROWS_PER_PARTIAL)
    yield make("rms_norm backward", rms_norm.rms_norm_backward_kernel, norm | rows, types, rms_norm.norm_warps(width))
    gate = dict.fromkeys(("gate", "up", "out", "grad", "dgate", "dup"), "*bf16")
    one = dict(BLOCK=swiglu.swiglu_block(arch)) | exponent(torch.bfloat16)
    yield make("swiglu", swiglu.swiglu_kernel, one, gate)
    yield make("swiglu backward", swiglu.swiglu_backward_kernel, one, gate)


def _linear_cross_entropy(make, arch: str) -> Iterator[Configuration]:
    tile = linear_cross_entropy.logit_tile_of(arch, torch.bfloat16)
    base = exponent(torch.bfloat16)
    head = dict(WIDTH=4096, CAP=1.0, CAP_C=0.0, SOFTCAP=False, BT=tile.tokens, BV=tile.rows,
                BD=tile.width, PRECISION="ieee", SPLIT=linear_cross_entropy.SPLIT_ROWS) | base  # fmt: skip
    types = dict.fromkeys(("x", "weight", "grad"), "*bf16") | {"ids": "*i64"}
    types |= dict.fromkeys(("tops", "totals", "found", "picked", "lse", "lost", "hit", "soft"), "*fp32")
    shape = (tile.warps, tile.stages)
    yield make("linear_cross_entropy", linear_cross_entropy.log_prob_kernel, head, types, *shape)
    join = dict(BT=linear_cross_entropy.JOIN_TOKENS) | base
    yield make("linear_cross_entropy join", linear_cross_entropy.join_log_probs_kernel, join, types)
    yield make("linear_cross_entropy backward", linear_cross_entropy.logit_gradient_kernel, head, types, *shape)


def configurations(arch: str, widths=WIDTHS, variants=VARIANTS, others: bool = True) -> Iterator[Configuration]:
    """Everything shipped for one architecture."""
    for pair in widths:
        for dtype, features in variants:
            for part in ("forward", *attention.keys_passes(arch, pair[0], pair[1], dtype), "queries"):
                yield attention_configuration(arch, part, pair, dtype, features)
    if others:
        yield from other_configurations(arch)
