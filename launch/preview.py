"""What a recipe would do, without doing it: the resolved recipe, rows as the model will see them, expected memory."""

import itertools
import json
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..training.recipe import Recipe, dump_recipe

ROWS = 3
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


@dataclass(frozen=True)
class RowView:
    """One sequence of T tokens: where it came from, its ids, which of them are supervised, and their text."""

    source: str
    ids: list[int]
    supervised: list[bool]
    text: list[str]


@dataclass(frozen=True)
class Preview:
    """Rows to show, how many there are, where documents meet in the first packed row, and what could not be had."""

    rows: list[RowView]
    train_rows: int | None
    validation_rows: int | None
    boundaries: list[int]
    notes: list[str]


def dry_run(recipe: Recipe, as_json: bool) -> None:
    """Print the resolved recipe, the first rows and the memory table. Writes nothing, trains nothing, stays offline.

    What is not on this machine (a hub's tokenizer or data) is said in a line; wrong data raises ValueError, as it
    would in training.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    memory, memory_note = _memory(recipe, world_size)
    preview = look(recipe, ROWS)
    notes = [*preview.notes, *([memory_note] if memory_note else [])]
    if as_json:
        tree = {
            "recipe": recipe.model_dump(mode="json"),
            **asdict(preview),
            "memory_bytes": dict(memory),
            "notes": notes,
        }
        print(json.dumps(tree, ensure_ascii=False))
        return
    console = Console(highlight=False)
    console.print(dump_recipe(recipe).rstrip(), markup=False, soft_wrap=True)
    console.print()
    _print_rows(console, preview)
    if memory:
        from .tables import print_memory

        print_memory(memory, world_size)
    _print_notes(console, notes)


def inspect(recipe: Recipe, count: int, as_json: bool) -> None:
    """Print `count` rows as the model will see them."""
    preview = look(recipe, count)
    if as_json:
        print(json.dumps(asdict(preview), ensure_ascii=False))
        return
    console = Console(highlight=False)
    _print_rows(console, preview)
    _print_notes(console, preview.notes)


def look(recipe: Recipe, count: int) -> Preview:
    """Load the tokenizer and the data as training would, and view the first rows. Raises ValueError for bad data."""
    from ..training.models import load_tokenizer
    from ..training.rows import local_path

    name = recipe.model.tokenizer or recipe.model.name
    missing = [f"data: {recipe.data.train} is not on this machine"] if is_hub_name(recipe.data.train) else []
    try:
        tokenizer = load_tokenizer(recipe.model)
    except ValueError as error:
        if Path(name).is_file() or name.startswith("asset:"):
            raise  # no run to come, and no download, makes a model of it
        if recipe.data.tokens is None and not recipe.data.train.startswith("task:"):
            local_path(recipe.data.train)
        why = str(error) if Path(name).is_dir() else f"tokenizer: {name} is not on this machine"
        return Preview([], None, None, [], [f"{why}, so no rows are shown", *missing])
    if recipe.method == "grpo":
        return _view_questions(recipe, tokenizer, count)
    if recipe.data.tokens is not None:
        return _view_shards(recipe, tokenizer, count)
    try:
        return _view_rows(recipe, tokenizer, count)
    except ValueError:
        if not missing:
            raise
        return Preview([], None, None, [], missing)


def is_hub_name(name: str) -> bool:
    """True for `owner/name` when no such path exists: data that would come from the hub."""
    is_path = name.endswith(DATA_SUFFIXES) or Path(name).exists()
    return not is_path and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _memory(recipe: Recipe, world_size: int) -> tuple[list[tuple[str, int]], str | None]:
    from .plan import dry_memory

    try:
        return dry_memory(recipe, world_size), None
    except (OSError, KeyError):
        return [], f"memory: the shape of {recipe.model.name} is not known here; set model.shape"
    except ValueError as error:
        return [], f"memory: {error}"


def _view_rows(recipe: Recipe, tokenizer: Any, count: int) -> Preview:
    from ..training.dataset import Pair, load_dataset

    logging.getLogger(load_dataset.__module__).setLevel(logging.ERROR)  # it names a file that is gone in a moment
    with tempfile.TemporaryDirectory() as scratch:
        data = load_dataset(recipe, tokenizer, Path(scratch))
    samples: list[Any] = []
    for item in data.train[:count]:
        samples += [item.chosen, item.rejected] if isinstance(item, Pair) else [item]
    views = [_view(sample, tokenizer) for sample in samples]
    notes = [f"data: {data.quarantined} rows would be set aside"] if data.quarantined else []
    ends = [len(view.ids) for view in views[: recipe.batch.micro]]
    boundaries = [sum(ends[:n]) for n in range(len(ends) + 1)] if recipe.batch.packing else []
    return Preview(views, len(data.train), len(data.validation), boundaries, notes)


def _view_shards(recipe: Recipe, tokenizer: Any, count: int) -> Preview:
    """The first packed rows of the first step, document by document."""
    from ..training.pretrain import Pretraining, open_shards

    try:
        shards = open_shards(recipe, tokenizer)
    except ValueError as error:
        if "holds no token shards" not in str(error):
            raise
        return Preview([], None, None, [], [str(error)])
    method = Pretraining(recipe, shards)
    rows = method.batch(0)[:count]
    views: list[RowView] = []
    for number, row in enumerate(rows):
        for part in row.parts:
            ids = part.tolist()
            text = [tokenizer.decode([token]) for token in ids]
            views.append(RowView(f"step 1, row {number + 1}", ids, [False] + [True] * (len(ids) - 1), text))
    boundaries = [0, *itertools.accumulate(map(len, rows[0].parts))]
    note = f"{shards.counts['train']:,} documents, in {method.rows:,} rows of {recipe.data.max_tokens} tokens an epoch"
    return Preview(views, method.rows, shards.counts["validation"], boundaries, [note])


def _view_questions(recipe: Recipe, tokenizer: Any, count: int) -> Preview:
    """A task's questions as the policy is asked them; the replies do not exist yet, so nothing is supervised."""
    from ..training.chat import ChatEncoder
    from ..training.grpo import question_prompt
    from ..training.tasks import Task

    task, encoder = Task(recipe.data.train, recipe.grpo.task_options, recipe.seed), ChatEncoder(tokenizer)
    views = []
    for number in range(count):
        ids = question_prompt(encoder, recipe, task.question(number))
        text = [tokenizer.decode([token]) for token in ids]
        views.append(RowView(f"{recipe.data.train}:{number}", ids, [False] * len(ids), text))
    return Preview(
        views, None, None, [], [f"data: {recipe.data.train} generates its questions, a verifier scores replies"]
    )


def _view(sample: Any, tokenizer: Any) -> RowView:
    ids = [int(token) for token in sample.ids]
    text = [tokenizer.decode([token]) for token in ids]
    return RowView(sample.source, ids, [bool(flag) for flag in sample.mask], text)


def _print_rows(console: Console, preview: Preview) -> None:
    if preview.train_rows is not None:
        console.print(f"{preview.train_rows} rows to train on, {preview.validation_rows} held out", style="bold")
    for view in preview.rows:
        supervised = sum(view.supervised)
        head = f"{view.source}: {len(view.ids)} tokens, {supervised} supervised (green)"
        console.print(Text(head), style="bold", soft_wrap=True)
        console.print(_coloured(view.text, view.supervised), soft_wrap=True)
        console.print("ids  " + " ".join(map(str, view.ids)), style="dim", soft_wrap=True)
        console.print("mask " + "".join("#" if flag else "." for flag in view.supervised), style="dim", soft_wrap=True)
        console.print()
    if preview.boundaries:
        console.print(f"packed into one row, these documents meet at {preview.boundaries}\n")


def _print_notes(console: Console, notes: Sequence[str]) -> None:
    for note in notes:  # names and messages hold brackets of their own
        console.print(Text.assemble(("note:", "yellow"), " ", note), soft_wrap=True)


def _coloured(pieces: Sequence[str], supervised: Sequence[bool]) -> Text:
    text = Text()
    for index, (piece, flag) in enumerate(zip(pieces, supervised, strict=True)):
        shade = ("bold green", "green underline") if flag else ("", "dim")
        text.append(piece.replace("\n", "\\n\n"), style=shade[index % 2])
    return text
