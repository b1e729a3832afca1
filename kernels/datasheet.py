"""What each architecture's compiler made of each shipped configuration, without owning the card.

`build_datasheet` compiles ahead of time and measures, `problems` judges, `verify_kernels` does both against the golden
file, `markdown` writes docs/kernels.md. Run as `python -m shipyard.kernels.datasheet` it prints JSON; that is how a
second Triton version, in a directory of its own, is asked (`PYTHONPATH=DIR`).
"""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import attention, decode, linear_cross_entropy, rms_norm, rope, swiglu
from .attention_backward_tiles import key_value_kernel, query_kernel
from .attention_tiles import attention_kernel
from .jit import exponent, next_power_of_2, tl
from .machine_code import read_amd, read_nvidia

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
SHARED_LIMIT_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx950": 160}
MATRIX_FLOPS_A_CLOCK = {"sm_80": 2048, "sm_89": 1024, "sm_90": 4096, "sm_100": 8192, "sm_120": 1024, "gfx942": 2048,
                        "gfx950": 4096}  # fmt: skip
EXP2_A_CLOCK = 16  # per SM or CU
MATRIX_OPCODE = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "sm_120": "HMMA"}
WIDTHS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
ATTENTION = {"forward": attention_kernel, "keys": key_value_kernel, "queries": query_kernel}
LOOPS = {"forward": ("plain", "diagonal", "edge"), "keys": ("diagonal", "plain", "edge"),
         "queries": ("plain", "diagonal", "edge")}  # fmt: skip
REFERENCE = {"sm_80": {"plain": 883}, "sm_90": {"plain": 477, "diagonal": 571}}  # FlashAttention-2 and 4, width 128
GOLDEN = Path(__file__).with_name("hot_loops.json")
GOLDEN_TOLERANCE = 0.02


@dataclass(frozen=True)
class Sheet:
    """One compiled configuration. Loops map a name to instructions a warp; `spills` to LDL/STL inside it."""

    name: str
    architecture: str
    triton: str
    tile: tuple[int, ...]
    registers: int
    stack_bytes: int
    shared_bytes: int
    blocks_per_sm: int
    wide_access: float
    matrix: tuple[str, ...]
    loops: dict[str, int]
    spills: dict[str, int]
    roofline: float  # model, unmeasured

    @property
    def key(self) -> str:
        return f"{self.architecture}/{self.name}"


def compile_kernel(kernel: Any, arch: str, constants: dict[str, Any], types: dict[str, str], warps: int, stages: int):
    """Triton's compiled kernel for an architecture name; `types` holds what is neither constant nor i32."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    # what the JIT would find: torch allocations are 256-byte aligned, strides and widths multiples of 16
    multiples = ("_t", "_h", "_b", "count", "stride", "vocabulary")
    aligned = [n for n in names if signature[n].startswith("*") or n.endswith(multiples)]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned if n not in constants and n != "lse_h"}
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch[3:]), 32)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # 3.10 turns it off
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(source, target=target, options=dict(num_warps=warps, num_stages=stages))


def attention_sheet(arch: str, part: str, width: int, value_width: int, dtype: torch.dtype = torch.bfloat16) -> Sheet:
    """Compiles one pass of causal attention as shipped for this architecture and width."""
    tile = attention.attention_tile(arch, part, width, value_width, dtype)
    (d1, d2), (e1, e2) = (attention.width_parts(w, dtype) for w in (width, value_width))
    kind = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    constants = dict(
        D1=d1, D2=d2, E1=e1, E2=e2, BM=tile.queries, BN=tile.keys, CAUSAL=True, WINDOW=False, SOFTCAP=False,
        SINKS=False, PRECISION="ieee", COMPUTE=tl.float32, C=width**-0.5 * attention.LOG2_E, C_LOW=0.0,
        EXACT=dtype == torch.float32, INNER=0.0, CAP=0.0, SCALE=width**-0.5, q_t=8 * width, k_t=8 * width,
        v_t=8 * value_width, do_t=8 * value_width,
    )  # fmt: skip
    kernel = ATTENTION[part]
    strides = {"q_t", "k_t", "v_t", "do_t"} & ({"k_t", "v_t"} if part == "forward" else set(constants))
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names and (n.isupper() or n in strides)}
    constants |= {n: v for n, v in dict(D1=d1, D2=d2, E1=e1, E2=e2).items()}
    floats = ("sinks", "lse", "inverse_total", "delta")
    types = {n: kind for n in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")}
    types |= {n: "*fp32" for n in floats} | {"cu_q": "*i32", "cu_k": "*i32"}
    compiled = compile_kernel(kernel, arch, constants, types, tile.warps, tile.stages)
    name = f"attention {part} {width}/{value_width} {str(dtype).removeprefix('torch.')}"
    return _sheet(name, arch, tuple(tile), compiled, tile.warps, LOOPS[part], tile, part, width, value_width)


def _sheet(name, arch, shape, compiled, warps, loop_names=(), tile=None, part="", width=0, value_width=0) -> Sheet:
    amd = arch.startswith("gfx")
    code = read_amd(compiled.asm["amdgcn"]) if amd else read_nvidia(compiled.asm["cubin"])
    named = dict(zip(loop_names, code.loops, strict=False)) if len(code.loops) == len(loop_names) else {}
    if not named:
        named = {f"loop {i}": loop for i, loop in enumerate(code.loops)}
    shared = compiled.metadata.shared
    threads = warps * (64 if amd else 32)
    fit = [65536 * (2 if amd else 1) // max(code.registers * threads, 1), 2048 // threads]
    fit += [SHARED_LIMIT_KIB[arch] * 1024 // shared] if shared else []
    roofline = 0.0
    if tile is not None and "plain" in named:
        roofline = _roofline(arch, named["plain"].instructions, tile, part, width, value_width)
    return Sheet(
        name, arch, triton.__version__, shape, code.registers, code.stack_bytes, shared, min(fit),
        round(code.wide_access, 3), code.matrix, {n: loop.instructions for n, loop in named.items()},
        {n: loop.spills for n, loop in named.items()}, round(roofline, 3),
    )  # fmt: skip


def _roofline(arch: str, instructions: int, tile: attention.Tile, part: str, width: int, value_width: int) -> float:
    """Matrix clocks over the longest of matrix, exp2 and issue clocks of one tile, perfectly overlapped. A model."""
    scores = tile.queries * tile.keys
    products = {"forward": width + value_width, "keys": 2 * (width + value_width), "queries": 2 * width + value_width}
    matrix = 2 * scores * products[part] / MATRIX_FLOPS_A_CLOCK[arch]
    return matrix / max(matrix, scores / EXP2_A_CLOCK, instructions * tile.warps / 4)


def small_kernels() -> dict[str, tuple[Any, dict[str, Any], dict[str, str], int]]:
    """The kernels that have one configuration, at Llama 3 8B's widths: kernel, constants, types, warps."""
    fp32, width = tl.float32, 4096
    rope_types = {n: "*bf16" for n in ("q", "k", "out_q", "out_k")} | {"cos": "*fp32", "sin": "*fp32", "sign": "fp32"}
    base = exponent(torch.bfloat16)
    norm = dict(WIDTH=width, BLOCK=next_power_of_2(width), COMPUTE=fp32)
    norm_types = {n: "*bf16" for n in ("x", "residual", "weight", "y", "s_out", "dy", "ds", "s_in", "dx")}
    norm_types |= {"rstd": "*fp32", "dw": "*fp32", "eps": "fp32"}
    head = dict(
        WIDTH=width, CAP=1.0, CAP_C=0.0, CAP_C_LOW=0.0, SOFTCAP=False, BT=64, BV=64, BD=64, PRECISION="ieee", **base
    )
    head_types = {"x": "*bf16", "weight": "*bf16", "grad": "*bf16", "ids": "*i64"}
    head_types |= {n: "*fp32" for n in ("picked", "lse", "lost", "hit", "soft")}
    page = dict(
        GROUP=4, GROUP_TILE=16, HEADS=32, GROUPS=8, WIDTH=128, SLOTS=16, SPLIT=256, BN=64,
        **exponent(torch.bfloat16, 128**-0.5),
    )  # fmt: skip
    page_types = {n: "*bf16" for n in ("q", "k", "v")} | {"page_table": "*i32", "lengths": "*i32"}
    page_types |= {n: "*fp32" for n in ("parts", "tops", "totals")}
    rotary = dict(
        HEADS=32, WIDTH=128, PAIRS=64, PAIRS_BLOCK=64, REST_BLOCK=1, BLOCK=16, INTERLEAVED=False, COMPUTE=fp32
    )
    gate = {n: "*bf16" for n in ("gate", "up", "out", "grad", "dgate", "dup")}
    one = dict(BLOCK=swiglu.BLOCK, **base)
    warps = rms_norm.norm_warps(width)
    return {
        "rope": (rope.rope_kernel, rotary, rope_types, 4),
        "rms_norm": (rms_norm.rms_norm_kernel, norm | dict(RESIDUAL=True), norm_types, warps),
        "rms_norm backward": (
            rms_norm.rms_norm_backward_kernel, norm | dict(RESIDUAL=True, ROWS=rms_norm.ROWS_PER_PARTIAL),
            norm_types, warps
        ),
        "swiglu": (swiglu.swiglu_kernel, one, gate, 4),
        "swiglu backward": (swiglu.swiglu_backward_kernel, one, gate, 4),
        "linear_cross_entropy": (linear_cross_entropy.log_prob_kernel, head, head_types, 4),
        "linear_cross_entropy backward": (linear_cross_entropy.logit_gradient_kernel, head, head_types, 4),
        "decode": (decode.decode_kernel, page, page_types, 4),
    }  # fmt: skip


def small_sheet(arch: str, name: str) -> Sheet:
    """Compiles one of `small_kernels`."""
    kernel, constants, types, warps = small_kernels()[name]
    stages = 1 if arch.startswith("gfx") else 2
    return _sheet(name, arch, (), compile_kernel(kernel, arch, constants, types, warps, stages), warps)


def build_datasheet(
    architectures=ARCHITECTURES, widths=WIDTHS, small: bool = True, say=lambda line: None
) -> list[Sheet]:
    """Compiles every shipped configuration; minutes for all of them. `say` hears one line per kernel."""
    sheets = []
    for arch in architectures:
        for width, value_width in widths:
            for part in ATTENTION:
                sheets.append(attention_sheet(arch, part, width, value_width))
                say(f"{sheets[-1].key} {sheets[-1].loops} {sheets[-1].spills}")
        for name in small_kernels() if small else ():
            sheets.append(small_sheet(arch, name))
            say(f"{sheets[-1].key} {sheets[-1].loops}")
    return sheets


def problems(sheet: Sheet) -> list[str]:
    """What breaks a law of the datasheet: shared memory, spills in hot loops, narrow accesses,
    no matrix instruction."""
    found = []
    limit = SHARED_LIMIT_KIB[sheet.architecture] * 1024
    if sheet.shared_bytes > limit:
        found.append(f"{sheet.key}: {sheet.shared_bytes} bytes of shared memory, the card has {limit}")
    for loop, spills in sheet.spills.items():
        if spills and loop != "edge":  # the last tile of a row; it runs once
            found.append(f"{sheet.key}: {spills} spills in the {loop} loop")
    if sheet.wide_access < 0.3 and not sheet.architecture.startswith("gfx"):
        found.append(f"{sheet.key}: {sheet.wide_access:.0%} of the global accesses are 128 bits wide")
    needs_matrix = sheet.name.startswith(("attention", "linear", "decode"))
    opcode = MATRIX_OPCODE.get(sheet.architecture, "v_mfma")
    small_tile = sheet.name == "decode"  # 16 rows: below a warp group's 64, so Hopper and Blackwell use HMMA
    if needs_matrix and not small_tile and not any(op.startswith(opcode) for op in sheet.matrix):
        found.append(f"{sheet.key}: no {opcode} among {sheet.matrix or 'no matrix instructions'}")
    return found


def against_golden(sheets: list[Sheet], golden: dict[str, dict[str, int]]) -> list[str]:
    """Hot loops whose length left the golden file's by more than 2 %, or that it does not know."""
    found = []
    for sheet in sheets:
        want = golden.get(f"{sheet.triton}/{sheet.key}")
        if want is None:
            found.append(f"{sheet.key}: not in {GOLDEN.name} for Triton {sheet.triton}")
            continue
        for loop, count in sheet.loops.items():
            if abs(count - want.get(loop, 0)) > GOLDEN_TOLERANCE * want.get(loop, 0):
                found.append(f"{sheet.key}: {loop} loop has {count} instructions, golden {want.get(loop)}")
    return found


def verify_kernels(architectures=ARCHITECTURES, widths=((128, 128),), say=lambda line: None) -> list[str]:
    """Compiles and judges; the answer is a list of problems, empty when all is well."""
    sheets = build_datasheet(architectures, widths, say=say)
    golden = json.loads(GOLDEN.read_text())["loops"]
    return [line for sheet in sheets for line in problems(sheet)] + against_golden(sheets, golden)


def datasheet_of(triton_directory: Path, architectures, widths=((128, 128),), small: bool = False) -> list[Sheet]:
    """The same sheets from another Triton, installed with `pip install --target DIR`, in a process of its own."""
    environment = dict(os.environ, PYTHONPATH=str(triton_directory))
    environment.pop("TRITON_INTERPRET", None)
    request = json.dumps({"architectures": list(architectures), "widths": list(widths), "small": small})
    command = [sys.executable, "-m", "shipyard.kernels.datasheet", request]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling with the Triton in {triton_directory} failed: {done.stderr[-2000:]}")
    return [sheet_from(row) for row in json.loads(done.stdout.splitlines()[-1])]


def sheet_from(row: dict[str, Any]) -> Sheet:
    """Back from JSON."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    return Sheet(**values)


if __name__ == "__main__":
    wish = json.loads(sys.argv[1])
    print(json.dumps([asdict(s) for s in build_datasheet(wish["architectures"], wish["widths"], wish["small"])]))
