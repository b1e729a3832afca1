"""A recipe's data, read, checked, split and encoded: what the loop trains on.

Which rows train and which validate is a function of the seed and the rows alone. Rows that hold the same conversation
stay on one side of the split. Rows that are left out are counted and written to RUN/quarantine.jsonl with file:line and
the reason; without policy `quarantine` the first of them stops the run.
"""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from .chat import ChatEncoder, Encoded
from .control_tokens import ControlTokens
from .formats import Conversation, Preference, check_templates, to_conversation, to_preference, to_text
from .quarantine import Quarantine, Row
from .recipe import Data, Recipe
from .rows import inside, read_into

QUARANTINE = "quarantine.jsonl"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One document: `ids` (T) int32, and `mask` (T) bool, true where the token is a target."""

    source: str
    ids: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Pair:
    """A preference: both samples begin with the same prompt ids, and only the replies are targets."""

    source: str
    chosen: Sample
    rejected: Sample


Item = Sample | Pair
ItemT = TypeVar("ItemT", Sample, Pair)


@dataclass(frozen=True)
class Dataset:
    """What a run trains and validates on, and what was left out: rows in quarantine, samples cut at max_tokens."""

    train: list[Sample] | list[Pair]
    validation: list[Sample] | list[Pair]
    quarantined: int
    quarantine_path: Path | None
    truncated: int = 0
    outside: int = 0
    """Rows that data.where leaves aside, by the recipe's wish: counted, not quarantined."""
    digest: str = ""
    """Of the rows to train on, as they were read, in order."""


@dataclass(frozen=True)
class _Document:
    """A checked row, not encoded yet. Equal keys are equal documents."""

    row: Row
    key: str
    content: Conversation | Preference | str


def load_dataset(recipe: Recipe, tokenizer: Any, run_dir: Path) -> Dataset:
    """Read and encode the recipe's data: `Pair`s for method dpo, `Sample`s otherwise.

    Raises ValueError, one line, for a bad row (policy stop), for a data set too small for what the recipe asks of it,
    and for a tokenizer without a chat template (unless the format is text).
    """
    data = recipe.data
    if data.train.startswith("task:"):
        raise ValueError(f"data.train: {data.train} generates its rows; only method grpo reads tasks")
    check_templates(data)
    quarantine = Quarantine(data.on_bad_row)
    encode = _Encoder(recipe, tokenizer, quarantine)
    groups = _shuffled(_documents(data.train, recipe, quarantine), recipe.seed)
    if data.validation is not None:
        held_out = _shuffled(_documents(data.validation, recipe, quarantine), recipe.seed)
        validation = encode.take(held_out, data.validation_rows, "data.validation_rows")
        seen = {group[0].key for group in held_out}
        for document in (document for group in groups if group[0].key in seen for document in group):
            quarantine.refuse(document.row.source, "the validation set holds the same row", document.row.values)
        groups = [group for group in groups if group[0].key not in seen]
    else:
        validation, groups = encode.hold_out(groups, data.validation_rows)
    digest = xxhash.xxh3_128()
    train = encode.take(groups, data.train_rows, "data.train_rows", digest)
    path = quarantine.write(run_dir / QUARANTINE)
    if not train:
        outside = f"; {quarantine.outside} are outside data.where" if quarantine.outside else ""
        reason = "; the first: {source}: {reason}".format(**quarantine.entries[0]) if quarantine.entries else ""
        raise ValueError(f"data.train: {data.train} leaves no row to train on{outside}{reason}")
    if path:
        logger.warning("data: %d rows left out, with reasons in %s", len(quarantine.entries), path)
    if encode.truncated:
        logger.warning("data: %d samples cut at data.max_tokens: %d", encode.truncated, data.max_tokens)
    counts = len(quarantine.entries), path, encode.truncated, quarantine.outside
    return Dataset(train, validation, *counts, digest.hexdigest())  # type: ignore[arg-type]


def _documents(name: str, recipe: Recipe, quarantine: Quarantine) -> list[_Document]:
    data, documents = recipe.data, []
    for row in read_into(quarantine, name, data.split):
        if not inside(row, data):
            quarantine.outside += 1
            continue
        try:
            content = _content(row, recipe.method, data)
        except ValueError as error:
            quarantine.refuse(row.source, str(error).removeprefix(f"{row.source}: "), row.values)
            continue
        documents.append(_Document(row, _key(content), content))
    return documents


def _content(row: Row, method: str, data: Data) -> Conversation | Preference | str:
    if method == "dpo":
        return to_preference(row, data)
    return to_text(row) if data.format == "text" else to_conversation(row, data)


def _key(content: Conversation | Preference | str) -> str:
    if isinstance(content, str):
        return content
    fields = {name: value for name, value in vars(content).items() if name != "source"}
    return json.dumps(fields, sort_keys=True, ensure_ascii=False, default=str)


def _shuffled(documents: list[_Document], seed: int) -> list[list[_Document]]:
    """Group equal documents, and put the groups into the seed's order."""
    groups: dict[str, list[_Document]] = {}
    for document in documents:
        groups.setdefault(document.key, []).append(document)
    ordered = list(groups.values())
    return [ordered[index] for index in np.random.default_rng(seed).permutation(len(ordered))]


class _Encoder:
    """Turns documents into items, and keeps count of what the length limit does to them."""

    def __init__(self, recipe: Recipe, tokenizer: Any, quarantine: Quarantine) -> None:
        self._data = recipe.data
        self._quarantine = quarantine
        self.truncated = 0
        self._encode: Callable[[Any], list[Encoded]]
        if recipe.data.format == "text" and recipe.method != "dpo":
            self._encode = _text_encoder(tokenizer)
        else:
            chat = ChatEncoder(tokenizer)
            self._encode = lambda content: _encode_chat(chat, content)

    def take(
        self, groups: Iterable[list[_Document]], rows: int, field: str, digest: xxhash.xxh3_128 | None = None
    ) -> list[Any]:
        """Encode documents in order until there are `rows` items; all of them if 0. They go into `digest`."""
        items: list[Item] = []
        for document in (document for group in groups for document in group):
            if rows and len(items) == rows:
                break
            if item := self._item(document):
                items.append(item)
                if digest is not None:
                    digest.update(json.dumps(document.key).encode())
        if len(items) < rows:
            raise ValueError(
                f"{field}: {rows} asked for, and only {len(items)} rows are usable; ask for fewer, or 0 for all"
            )
        return items

    def hold_out(self, groups: list[list[_Document]], rows: int) -> tuple[list[Any], list[list[_Document]]]:
        """Encode the first groups that fit into `rows` items; return them and the groups left for training."""
        total = sum(map(len, groups))
        if rows and rows >= total:
            raise ValueError(f"data.validation_rows: {rows} of {total} rows leaves none to train on; hold out fewer")
        items: list[Item] = []
        left: list[list[_Document]] = []
        for number, group in enumerate(groups):
            if len(items) == rows:
                left += groups[number:]
                break
            if len(items) + len(group) > rows:
                left.append(group)
            else:
                items += [item for document in group if (item := self._item(document))]
        if len(items) < rows:
            raise ValueError(
                f"data.validation_rows: {rows} asked for, and only {len(items)} rows are usable; hold out fewer"
            )
        return items, left

    def _item(self, document: _Document) -> Item | None:
        source = document.row.source
        try:
            encoded = self._encode(document.content)
        except ValueError as error:
            if str(error).startswith("model."):  # the tokenizer's fault, not the row's
                raise
            self._quarantine.refuse(source, str(error), document.row.values)
            return None
        samples: list[Sample] = []
        for one in encoded:
            sample = self._fit(source, one, document)
            if sample is None:  # the row is left out, and counted, once
                return None
            samples.append(sample)
        if len(samples) == 2 and np.array_equal(samples[0].ids, samples[1].ids):
            reason = "chosen and rejected are the same tokens, so there is nothing to prefer; remove the row"
            if any(len(one.ids) > self._data.max_tokens for one in encoded):
                reason = "chosen and rejected differ behind data.max_tokens alone; raise it"
            self._quarantine.refuse(source, reason, document.row.values)
            return None
        self.truncated += sum(len(one.ids) > self._data.max_tokens for one in encoded)
        return samples[0] if len(samples) == 1 else Pair(source, samples[0], samples[1])

    def _fit(self, source: str, encoded: Encoded, document: _Document) -> Sample | None:
        ids, mask, limit = encoded.ids, encoded.mask, self._data.max_tokens
        if not any(mask):
            reason = "nothing to learn: the tokenizer makes no token of it; remove the row"
            self._quarantine.refuse(source, reason, document.row.values)
            return None
        if len(ids) > limit:
            reason = f"{len(ids)} tokens, data.max_tokens is {limit}"
            if self._data.on_long_row == "stop":
                raise ValueError(f"{source}: {reason}; raise it, or set data.on_long_row: quarantine or truncate")
            if self._data.on_long_row == "quarantine":
                self._quarantine.put(source, reason, document.row.values)
                return None
            if not any(mask[:limit]):
                reason = f"{reason}, and cutting there leaves nothing to learn; raise data.max_tokens"
                self._quarantine.refuse(source, reason, document.row.values)
                return None
            ids, mask = ids[:limit], mask[:limit]
        return Sample(source, np.asarray(ids, np.int32), np.asarray(mask, np.bool_))


def _encode_chat(chat: ChatEncoder, content: Conversation | Preference) -> list[Encoded]:
    if isinstance(content, Conversation):
        return [chat.encode(content.messages, content.tools)]
    turns = len(content.prompt)
    both = [
        chat.encode([*content.prompt, *reply], content.tools, supervise_from=turns)
        for reply in (content.chosen, content.rejected)
    ]
    prompts = [one.ids[: one.mask.index(True)] for one in both]
    if prompts[0] != prompts[1]:
        raise ValueError("the chat template shows the prompt differently before the two replies; use another template")
    return both


def _text_encoder(tokenizer: Any) -> Callable[[str], list[Encoded]]:
    control = ControlTokens(tokenizer)
    bos = tokenizer("a")["input_ids"][:1]
    before = bos if bos == [tokenizer.bos_token_id] else []
    if tokenizer.eos_token_id is None:
        raise ValueError("model.tokenizer: it has no eos token, which ends a text; set eos_token")

    def encode(text: str) -> list[Encoded]:
        ids = [*before, *control.encode_text(text, first=True), tokenizer.eos_token_id]
        return [Encoded(ids, [False] + [True] * (len(ids) - 1))]

    return encode
