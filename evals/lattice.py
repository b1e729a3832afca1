"""The invariance lattice: every way to cut one training job, and small sets of cells that still cover it.

A cell is a method, an engine, a number of ranks, a micro-batch size, packing or padding, activation checkpointing,
compiled or not. Each cell is a recipe; a recipe rule may refuse it, and then the rule's sentence is its result.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..training.recipe import parse_recipe

STEPS = 5
COST_STEPS = 8
METHODS = ("sft", "dpo", "grpo", "pretrain")
ENGINES = (
    "ddp", "fsdp2", "zero1", "zero2", "zero3", "fsdp2+offload", "zero2+offload", "zero3+offload", "fsdp2+tensor",
    "fsdp2+context", "elastic",
)  # fmt: skip
"""+offload: to the host; +tensor and +context: two ranks share each layer, each row; elastic: `deterministic: elastic`,
the rest off."""
WORLDS = (1, 2, 4)
MICROS = (8, 3, 1)
"""Samples of a forward pass; a global batch has 8 (6 pairs, 16 rollouts): no accumulation, a ragged one, the most."""
CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True)
class Cell:
    """One way to compute the same five steps."""

    method: str
    engine: str
    world: int
    micro: int
    packing: bool
    checkpointing: str
    compiled: bool
    dtype: str = "float32"

    @property
    def name(self) -> str:
        layout = "packed" if self.packing else "padded"
        kept = {"none": "", "selective": "-selective", "full": "-recomputed"}[self.checkpointing]
        rest = ("-compiled" if self.compiled else "") + ("-bf16" if self.dtype == "bfloat16" else "")
        return f"{self.method}-{self.engine}-{self.world}x{self.micro}-{layout}{kept}{rest}"

    @property
    def cost(self) -> tuple[int, int, int]:
        """What a cell costs, for choosing between equals: compilation most, then ranks, then micro-batches."""
        return int(self.compiled), self.world, -self.micro


def reference(cell: Cell) -> Cell:
    """What a cell must equal: the same method on one process, in one micro-batch, nothing clever. Not packed either,
    but for pretraining, whose rows are."""
    return Cell(cell.method, "ddp", 1, 64, cell.method == "pretrain", "none", False, cell.dtype)


def product(worlds: Sequence[int] = WORLDS, compiled: Sequence[bool] = (False, True)) -> list[Cell]:
    """Every cell, the refused ones too."""
    axes = (METHODS, ENGINES, worlds, MICROS, (True, False), CHECKPOINTING, compiled)
    return [Cell(*values) for values in itertools.product(*axes)]


def engines_by_ranks(worlds: Sequence[int] = WORLDS) -> list[Cell]:
    """Every engine at every number of ranks, for the first method, with ragged accumulation."""
    return [
        Cell("sft", engine, world, 3, True, "none", False)
        for engine, world in itertools.product(ENGINES, worlds)
        if not is_shared(engine) or world > 1
    ]


def is_shared(engine: str) -> bool:
    """Whether two ranks share layers or rows, so that one alone cannot."""
    return engine.endswith(("+tensor", "+context"))


def half_precision() -> list[Cell]:
    """bf16 under every engine that trains whole weights in it, on two ranks."""
    return [Cell("sft", engine, 2, 3, True, "none", False, "bfloat16") for engine in ENGINES]


def compiled() -> list[Cell]:
    """torch.compile, which costs as much as many cells, for the first method: on one rank and on two."""
    wanted = (("ddp", 1), ("ddp", 2), ("fsdp2", 2), ("zero2", 2))
    return [Cell("sft", engine, world, 8, True, "none", True) for engine, world in wanted]


def found() -> list[Cell]:
    """Three values that once failed together only, which pairs of values need not meet."""
    return [Cell("dpo", "zero3", 2, 3, True, "selective", False)]


def is_short(cell: Cell) -> bool:
    """On two ranks, as written, with the extremes of what is left; a variant of an engine for the first method.

    Pairs of a variant with the other axes are the standard lattice's.
    """
    if cell.world != 2 or cell.compiled:
        return False
    if cell.engine == "zero1" and cell.method != METHODS[0]:  # zero2 shares its code
        return False
    if "+" in cell.engine:
        return (cell.method, cell.micro, cell.packing, cell.checkpointing) == (METHODS[0], 8, True, "none")
    return cell.micro != 1 and cell.checkpointing != "selective"


def pairwise(cells: Iterable[Cell], chosen: Sequence[Cell] = ()) -> list[Cell]:
    """A few of `cells` in which, with `chosen`, every two values that occur together in some cell do so.

    Greedy: the cell that adds most pairs, the cheapest of equals.
    """
    candidates = {cell: pairs(cell) for cell in sorted(cells, key=lambda cell: cell.cost)}
    missing = set().union(*candidates.values()) - set().union(*map(pairs, chosen))
    found: list[Cell] = []
    while missing:
        best = max(candidates, key=lambda cell: len(candidates[cell] & missing))
        found.append(best)
        missing -= candidates.pop(best)
    return found


def pairs(cell: Cell) -> set[tuple[Any, ...]]:
    """Every two values that occur together in a cell, with the names of their axes."""
    values = [(field.name, value) for field, value in zip(fields(cell), astuple(cell), strict=True)]
    return set(itertools.combinations(values, 2))


def recipe_tree(cell: Cell, inputs: Path, run_dir: Path) -> dict[str, Any]:
    """A cell as a recipe, not yet checked against the rules.

    Adam divides by a gradient's size: where that is below epsilon's default (1e-8), an update is the sign of a rounding
    error. With 1e-5 the weights say what the gradients say.
    """
    engine, _, extra = cell.engine.partition("+")
    elastic = engine == "elastic"
    return {
        "run_dir": str(run_dir),
        "resume": "never",
        "steps": STEPS,
        "deterministic": "elastic" if elastic else "off",
        "model": {
            "name": str(inputs / "tiny"),
            "dtype": cell.dtype,
            "activation_checkpointing": cell.checkpointing,
            "compile": cell.compiled,
        },
        "optim": {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.1},
        "parallel": {
            "engine": "ddp" if elastic else engine,
            "offload": "cpu" if extra == "offload" else "none",
            "tensor": 2 if extra == "tensor" else 1,
            "context": 2 if extra == "context" else 1,
            "timeout_s": 600,
        },
        **_method(cell, inputs),
    }


def _method(cell: Cell, inputs: Path) -> dict[str, Any]:
    batch = {"size": 8, "micro": min(cell.micro, 8), "packing": cell.packing}
    if cell.method == "sft":
        return {"method": "sft", "data": {"train": str(inputs / "chat.jsonl")}, "batch": batch}
    if cell.method == "pretrain":
        return {"method": "pretrain", "data": pretraining_data(inputs), "batch": batch}
    if cell.method == "dpo":
        return {
            "method": "dpo",
            "data": {"train": str(inputs / "pairs.jsonl")},
            "batch": {**batch, "size": 6, "micro": min(cell.micro, 6)},
            "lora": {"rank": 4},
            "dpo": {"sft_weight": 0.3},
        }
    short_words = {"min_word_len": 3, "max_word_len": 4}  # this verifier pays for single letters, so rewards differ
    return {
        "method": "grpo",
        "data": {"train": "task:spell_backward"},
        "batch": {**batch, "size": 16, "micro": min(cell.micro, 16)},
        "lora": {"rank": 4},
        "grpo": {"group_size": 4, "max_new_tokens": 6, "inner_steps": 2, "beta": 0.05, "task_options": short_words},
    }


def pretraining_data(inputs: Path) -> dict[str, Any]:
    return {"train": str(inputs / "text.jsonl"), "tokens": str(inputs / "tokens"), "max_tokens": 96}


def refusal(cell: Cell, inputs: Path) -> str | None:
    """The recipe rule that refuses a cell, in its own words; None if none does."""
    if is_shared(cell.engine) and cell.world == 1:
        shared = (
            "tensor: two ranks share a layer" if cell.engine.endswith("+tensor") else "context: two ranks share a row"
        )
        return f"parallel.{shared}, and one is none of their multiples; use two or four"
    try:
        parse_recipe(recipe_tree(cell, inputs, Path("run")))
    except ValueError as error:
        return str(error)
    return None


def same_bits(cell: Cell) -> Cell:
    """The cell of one rank whose weights an elastic cell must equal bit by bit."""
    return replace(cell, world=1, checkpointing="none")


def cost_tree(engine: str, world: int, inputs: Path, run_dir: Path) -> dict[str, Any]:
    """A job of a size at which a step is mostly arithmetic, for comparing seconds: 8 micro-batches of one sample."""
    tree = recipe_tree(Cell("sft", engine, world, 1, True, "none", False), inputs, run_dir)
    return {**tree, "steps": COST_STEPS, "model": {**tree["model"], "name": str(inputs / "wide")}}
