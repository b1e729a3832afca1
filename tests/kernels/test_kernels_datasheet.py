"""Ahead-of-time compilation: the laws of the datasheet, planted faults, the golden hot loops, and the page."""

import re
from dataclasses import asdict, replace

import pytest
import torch
from shipyard.kernels import datasheet, datasheet_page
from shipyard.kernels.attention import Tile
from shipyard.kernels.datasheet import (
    GOLDEN,
    SECOND_TRITON,
    Sheet,
    against_golden,
    attention_sheet,
    build_datasheet,
    compile_kernel,
    datasheet_of,
    golden_of,
    in_golden,
    judge,
    problems,
    read_golden,
    second_triton,
    sheet_from,
    sheet_of,
    write_golden,
)
from shipyard.kernels.datasheet_page import CARD, DIAGONAL_BAR, PLAIN_BAR, markdown, put_card, ratios, write_datasheet
from shipyard.kernels.machine_code import nvidia_listing, read_amd
from shipyard.kernels.shipped import ARCHITECTURES, attention_configuration, configurations, other_configurations

SOUND = Sheet(
    "attention forward 128/128 bfloat16", "sm_90", "3.7.1", (128, 128), 8, 255, 0, 163840, 0, 1, 0.125, 0.9, ("HGMMA",),
    {"plain": 500, "diagonal": 600, "edge": 620}, {"plain": 0, "diagonal": 0, "edge": 0}, 1.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shared_bytes": 240 * 1024}, "shared memory"),
        ({"tensor_columns": 1024}, "tensor memory"),
        ({"spills": {"plain": 2, "diagonal": 0, "edge": 0}}, "2 spills in the plain loop"),
        ({"spills": {"plain": 0, "diagonal": 0, "edge": 1}}, "1 spills in the edge loop"),
        ({"wide_access": 0.1}, "in 128-bit accesses"),
        ({"matrix": ("FFMA",)}, "no HGMMA"),
        ({"loops": {}}, "no hot loop"),
    ],
)
def test_each_broken_law_is_named(change, words):
    assert problems(SOUND) == []
    assert any(words in line for line in problems(replace(SOUND, **change)))


def test_golden_allows_two_percent():
    golden = {"3.7.1": {SOUND.key: {"plain": 495, "diagonal": 600, "edge": 620}}}
    assert against_golden([SOUND], golden) == []
    slow = replace(SOUND, loops={"plain": 506, "diagonal": 600, "edge": 620})
    assert "plain loop has 506 instructions, golden 495" in against_golden([slow], golden)[0]
    lost = replace(SOUND, loops={"plain": 495})
    assert "hot loops ['plain'], golden" in against_golden([lost], golden)[0]
    assert "not in hot_loops.json for Triton 3.9.0" in against_golden([replace(SOUND, triton="3.9.0")], golden)[0]


def test_golden_file_is_written_on_demand_only(tmp_path, monkeypatch):
    before = GOLDEN.read_bytes()
    monkeypatch.setattr(datasheet_page, "measured", list)  # what the interpreter counts has tests of its own
    write_datasheet(tmp_path / "kernels.md", [SOUND], {})
    assert GOLDEN.read_bytes() == before
    monkeypatch.setattr(datasheet, "GOLDEN", tmp_path / "golden.json")
    half = replace(SOUND, name="attention forward 128/128 float16")
    write_golden(golden_of([SOUND, half]))
    assert read_golden() == {"3.7.1": {SOUND.key: SOUND.loops}}
    assert against_golden([half], {}) == []  # it answers to the laws alone
    with pytest.raises(SystemExit, match="--golden"):
        datasheet_page.main([])


def test_golden_file_knows_every_pass_of_attention():
    """All widths under both Tritons."""
    golden = read_golden()
    for arch in ARCHITECTURES:
        names = [c.name for c in configurations(arch, others=False) if in_golden(c.name)]
        assert len(names) == 18
        assert {f"{arch}/{name}" for name in names} <= set(golden["3.7.1"]) & set(golden["3.9.0"])
    assert not [key for known in golden.values() for key in known if key.split("/")[0] not in ARCHITECTURES]


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
    assert (code.registers, code.stack_bytes, code.wide_access) == (66, 8, 0.8)
    assert [(loop.instructions, loop.spills) for loop in code.loops] == [(4, 1)]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_forward_attention_stays_beside_the_hand_written_kernels(arch):
    """At most 1.10x their instructions in unmasked and 1.25x in masked tiles; and within 2 % of the golden file."""
    sheet = attention_sheet(arch, "forward", 128, 128)
    assert judge([sheet]) == []
    rows = ratios([sheet])
    assert rows
    assert all(ratio <= {"plain": PLAIN_BAR, "diagonal": DIAGONAL_BAR}[loop] for _, loop, _, _, ratio, _ in rows)


def test_hopper_brings_keys_without_addresses():
    """Where no tile passes the last key, the copy engine's one instruction stands for a thread's sixteen."""
    compiled = compile_kernel(attention_configuration("sm_90", "forward", (128, 128)), "sm_90")
    _, sass = nvidia_listing(compiled.asm["cubin"])
    # two for the first tile and two in the loop, of the plain and of the diagonal tiles each
    assert len(re.findall(r"UTMALDG\.3D", sass)) == 8


@pytest.mark.parametrize(("arch", "part"), [("gfx942", "forward"), ("sm_90", "keys"), ("sm_100", "queries")])
def test_a_pass_holds_its_laws(arch, part):
    assert judge([attention_sheet(arch, part, 128, 128)]) == []


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("sm_90", ("rope", "decode", "decode join", "rms_norm backward", "linear_cross_entropy")),
        ("gfx942", ("decode join", "swiglu", "swiglu backward")),  # 64 threads a wave: 128-bit accesses want more each
    ],
)
def test_small_kernels_hold_their_laws(arch, names):
    chosen = [configuration for configuration in other_configurations(arch) if configuration.name in names]
    assert len(chosen) == len(names)
    assert judge([sheet_of(configuration, arch) for configuration in chosen]) == []


def test_planted_spill_is_caught():
    """Four warps cannot hold 64 rows of dK and dV at width 192/128."""
    lines = problems(attention_sheet("sm_80", "keys", 192, 128, tile=Tile(32, 64, 8, 1)))
    assert any("spills in the plain loop" in line for line in lines)


def test_planted_tile_too_large_for_the_card_is_caught():
    lines = problems(attention_sheet("sm_120", "forward", 64, 64, tile=Tile(128, 256, 8, 3)))
    assert any("bytes of shared memory, the card has 101376" in line for line in lines)


def test_planted_odd_stride_is_caught():
    sound = attention_configuration("sm_80", "queries", (64, 64))
    crooked = replace(sound, constants=sound.constants | {"k_t": 513, "v_t": 513, "q_t": 513, "do_t": 513})
    assert any("in 128-bit accesses" in line for line in problems(sheet_of(crooked, "sm_80")))


def test_planted_missing_alignment_is_caught():
    swiglu = next(c for c in other_configurations("sm_90") if c.name == "swiglu")
    assert problems(sheet_of(swiglu, "sm_90")) == []
    assert any("in 128-bit accesses" in line for line in problems(sheet_of(swiglu, "sm_90", aligned=False)))


@pytest.mark.parametrize("part", ["forward", "queries"])
def test_no_loop_rounds_a_capped_score_otherwise_than_another(part):
    """CAP * tanh - shift in one fma here, in two roundings there: a chunk of a prefill then differs from the whole. In
    every loop the cap (30) multiplies what tanh lost, by itself, and tanh, in an fma that adds the first."""
    configuration = attention_configuration("sm_80", part, (64, 64), torch.float32, features=True)
    _, sass = nvidia_listing(compile_kernel(configuration, "sm_80").asm["cubin"])
    products = re.findall(r"F(FMA|MUL)\S* R\d+, R\d+(?:\.reuse)?, 30( ;|, R\d+)", sass)
    scores = configuration.tile.queries * configuration.tile.keys // (32 * configuration.warps)
    each = scores * len(configuration.loops)
    assert sorted(kind for kind, _ in products) == ["FMA"] * each + ["MUL"] * each


@pytest.mark.parametrize(
    ("arch", "part", "width", "loops"),
    [
        ("sm_90", "forward", 64, {"plain"}),
        ("sm_80", "keys", 128, {"plain", "diagonal", "edge"}),
        ("sm_100", "forward", 256, {"plain"}),  # pairs of equal sums, where a compiler makes them, spill here first
        ("sm_90", "values", 256, {"plain", "diagonal", "edge"}),
    ],
)
def test_fp32_loops_are_found_without_matrix_instructions(arch, part, width, loops):
    sheet = attention_sheet(arch, part, width, width, torch.float32)
    assert judge([sheet]) == []
    assert set(sheet.loops) == loops


def test_page_says_what_holds_and_what_does_not():
    sheets = [SOUND, replace(SOUND, triton="3.9.0", loops={"plain": 600, "diagonal": 660, "edge": 620})]
    page = markdown(sheets, [], {"attention bfloat16": (0.99, 1.2)})
    assert "| sm_90 (FlashAttention-4) | 3.7.1 | plain | 500 | 477 | 1.05 | 1.10 | yes |" in page
    assert "| sm_90 (FlashAttention-4) | 3.9.0 | plain | 600 | 477 | 1.26 | 1.10 | **no** |" in page
    assert "+20 %, +10 %, +0 %" in page
    assert "No law is broken." in page
    assert "model, unmeasured" in page
    spilling = replace(SOUND, spills={"plain": 4, "diagonal": 0, "edge": 0})
    assert "broken under Triton 3.7.1: sm_90/attention forward" in markdown([spilling], [], {})


def test_sheets_survive_json_and_a_named_directory_must_hold_triton(tmp_path, monkeypatch):
    assert sheet_from(asdict(SOUND)) == SOUND
    monkeypatch.setattr(datasheet, "SECOND_TRITON", tmp_path)
    monkeypatch.delenv("SHIPYARD_SECOND_TRITON", raising=False)
    assert second_triton() is None
    monkeypatch.setenv("SHIPYARD_SECOND_TRITON", str(tmp_path))
    with pytest.raises(ValueError, match="has no triton in it; pip install --no-deps --target"):
        second_triton()


@pytest.mark.kernels_full
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_holds_its_laws(arch):
    assert judge(build_datasheet([arch])) == []


@pytest.mark.kernels_full
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_second_triton_compiles_every_configuration_to_the_same_laws(arch):
    directory = second_triton()
    if directory is None:
        pytest.skip(f"no second Triton; make test-kernels puts one into {SECOND_TRITON}")
    sheets = datasheet_of(directory, [arch])
    assert {sheet.triton for sheet in sheets} == {"3.9.0"}
    assert judge(sheets) == []
    assert all(ratio <= bar for *_, ratio, bar in ratios(sheets))


def test_a_new_datasheet_keeps_what_cards_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(datasheet_page, "measured", list)
    page = tmp_path / "kernels.md"
    write_datasheet(page, [SOUND], {})
    bare = page.read_text()
    put_card(page, f"{CARD}one (sm_90)\n\n| a table |")
    put_card(page, f"{CARD}two (sm_80)\n\n| another |")
    put_card(page, f"{CARD}one (sm_90)\n\n| a newer table |")
    write_datasheet(page, [SOUND], {})
    text = page.read_text()
    assert text.startswith(bare)
    assert [text.count(words) for words in ("a newer table", "a table", "another")] == [1, 0, 1]
    fresh = tmp_path / "new.md"
    put_card(fresh, f"{CARD}one\n\nx")
    assert fresh.read_text().count(CARD) == 1
