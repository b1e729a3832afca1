"""Reads what a compiler made of a kernel: NVIDIA SASS through the wheel's own nvdisasm and cuobjdump, AMD's assembly.

A hot loop is an innermost backward branch around matrix instructions, or around fused multiply-adds in a kernel that
has none of those. Its length is what one warp (wave) issues for one tile, so it can be compared with hand-written
kernels, and a spill counts only where it stands inside one.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton.backends.nvidia as nvidia

NVIDIA_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
MATRIX = re.compile(r"HGMMA|HMMA|UTC\w*MMA|DMMA|v_mfma|v_smfmac")
MULTIPLY_ADD = re.compile(r"FFMA|DFMA|v_(pk_)?fma|v_fmac|v_pk_mul")
SPILL = re.compile(r"LDL|STL|scratch_(load|store)")
GLOBAL = re.compile(r"LDG(STS)?(\.|$)|STG(\.|$)|global_(load|store)|buffer_(load|store)")
WIDE = re.compile(r"\.128|dwordx4|_b128")
BYTES = ((WIDE, 16), (re.compile(r"dwordx3|_b96"), 12), (re.compile(r"\.64|dwordx2|_b64"), 8),
         (re.compile(r"\.[US]16|short|_[bdiu]16"), 2), (re.compile(r"\.[US]8|byte|_[iu]8"), 1))  # fmt: skip


@dataclass(frozen=True)
class Loop:
    """One hot loop: instructions a warp issues per tile, those that spill, and the matrix opcodes in it."""

    instructions: int
    spills: int
    matrix: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """A compiled kernel. Registers and stack bytes are per thread; `wide_access` is the share of the
    bytes of its global accesses that 128-bit instructions move."""

    instructions: int
    registers: int
    stack_bytes: int
    loops: tuple[Loop, ...]
    wide_access: float
    matrix: tuple[str, ...]


def _tool(name: str, *arguments: str) -> str:
    path = Path(str(nvidia.__file__)).parent / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def nvidia_listing(cubin: bytes) -> tuple[str, str]:
    """What a cubin uses, in cuobjdump's words, and its SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)


def read_nvidia(cubin: bytes) -> Code:
    """Disassembles a cubin."""
    usage, listing = nvidia_listing(cubin)
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if label := re.match(r"^(\.L_\w+):", line):
            labels[label.group(1)] = len(opcodes)
        elif found := NVIDIA_LINE.match(line):
            predicate, opcode, operands = found.groups()
            if opcode.startswith("BRA") and (target := re.search(r"\.L_\w+", operands)):
                branches.append((len(opcodes), target.group(0)))
            opcodes.append(("@" if predicate and opcode == "EXIT" else "") + opcode)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK"))  # type: ignore
    return _code(opcodes, labels, branches, registers, stack)


def read_amd(assembly: str) -> Code:
    """Reads amdgcn text; registers are VGPRs, stack bytes are spilled VGPRs times four."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in assembly.splitlines():
        if label := re.match(r"^(\.LBB\w+):", line):
            labels[label.group(1)] = len(opcodes)
        elif found := re.match(r"^\t([svdbg]\w+|ds_\w+|scratch_\w+|flat_\w+)\s*(.*)", line):
            if found.group(1).startswith(("s_cbranch", "s_branch")):
                branches.append((len(opcodes), found.group(2).split()[0]))
            opcodes.append(found.group(1))
    count = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    return _code(
        opcodes, labels, branches, int(count.group(1)) if count else 0, 4 * int(spilled.group(1)) if spilled else 0
    )


def _code(opcodes: list[str], labels: dict[str, int], branches, registers: int, stack_bytes: int) -> Code:
    spans = sorted({(labels[to], at) for at, to in branches if labels.get(to, at + 1) <= at})
    # waits of a barrier stand behind the kernel's end and branch back into the loop they belong to: no loops themselves
    spans = [(a, b) for a, b in spans if "EXIT" not in opcodes[a : b + 1]]
    work = MATRIX if any(MATRIX.match(op) for op in opcodes) else MULTIPLY_ADD
    hot = [(a, b) for a, b in spans if any(work.match(op) for op in opcodes[a : b + 1])]
    innermost = [(a, b) for a, b in hot if not any(c >= a and d <= b and (c, d) != (a, b) for c, d in hot)]
    loops = tuple(_loop(opcodes[a : b + 1]) for a, b in innermost)
    accesses = [op for op in opcodes if GLOBAL.match(op)]
    wide = 16 * sum(bool(WIDE.search(op)) for op in accesses) / max(sum(map(_access_bytes, accesses)), 1)
    matrix = tuple(sorted({op.split(".")[0] for op in opcodes if MATRIX.match(op)}))
    return Code(len(opcodes), registers, stack_bytes, loops, wide, matrix)


def _access_bytes(opcode: str) -> int:
    return next((count for pattern, count in BYTES if pattern.search(opcode)), 4)


def _loop(body: list[str]) -> Loop:
    matrix = Counter(op.split(".")[0] for op in body if MATRIX.match(op))
    return Loop(len(body), sum(bool(SPILL.match(op)) for op in body), tuple(sorted(matrix)))
