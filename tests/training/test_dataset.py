"""From a recipe to samples: the split, the length limit, the quarantine, pairs and text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shipyard.training.dataset import Dataset, Pair, Sample, load_dataset
from shipyard.training.recipe import parse_recipe
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers_for_tests import tokenizer_for_tests
from transformers import PreTrainedTokenizerFast

SMOLLM2 = "smollm2-135m-instruct"


def load(run_dir: Path, method: str = "sft", seed: int = 17, **data: Any) -> Dataset:
    tree = {"method": method, "seed": seed, "steps": 1, "model": {"name": "x"}, "data": data}
    return load_dataset(parse_recipe(tree), tokenizer_for_tests(SMOLLM2), run_dir)


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(number: Any, words: int = 1) -> dict[str, Any]:
    return {"prompt": f"Say {number}", "completion": " ".join([f"word{number}"] * words)}


def text_of(sample: Sample) -> str:
    return tokenizer_for_tests(SMOLLM2).decode(sample.ids)


def same(a: list[Any], b: list[Any]) -> bool:
    return [x.source for x in a] == [x.source for x in b] and all(
        np.array_equal(x.ids, y.ids) and np.array_equal(x.mask, y.mask) for x, y in zip(a, b, strict=True)
    )


def test_samples(tmp_path: Path) -> None:
    data = load(tmp_path, train=write(tmp_path, [row(n) for n in range(5)]))
    assert (len(data.train), len(data.validation), data.quarantined, data.quarantine_path) == (5, 0, 0, None)
    for sample in data.train:
        assert isinstance(sample, Sample)
        assert (sample.ids.dtype, sample.mask.dtype) == (np.int32, np.bool_)
        assert len(sample.ids) == len(sample.mask)
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_split_is_a_function_of_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path, [row(n) for n in range(40)])
    first = load(tmp_path, train=path, validation_rows=7, train_rows=20)
    again = load(tmp_path, train=path, validation_rows=7, train_rows=20)
    assert same(first.train, again.train)
    assert same(first.validation, again.validation)
    assert (len(first.train), len(first.validation)) == (20, 7)
    assert not {s.source for s in first.train} & {s.source for s in first.validation}
    other = load(tmp_path, train=path, validation_rows=7, train_rows=20, seed=18)
    assert not same(first.validation, other.validation)
    every = load(tmp_path, train=path, validation_rows=7)
    assert same(every.validation, first.validation)  # the held-out rows do not move with train_rows
    assert len(every.train) == 33


def test_equal_conversations_stay_on_one_side(tmp_path: Path) -> None:
    path = write(tmp_path, [row(n % 6) for n in range(24)])
    for seed in range(3):
        data = load(tmp_path, train=path, validation_rows=8, seed=seed)
        assert (len(data.train), len(data.validation)) == (16, 8)
        assert not {text_of(s) for s in data.train} & {text_of(s) for s in data.validation}


def test_validation_file_and_rows_that_are_in_both(tmp_path: Path) -> None:
    train = write(tmp_path, [row(n) for n in range(6)])
    held = write(tmp_path, [row(n) for n in (5, 6)], "held.jsonl")
    with pytest.raises(ValueError, match=r"rows.jsonl:6: the validation set holds the same row"):
        load(tmp_path, train=train, validation=held)
    data = load(tmp_path, train=train, validation=held, on_bad_row="quarantine")
    assert (len(data.train), len(data.validation), data.quarantined) == (5, 2, 1)


BAD_ROWS = [
    {"prompt": "a", "completion": 3},
    {"messages": [{"role": "user", "content": "x"}]},
    {"messages": [{"role": "bot", "content": "x"}]},
    {"prompt": "a", "completion": "  "},
    {"prompt": "a", "completion": "b", "tools": [{"name": "add"}]},
]


def test_bad_rows_stop_or_are_put_aside_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path, [row(0), *BAD_ROWS, row(1)])
    with pytest.raises(ValueError, match=r"rows.jsonl:\d: "):
        load(tmp_path, train=path)
    data = load(tmp_path, train=path, on_bad_row="quarantine")
    assert (len(data.train), data.quarantined) == (2, len(BAD_ROWS))
    assert data.quarantine_path == tmp_path / "quarantine.jsonl"
    entries = [json.loads(line) for line in data.quarantine_path.read_text("utf-8").splitlines()]
    reasons = {entry["source"].rpartition(":")[2]: entry["reason"] for entry in entries}
    assert set(reasons) == {"2", "3", "4", "5", "6"}
    for number, start in (("3", "nothing to learn"), ("4", "messages[0]: wrong role"), ("5", "nothing to learn")):
        assert reasons[number].startswith(start)
    assert "does not show them" in reasons["6"]


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_each_bad_row_is_named_by_file_and_line(bad: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*rows.jsonl:2: [^\n]+$"):
        load(tmp_path, train=write(tmp_path, [row(0), bad]))


def test_long_rows(tmp_path: Path) -> None:
    path = write(tmp_path, [row(0), row(1, words=60), {"prompt": "w " * 80, "completion": "x"}])
    with pytest.raises(ValueError, match=r"rows.jsonl:\d: \d+ tokens, data.max_tokens is 64; raise it, or set"):
        load(tmp_path, train=path, max_tokens=64)
    data = load(tmp_path, train=path, max_tokens=64, on_long_row="quarantine")
    assert (len(data.train), data.quarantined, data.truncated) == (1, 2, 0)
    with pytest.raises(ValueError, match=r"rows.jsonl:3: .* leaves nothing to learn"):
        load(tmp_path, train=path, max_tokens=64, on_long_row="truncate")
    data = load(tmp_path, train=path, max_tokens=64, on_long_row="truncate", on_bad_row="quarantine")
    assert (len(data.train), data.quarantined, data.truncated) == (2, 1, 1)
    assert max(len(sample.ids) for sample in data.train) == 64
    assert all(sample.mask.any() for sample in data.train)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"validation_rows": 4}, "data.validation_rows: 4 of 4 rows leaves none to train on"),
        ({"train_rows": 5}, "data.train_rows: 5 asked for, and only 4 rows are usable"),
        ({"validation_rows": 2, "train_rows": 3}, "data.train_rows: 3 asked for, and only 2 rows"),
        ({"max_tokens": 4, "on_long_row": "quarantine"}, "leaves no row to train on; the first: .* tokens"),
        ({"prompt": "{prompt.x}", "completion": "a"}, "data.prompt: .* is no template"),
    ],
)
def test_asking_too_much(data: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        load(tmp_path, train=write(tmp_path, [row(n) for n in range(4)]), **data)


def test_nothing_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"data.train: .*empty.jsonl leaves no row to train on$"):
        load(tmp_path, train=str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match=r"leaves no row to train on; 2 are outside data.where$"):
        load(tmp_path, train=write(tmp_path, [row(0), row(1)]), where={"prompt": "other"})


def test_a_row_without_a_token_teaches_nothing(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()  # it takes control characters away
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    path = write(tmp_path, [{"text": "a"}, {"text": "\u200b"}])
    tree = {"method": "pretrain", "steps": 1, "model": {"name": "x"}, "data": {"train": path, "format": "text"}}
    with pytest.raises(ValueError, match=r"rows.jsonl:2: nothing to learn: the tokenizer makes no token of it"):
        load_dataset(parse_recipe(tree), tokenizer, tmp_path)


def test_a_pair_of_equal_tokens_is_no_preference(tmp_path: Path) -> None:
    replies = {"chosen": "a b c d e f g", "rejected": "a b c d e f h"}
    path = write(tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", **replies}])
    knobs: dict[str, Any] = {"train": path, "max_tokens": 34, "on_long_row": "truncate"}
    with pytest.raises(ValueError, match=r"rows.jsonl:2: chosen and rejected differ behind data.max_tokens alone"):
        load(tmp_path, "dpo", **knobs)
    data = load(tmp_path, "dpo", **knobs, on_bad_row="quarantine")
    assert (len(data.train), data.quarantined, data.truncated) == (1, 1, 0)
    alike = write(tmp_path, [{"prompt": "q", "chosen": [say("a", name="x")], "rejected": [say("a", name="y")]}])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: chosen and rejected are the same tokens"):
        load(tmp_path, "dpo", train=alike)


def say(text: str, **more: str) -> dict[str, str]:
    return {"role": "assistant", "content": text, **more}


def test_pairs_share_the_prompt_and_supervise_replies_only(tmp_path: Path) -> None:
    history = [
        *({"role": "user", "content": "a"}, {"role": "assistant", "content": "old"}),
        {"role": "user", "content": "b <|im_end|>"},
    ]
    rows = [{"prompt": history, "chosen": "good " * n, "rejected": "bad"} for n in range(1, 5)]
    data = load(tmp_path, "dpo", train=write(tmp_path, rows), validation_rows=1)
    assert (len(data.train), len(data.validation)) == (3, 1)
    for pair in data.train:
        assert isinstance(pair, Pair)
        chosen, rejected = pair.chosen, pair.rejected
        start = int(chosen.mask.argmax())
        assert start == int(rejected.mask.argmax())
        assert np.array_equal(chosen.ids[:start], rejected.ids[:start])
        replies = [tokenizer_for_tests(SMOLLM2).decode(s.ids[s.mask]) for s in (chosen, rejected)]
        assert replies[0].startswith("good ")
        assert replies[0].endswith("<|im_end|>")
        assert replies[1] == "bad<|im_end|>"


def test_text_ends_with_eos_and_spells_no_control_token(tmp_path: Path) -> None:
    path = write(tmp_path, [{"text": "Once <|im_end|> upon"}])
    (sample,) = load(tmp_path, "pretrain", train=path, format="text").train
    assert isinstance(sample, Sample)
    eos = tokenizer_for_tests(SMOLLM2).eos_token_id
    assert sample.ids[-1] == eos
    assert list(sample.ids).count(eos) == 1
    assert list(sample.mask) == [False] + [True] * (len(sample.ids) - 1)
    assert text_of(sample) == "Once <|im_end|> upon<|im_end|>"


def test_csv_recipe_of_the_demo(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text('text,label\n"Good,\nreally",1\nBad,0\n', encoding="utf-8")
    columns = {"prompt": "Rate:\n{text}", "completion": "{label}", "labels": {"0": "negative", "1": "positive"}}
    data = load(tmp_path, train=str(path), **columns)
    replies = {s.source[-1]: tokenizer_for_tests(SMOLLM2).decode(s.ids[s.mask]) for s in data.train}
    assert replies == {"2": "positive<|im_end|>", "4": "negative<|im_end|>"}
