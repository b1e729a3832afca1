"""What each architecture's compiler made of each shipped configuration, without owning the card.

`build_datasheet` compiles ahead of time and measures, `problems` judges, `verify_kernels` does both against the golden
file, `datasheet_page.py` writes docs/kernels.md. Run as `python -m shipyard.kernels.datasheet` it prints JSON; that is
how a second Triton version, in a directory of its own, is asked: `pip install --no-deps --target DIR triton==3.9.0` and
SHIPYARD_SECOND_TRITON=DIR.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .attention import Tile
from .machine_code import Code, read_amd, read_nvidia
from .shipped import (
    ARCHITECTURES,
    VARIANTS,
    WIDTHS,
    Configuration,
    attention_configuration,
    configurations,
)

SHARED_LIMIT_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx950": 160}
TENSOR_MEMORY_COLUMNS = 512  # sm_100
THREADS_AN_SM = {"sm_89": 1536, "sm_120": 1536}  # else 2048
MATRIX_FLOPS_A_CLOCK = {"sm_80": 2048, "sm_89": 1024, "sm_90": 4096, "sm_100": 8192, "sm_120": 1024, "gfx942": 2048,
                        "gfx950": 4096}  # fmt: skip
FP32_FLOPS_A_CLOCK = {"sm_80": 128}  # else 256
EXP2_A_CLOCK = 16  # per SM or CU
MATRIX_OPCODE = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "sm_120": "HMMA"}
# dK and dV of the 64 keys that HGMMA wants would fill sm_90's registers (under Triton 3.9.0, 3 to 12 spills a loop with
# 16 queries, more with other tiles, and nearly three times the instructions a score), and sm_100's tensor memory
HMMA_SUFFICES = ("sm_90/attention keys 256/256", "sm_100/attention keys 256/256")
REFERENCE = {"sm_80": {"plain": 883}, "sm_90": {"plain": 477, "diagonal": 571}}  # FlashAttention-2 and 4, width 128
GOLDEN = Path(__file__).with_name("hot_loops.json")
GOLDEN_TOLERANCE = 0.02
SECOND_TRITON = Path(os.environ.get("SHIPYARD_SECOND_TRITON", Path(sys.prefix) / "triton-3.9.0"))


@dataclass(frozen=True)
class Sheet:
    """One compiled configuration. Loops map a name to instructions a warp; `spills` to LDL/STL inside it."""

    name: str
    architecture: str
    triton: str
    tile: tuple[int, ...]
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_columns: int
    blocks_per_sm: int
    occupancy: float
    wide_access: float
    matrix: tuple[str, ...]
    loops: dict[str, int]
    spills: dict[str, int]
    roofline: float  # model, unmeasured

    @property
    def key(self) -> str:
        return f"{self.architecture}/{self.name}"


def compile_kernel(configuration: Configuration, arch: str, aligned: bool = True):
    """Triton's compiled kernel for an architecture name; not `aligned`, it is told nothing of alignment (tests)."""
    kernel, constants = configuration.kernel, configuration.constants
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else configuration.types.get(n, "i32") for n in names}
    # what the JIT would find: torch allocations are 256-byte aligned, strides and widths multiples of 16
    multiples = ("_t", "_h", "_b", "count", "stride", "vocabulary")
    sixteens = [n for n in names if signature[n].startswith("*") or n.endswith(multiples)]
    sixteens = [n for n in sixteens if aligned and n not in constants and n not in ("lse_h", "delta_h")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in sixteens}
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch[3:]), 32)
    options = dict(num_warps=configuration.warps, num_stages=configuration.stages)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # 3.10 turns it off
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(source, target=target, options=options)


def sheet_of(configuration: Configuration, arch: str, aligned: bool = True) -> Sheet:
    """Compiles and measures one configuration."""
    compiled = compile_kernel(configuration, arch, aligned)
    amd = arch.startswith("gfx")
    code = read_amd(compiled.asm["amdgcn"]) if amd else read_nvidia(compiled.asm["cubin"])
    names = configuration.loops
    if len(code.loops) != len(names):
        names = tuple(f"loop {i}" for i in range(len(code.loops)))
    named = dict(zip(names, code.loops, strict=True))
    shared, tile = compiled.metadata.shared, configuration.tile
    blocks, occupancy = _occupancy(arch, code, configuration.warps, shared)
    plain = named.get("plain")
    return Sheet(
        configuration.name, arch, triton.__version__, tuple(tile[:2]) if tile else (), configuration.warps,
        code.registers, code.stack_bytes, shared, getattr(compiled.metadata, "tmem_size", None) or 0, blocks, occupancy,
        round(code.wide_access, 3), code.matrix, {n: loop.instructions for n, loop in named.items()},
        {n: loop.spills for n, loop in named.items()},
        round(_roofline(arch, plain.instructions, configuration), 3) if plain else 0.0,
    )  # fmt: skip


def attention_sheet(
    arch: str, part: str, width: int, value_width: int, dtype: torch.dtype = torch.bfloat16, features: bool = False,
    tile: Tile | None = None, aligned: bool = True,
) -> Sheet:  # fmt: skip
    """Compiles one pass of causal attention as shipped for this architecture and width, or with another `tile`."""
    return sheet_of(attention_configuration(arch, part, (width, value_width), dtype, features, tile), arch, aligned)


def _occupancy(arch: str, code: Code, warps: int, shared: int) -> tuple[int, float]:
    """Blocks an SM or CU holds at once, and the share of its threads that they fill. Tensor memory is not counted."""
    amd = arch.startswith("gfx")
    threads = warps * (64 if amd else 32)
    most = THREADS_AN_SM.get(arch, 2048)
    registers = (code.registers + 7) // 8 * 8  # handed out by eights
    fit = [65536 * (2 if amd else 1) // max(registers * threads, 1), most // threads]
    if shared:  # a card keeps one KiB of every block for itself
        fit.append((SHARED_LIMIT_KIB[arch] + 1) * 1024 // (shared + 1024) if not amd else
                   SHARED_LIMIT_KIB[arch] * 1024 // shared)  # fmt: skip
    return min(fit), round(min(fit) * threads / most, 3)


def _roofline(arch: str, instructions: int, configuration: Configuration) -> float:
    """Matrix clocks over the longest of matrix, exp2 and issue clocks of one tile, perfectly overlapped. A model."""
    assert configuration.tile is not None
    width, value_width = configuration.widths
    scores = configuration.tile.queries * configuration.tile.keys
    both = configuration.constants.get("VALUES") and configuration.part == "keys"
    products = {"forward": width + value_width, "keys": 2 * width + (2 if both else 1) * value_width,
                "values": width + value_width, "queries": 2 * width + value_width}  # fmt: skip
    half = configuration.dtype != torch.float32
    speed = MATRIX_FLOPS_A_CLOCK[arch] if half else FP32_FLOPS_A_CLOCK.get(arch, 256)
    matrix = 2 * scores * products[configuration.part] / speed
    return matrix / max(matrix, scores / EXP2_A_CLOCK, instructions * configuration.warps / 4)


def build_datasheet(
    architectures=ARCHITECTURES, widths=WIDTHS, variants=VARIANTS, others: bool = True, names: Sequence[str] = ("",),
    say: Callable[[str], Any] = lambda line: None,
) -> list[Sheet]:  # fmt: skip
    """Compiles every shipped configuration whose name starts with one of `names`; half an hour for all of them, seconds
    where Triton's cache has them. `say` hears one line per kernel."""
    sheets = []
    for arch in architectures:
        for configuration in configurations(arch, widths, variants, others):
            if configuration.name.startswith(tuple(names)):
                sheets.append(sheet_of(configuration, arch))
                say(f"{sheets[-1].key} {sheets[-1].loops} {problems(sheets[-1]) or ''}")
    return sheets


def problems(sheet: Sheet) -> list[str]:
    """What breaks a law of the datasheet: shared or tensor memory, spills in hot loops, narrow accesses,
    no matrix instruction."""
    found = []
    amd = sheet.architecture.startswith("gfx")
    limit = SHARED_LIMIT_KIB[sheet.architecture] * 1024
    if sheet.shared_bytes > limit:
        found.append(f"{sheet.key}: {sheet.shared_bytes} bytes of shared memory, the card has {limit}")
    if sheet.tensor_columns > TENSOR_MEMORY_COLUMNS:
        found.append(f"{sheet.key}: {sheet.tensor_columns} columns of tensor memory, the card has 512")
    for loop, spills in sheet.spills.items():
        if spills:
            found.append(f"{sheet.key}: {spills} spills in the {loop} loop")
    if sheet.wide_access < (0.2 if amd else 0.5):
        found.append(f"{sheet.key}: {sheet.wide_access:.0%} of the global bytes move in 128-bit accesses")
    opcode = MATRIX_OPCODE.get(sheet.architecture, "v_mfma")
    if sheet.key.startswith(HMMA_SUFFICES):
        opcode = "HMMA"
    if _needs_matrix(sheet.name):
        if not any(op.startswith(opcode) for op in sheet.matrix):
            found.append(f"{sheet.key}: no {opcode} among {sheet.matrix or 'no matrix instructions'}")
        if not sheet.loops:
            found.append(f"{sheet.key}: no hot loop")
    return found


def _needs_matrix(name: str) -> bool:
    """fp32 runs outside the tensor cores; decode's 16 rows are below a warp group's 64: HMMA serves them everywhere."""
    products = name.startswith(("attention forward", "attention keys", "attention queries", "linear"))
    return products and "float32" not in name and not name.endswith(" join")


def in_golden(name: str) -> bool:
    """The golden file must hold attention in bf16; fp16, fp32 and the features answer to the laws alone."""
    return name.startswith(("attention forward", "attention keys", "attention queries")) and name.endswith(" bfloat16")


def golden_of(sheets: Iterable[Sheet]) -> dict[str, dict[str, dict[str, int]]]:
    """Hot-loop lengths by Triton version and configuration: attention in bf16, and the other kernels that loop."""
    loops: dict[str, dict[str, dict[str, int]]] = {}
    for sheet in sheets:
        if in_golden(sheet.name) or (sheet.loops and not sheet.name.startswith("attention")):
            loops.setdefault(sheet.triton, {})[sheet.key] = sheet.loops
    return loops


def write_golden(golden: dict[str, dict[str, dict[str, int]]]) -> None:
    """One line a configuration, so that a change reads well."""
    versions = []
    for version, loops in sorted(golden.items()):
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(counts)}" for key, counts in sorted(loops.items()))
        versions.append(f' "{version}": {{\n{lines}\n }}')
    GOLDEN.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def read_golden() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(GOLDEN.read_text())


def against_golden(sheets: Iterable[Sheet], golden: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """Hot loops whose length left the golden file's by more than 2 %, or that it does not know."""
    found = []
    for sheet in sheets:
        want = golden.get(sheet.triton, {}).get(sheet.key)
        if want is None:
            if in_golden(sheet.name):
                found.append(f"{sheet.key}: not in {GOLDEN.name} for Triton {sheet.triton}")
            continue
        if set(want) != set(sheet.loops):
            found.append(f"{sheet.key}: hot loops {sorted(sheet.loops)}, golden {sorted(want)}")
        for loop, count in sheet.loops.items():
            if abs(count - want.get(loop, count)) > GOLDEN_TOLERANCE * want.get(loop, count):
                found.append(f"{sheet.key}: {loop} loop has {count} instructions, golden {want.get(loop)}")
    return found


def judge(sheets: list[Sheet]) -> list[str]:
    """Every broken law and every loop that left the golden file."""
    return [line for sheet in sheets for line in problems(sheet)] + against_golden(sheets, read_golden())


def verify_kernels(architectures=ARCHITECTURES, widths=((128, 128),), say=lambda line: None) -> list[str]:
    """Compiles and judges; the answer is a list of problems, empty when all is well."""
    return judge(build_datasheet(architectures, widths, say=say))


def second_triton() -> Path | None:
    """Where a second Triton is installed; None where it is not. A directory that was named must be one."""
    if (SECOND_TRITON / "triton").is_dir():
        return SECOND_TRITON
    if "SHIPYARD_SECOND_TRITON" in os.environ:
        remedy = f"pip install --no-deps --target {SECOND_TRITON} triton==3.9.0"
        raise ValueError(f"SHIPYARD_SECOND_TRITON: {SECOND_TRITON}, has no triton in it; {remedy}")
    return None


def datasheet_of(directory: Path, architectures=ARCHITECTURES, names: Sequence[str] = ("",)) -> list[Sheet]:
    """The same sheets from another Triton, installed with `pip install --target DIR`, in a process of its own."""
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(directory), os.environ.get("PYTHONPATH"))))
    request = json.dumps({"architectures": list(architectures), "names": list(names)})
    command = [sys.executable, "-m", "shipyard.kernels.datasheet", request]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling with the Triton in {directory} failed; its last words are above")
    return [sheet_from(row) for row in json.loads(done.stdout.splitlines()[-1])]


def sheet_from(row: dict[str, Any]) -> Sheet:
    """Back from JSON."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    return Sheet(**values)


if __name__ == "__main__":
    wish = json.loads(sys.argv[1])
    tell = lambda line: print(line, file=sys.stderr)
    print(json.dumps([asdict(sheet) for sheet in build_datasheet(**wish, say=tell)]))
