"""Writes docs/kernels.md from the sheets, the traffic counts and the accuracy ratios.

`shipyard bench kernels --datasheet` compiles and writes the page. `python -m shipyard.kernels.datasheet_page --golden`
makes what compiles now the golden file, which nothing else overwrites; `--golden decode` replaces decode's lines alone.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from .datasheet import (
    GOLDEN,
    MATRIX_FLOPS_A_CLOCK,
    REFERENCE,
    Sheet,
    build_datasheet,
    datasheet_of,
    golden_of,
    problems,
    read_golden,
    second_triton,
    write_golden,  # fmt: skip
)
from .shipped import ARCHITECTURES, FEATURES, VARIANTS, configurations
from .traffic import LENGTHS, measured

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
RATIOS = "SHIPYARD_KERNEL_RATIOS"
SCORES_A_WARP = 2048  # what one warp of FlashAttention-2 (128 x 64, 4 warps) and -4 (128 x 128, 8 warps) does per tile
PLAIN_BAR, DIAGONAL_BAR = 1.10, 1.25
CARDS = {"sm_80": "A100", "sm_89": "L40S, RTX 40", "sm_90": "H100, H200", "sm_100": "B200", "sm_120": "RTX 50, RTX PRO",
         "gfx942": "MI300X", "gfx950": "MI355X"}  # fmt: skip
REFERENCE_NAME = {"sm_80": "FlashAttention-2", "sm_90": "FlashAttention-4"}
RATIO_HEAD = ["card", "Triton", "loop", "ours", "theirs", "ratio", "bar", "holds"]
SHEET_HEAD = ["kernel", "tile", "warps", "registers", "stack B", "shared KiB", "blocks an SM", "occupancy",
              "128-bit bytes", "hot loops", "other Triton", "roofline (model)"]  # fmt: skip


def per_reference_tile(sheet: Sheet, loop: str) -> float:
    """Instructions a warp issues for 2048 scores, the tile of the hand-written kernels."""
    queries, keys = sheet.tile
    return sheet.loops[loop] * SCORES_A_WARP / (queries * keys / sheet.warps)


def ratios(sheets: list[Sheet]) -> list[tuple[Sheet, str, float, int, float, float]]:
    """(sheet, loop, ours, theirs, ratio, bar) where a hand-written count is known; forward, width 128, bf16."""
    rows = []
    for sheet in sheets:
        if sheet.name == "attention forward 128/128 bfloat16":
            for loop, theirs in REFERENCE.get(sheet.architecture, {}).items():
                ours = per_reference_tile(sheet, loop)
                bar = PLAIN_BAR if loop == "plain" else DIAGONAL_BAR
                rows.append((sheet, loop, ours, theirs, ours / theirs, bar))
    return rows


def worst_ratios(lines: list[str]) -> dict[str, tuple[float, float]]:
    """Worst (RMS, maximum) error ratio to eager PyTorch per kernel and dtype."""
    worst: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for line in lines:
        row = json.loads(line)
        words = row["name"].split()
        dtype = next((w.removeprefix("torch.").split("[")[0] for w in words if w.startswith("torch.")), "bfloat16")
        key = f"{words[0].rstrip(',')} {dtype}"
        worst[key] = (max(worst[key][0], row["rms"]), max(worst[key][1], row["max"]))
    return dict(sorted(worst.items()))


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _loops(sheet: Sheet) -> str:
    words = [f"{name} {count}" + (f" (**{sheet.spills[name]} spills**)" if sheet.spills[name] else "")
             for name, count in sheet.loops.items()]  # fmt: skip
    return ", ".join(words) or "-"


def _other(sheet: Sheet, others: dict[str, Sheet]) -> str:
    """The hot loops of the other Triton as a difference, loop by loop."""
    other = others.get(sheet.key)
    if other is None or set(other.loops) != set(sheet.loops):
        return _loops(other) if other else "-"
    moves = [f"{100 * (other.loops[n] / count - 1):+.0f} %" for n, count in sheet.loops.items()]
    spills = sum(other.spills.values())
    return (", ".join(moves) or "-") + (f" (**{spills} spills**)" if spills else "")


def _row(sheet: Sheet, others: dict[str, Sheet]) -> list[object]:
    shared = f"{sheet.shared_bytes / 1024:.0f}" if sheet.shared_bytes else "-"
    return [
        sheet.name.replace("bfloat16", "bf16").replace("float", "fp"), "x".join(map(str, sheet.tile)) or "-",
        sheet.warps, sheet.registers, sheet.stack_bytes, shared, sheet.blocks_per_sm, f"{sheet.occupancy:.0%}",
        f"{sheet.wide_access:.0%}", _loops(sheet), _other(sheet, others),
        f"{sheet.roofline:.2f}" if sheet.roofline else "-",
    ]  # fmt: skip


def _summary(sheets: list[Sheet]) -> str:
    """One line a card: what the laws found, and what the model says of its forward pass."""
    rows: list[list[object]] = []
    for arch in ARCHITECTURES:
        mine = [s for s in sheets if s.architecture == arch]
        if not mine:
            continue
        spilling = [s for s in mine if any(s.spills.values())]
        found = [line for s in mine for line in problems(s)]
        named = {s.name: s for s in mine}
        models = [named.get(f"attention {part} 128/128 bfloat16") for part in ("forward", "keys", "queries")]
        rows.append([
            f"{arch} ({CARDS[arch]})", f"{len(mine)} of {len(list(configurations(arch)))}", len(spilling), len(found),
            max(s.shared_bytes for s in mine) // 1024,
            " / ".join(f"{s.roofline:.2f}" if s else "-" for s in models),
        ])  # fmt: skip
    head = ["card", "compiled, of all shipped", "with a spill in a hot loop", "broken laws", "most shared KiB",
            "roofline (model, unmeasured) at width 128: forward / dK dV / dQ"]  # fmt: skip
    return table(head, rows)


def _traffic(traffic: list[dict]) -> str:
    rows = [
        [t["name"], t["launches"], f"{t['bytes_issued']:,}", f"{t['bytes_minimum']:,}",
         f"{t['bytes_issued'] / max(t['bytes_minimum'], 1):.2f}",
         f"{t['flops_issued'] / t['flops_useful']:.2f}" if t["flops_useful"] else "-"]
        for t in traffic
    ]  # fmt: skip
    return table(["kernel", "launches", "bytes issued", "bytes at least", "ratio", "FLOPs issued / useful"], rows)


def _errors(errors: dict[str, tuple[float, float]]) -> str:
    if not errors:
        return (
            f"Not measured for this page: run the kernel tests with {RATIOS}=FILE, then write the page with the same."
        )
    rows = [[name, f"{rms:.2f}", f"{top:.2f}"] for name, (rms, top) in errors.items()]
    shared = (
        "\n\nA whole training step's is the worst of several draws: most of its error in fp32 is that of the linear "
        "layers, which both paths share, so the test holds the draws' mean."
    )
    known = any(name.startswith("training ") for name in errors)
    return table(["kernel and dtype", "worst RMS ratio", "worst maximum ratio"], rows) + shared * known


def _every_configuration(sheets: list[Sheet]) -> str:
    """One folded table a card, in the first Triton's numbers."""
    first = sheets[0].triton
    others = {s.key: s for s in sheets if s.triton != first}
    parts = []
    for arch in ARCHITECTURES:
        rows = [_row(s, others) for s in sheets if s.architecture == arch and s.triton == first]
        if rows:
            title = f"<summary>{arch} ({CARDS[arch]}), {len(rows)} configurations</summary>"
            parts.append(f"<details>{title}\n\n{table(SHEET_HEAD, rows)}\n\n</details>")
    return "\n\n".join(parts)


def markdown(sheets: list[Sheet], traffic: list[dict], errors: dict[str, tuple[float, float]]) -> str:
    """The page."""
    versions = list(dict.fromkeys(s.triton for s in sheets))
    found = [f"- broken under Triton {s.triton}: {line}" for s in sheets for line in problems(s)]
    beside: list[list[object]] = [
        [f"{s.architecture} ({REFERENCE_NAME[s.architecture]})", s.triton, loop, f"{ours:.0f}", theirs, f"{r:.2f}",
         f"{bar:.2f}", "yes" if r <= bar else "**no**"]
        for s, loop, ours, theirs, r, bar in ratios(sheets)
    ]  # fmt: skip
    cards = "\n\n".join(f"Triton {v}:\n\n{_summary([s for s in sheets if s.triton == v])}" for v in versions)
    second = f"\n- *other Triton*: {versions[1]}'s hot loops over these, in the same order." if versions[1:] else ""
    return PAGE_TEXT.format(
        versions=" and ".join(versions), cards=cards, count=len(sheets), broken="\n".join(found) or "No law is broken.",
        beside=table(RATIO_HEAD, beside), errors=_errors(errors), traffic=_traffic(traffic), second=second,
        lengths=", ".join(map(str, LENGTHS)), features=FEATURES.strip().replace(" ", ", "),
        every=_every_configuration(sheets), flops=MATRIX_FLOPS_A_CLOCK["sm_90"],
    )  # fmt: skip


PAGE_TEXT = """# Kernels: the datasheet

Generated by `shipyard bench kernels --datasheet`; do not edit. **Nothing above the last sections, *On a card*, was
measured on one.** It is what the compilers of Triton {versions} made of the shipped configurations, what the sanitizer
counted in Triton's interpreter, and errors against fp64 in that interpreter, which is made to round as the hardware
does.

## In short

{count} compilations; what is not among them is not known to hold. A law is: no LDL or STL (scratch access on AMD) in a
hot loop, shared and tensor memory within the card's limit, global bytes moved by 128-bit accesses, and HGMMA, UTCHMMA,
HMMA or MFMA where matrices are multiplied.

{cards}

{broken}

## Hot loop beside hand-written kernels

Instructions one warp issues for 2048 scores, causal forward at head width 128 in bf16. `plain` tiles need no mask,
`diagonal` tiles do. FlashAttention-2 on sm_80 and FlashAttention-4 on sm_90 were disassembled from their own builds; no
masked count is known for sm_80. Fewer instructions are not yet a faster kernel: only a card can say that.

{beside}

## Error against fp64, as a multiple of eager PyTorch's in the same dtype

Worst over the tested features, widths and adversarial inputs; outputs and gradients. Bars: RMS 1.0, maximum 2.0.

{errors}

## Traffic and arithmetic, counted

Every access of every program at one small shape (a pack of {lengths} tokens, width 128), over each distinct byte once
per launch; a card's caches bring the first near the second. FLOPs are those of matrix products issued, over those a
causal mask needs; the backward pass makes the scores twice, once for dQ and once for dK and dV.

{traffic}

## Every compiled configuration

- *tile*: query rows x key rows. *stack B*: bytes a thread keeps outside its registers; outside the hot loops they cost
  little.
- *hot loops*: instructions a warp (wave on AMD) issues for one tile. `window` is the edge of a sliding window, `edge`
  the last tile of a row; fp32 dQ makes delta in a sweep of its own. fp32 runs on fused multiply-adds, outside the
  tensor cores; at width 256 NVIDIA's cards make dK (`keys`) and dV (`values`) in a launch each.
- *128-bit bytes*: share of the global bytes that 128-bit accesses move; the rest are row terms such as the log-sum-exp.
- *roofline*: a **model, unmeasured**: matrix clocks over the longest of matrix, exp2 and issue clocks of an unmasked
  tile, perfectly overlapped, at {flops} FLOP a clock and SM on sm_90, and so on.
- *{features}*: the same kernel with all three features on.{second}

{every}
"""
CARD = "## On a card: "


def card_sections(page: Path) -> list[str]:
    """What `bench kernels` measured on real cards and put at the end of the page, one text a card."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    return [CARD + section.strip() + "\n" for section in text.split(f"\n{CARD}")[1:]]


def put_card(page: Path, section: str) -> None:
    """Adds a card's section to the page, in the place of an older one of the same card; the datasheet stays."""
    title = section.partition("\n")[0]
    others = [known for known in card_sections(page) if known.partition("\n")[0] != title]
    sheet = page.read_text(encoding="utf-8").split(f"\n{CARD}")[0] if page.is_file() else "# Kernels\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join([sheet.rstrip() + "\n", *others, section.strip() + "\n"]), encoding="utf-8")


def write_datasheet(page: Path, sheets: list[Sheet] | None = None, errors: dict | None = None) -> str:
    """Writes the page, compiling every configuration where no sheets are given (long, unless Triton's cache has them),
    for the second Triton too where it is installed; returns a line to print."""
    if sheets is None:
        sheets = build_datasheet(say=lambda line: print(line, file=sys.stderr))
        second = second_triton()
        sheets += datasheet_of(second) if second else []
    if errors is None:
        path = Path(os.environ.get(RATIOS, ""))
        errors = worst_ratios(path.read_text().splitlines()) if path.is_file() else {}
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join([markdown(sheets, measured(), errors).rstrip() + "\n", *card_sections(page)]))
    versions = " and ".join(dict.fromkeys(s.triton for s in sheets))
    broken = sum(len(problems(sheet)) for sheet in sheets)
    return f"{page}: {len(sheets)} configurations with Triton {versions}, {broken} broken laws"


def main(arguments: list[str]) -> None:
    if arguments[:1] != ["--golden"]:
        raise SystemExit(
            "datasheet_page: --golden [NAME ...], makes what compiles now the golden file, or its entries that "
            "start with NAME; shipyard bench kernels --datasheet writes the page"
        )
    second = second_triton()
    if second is None:
        raise SystemExit("datasheet_page: --golden, needs the second Triton too; set SHIPYARD_SECOND_TRITON")
    names = arguments[1:] or [""]
    plain = VARIANTS[:1]  # the others answer to the laws alone
    sheets = build_datasheet(variants=plain, names=names, say=lambda line: print(line, file=sys.stderr))
    golden = read_golden() if arguments[1:] else {}
    for version, loops in golden_of([*sheets, *datasheet_of(second, names=names)]).items():
        golden.setdefault(version, {}).update(loops)
    write_golden(golden)
    print(f"{GOLDEN}: {sum(map(len, golden.values()))} configurations")


if __name__ == "__main__":
    main(sys.argv[1:])
