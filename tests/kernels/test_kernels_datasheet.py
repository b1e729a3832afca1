"""Ahead-of-time compilation: the laws of the datasheet, planted faults, and the golden hot loops."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from shipyard.kernels.datasheet import (
    ARCHITECTURES,
    GOLDEN,
    WIDTHS,
    Sheet,
    against_golden,
    attention_sheet,
    datasheet_of,
    problems,
    verify_kernels,
)
from shipyard.kernels.machine_code import read_amd

SECOND_TRITON = Path.home() / ".cache" / "shipyard" / "triton-3.9.0"
SOUND = Sheet(
    "attention forward 128/128 bfloat16", "sm_90", "3.7.1", (128, 128, 8, 2), 255, 0, 163840, 1, 0.9, ("HGMMA",),
    {"plain": 500, "diagonal": 600, "edge": 620}, {"plain": 0, "diagonal": 0, "edge": 3}, 1.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shared_bytes": 240 * 1024}, "shared memory"),
        ({"spills": {"plain": 2, "diagonal": 0, "edge": 0}}, "2 spills in the plain loop"),
        ({"wide_access": 0.1}, "128 bits wide"),
        ({"matrix": ("FFMA",)}, "no HGMMA"),
    ],
)
def test_each_planted_fault_is_named(change, words):
    assert problems(SOUND) == []
    assert any(words in line for line in problems(replace(SOUND, **change)))


def test_golden_allows_two_percent():
    golden = {"3.7.1/sm_90/attention forward 128/128 bfloat16": {"plain": 495, "diagonal": 600, "edge": 620}}
    assert against_golden([SOUND], golden) == []
    slow = replace(SOUND, loops={"plain": 506, "diagonal": 600, "edge": 620})
    assert "plain loop has 506 instructions, golden 495" in against_golden([slow], golden)[0]
    assert "not in hot_loops.json" in against_golden([SOUND], {})[0]


def test_amd_assembly_is_read():
    code = read_amd("""
\ts_mov_b32 s0, 0
.LBB0_1:
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tscratch_load_dword v5, off, s32
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\ts_cbranch_scc1 .LBB0_1
\tglobal_store_dword v4, v0, s[0:1]
    .vgpr_count:     66
    .vgpr_spill_count: 2
""")
    assert (code.registers, code.stack_bytes, code.wide_access) == (66, 8, 0.5)
    assert [(loop.instructions, loop.spills) for loop in code.loops] == [(4, 1)]


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_forward_attention_compiles_and_holds_its_laws(arch):
    sheet = attention_sheet(arch, "forward", 128, 128)
    assert problems(sheet) == []
    assert against_golden([sheet], json.loads(GOLDEN.read_text())["loops"]) == []


@pytest.mark.kernels_full
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_holds_its_laws(arch):
    assert verify_kernels([arch], WIDTHS) == []


@pytest.mark.kernels_full
def test_second_triton_compiles_the_same_laws():
    if not SECOND_TRITON.exists():
        pytest.skip(f"no second Triton; pip install --no-deps --target {SECOND_TRITON} triton==3.9.0")
    sheets = datasheet_of(SECOND_TRITON, ["sm_80", "sm_90", "sm_100", "gfx942"])
    assert {sheet.triton for sheet in sheets} == {"3.9.0"}
    assert [line for sheet in sheets for line in problems(sheet)] == []
