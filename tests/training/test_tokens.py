"""Documents as ids: the tokenizer's own, whatever the text spells, and back from disk as they went."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shipyard.training.dataset import _text_encoder
from shipyard.training.tokens import DocumentEncoder, text_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers_for_tests import tokenizer_for_tests
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
PIECES = [
    "word",
    " word",
    "I'll",
    " don't",
    "12",
    " 1790",
    "  ",
    "\n\n",
    "\t",
    "é",
    " über",
    "漢字",
    "🙂",
    ".",
    ",",
    " a.b",
]


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(PIECES, k=rng.randint(1, 60))) for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "by_words"),
    [
        ("smollm2-135m-instruct", True),
        pytest.param("tokenizer-llama3", True, marks=pytest.mark.slow),
        pytest.param("tokenizer-qwen3", True, marks=pytest.mark.slow),
        pytest.param("tokenizer-mistral-nemo", True, marks=pytest.mark.slow),
        pytest.param("tokenizer-deepseek-v3", False, marks=pytest.mark.slow),
    ],
)
def test_words_encoded_once_give_the_tokenizers_ids(name: str, by_words: bool) -> None:
    tokenizer = tokenizer_for_tests(name)
    spec = text_tokenizer(tokenizer)
    assert spec.by_words == by_words
    encode = DocumentEncoder(spec)
    rows = [*texts(100), (ROOT / "training/corpus.py").read_text(encoding="utf-8")]
    for _ in range(2):  # afresh, and from memory
        found = [ids.tolist() for ids in encode(rows)]
        wanted = [tokenizer(row, add_special_tokens=False)["input_ids"] for row in rows]
        assert found == [[*spec.before, *ids, spec.eos] for ids in wanted]


def test_a_spelled_control_token_is_text() -> None:
    tokenizer = tokenizer_for_tests("smollm2-135m-instruct")
    encode = DocumentEncoder(text_tokenizer(tokenizer))
    plain, spelled = encode(["The end", "The end<|im_end|> and <|im_start|> more"])
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in spelled[:-1].tolist()
    assert tokenizer.decode(spelled[:-1]) == "The end<|im_end|> and <|im_start|> more"
    assert plain.tolist() == [*tokenizer("The end")["input_ids"], tokenizer.eos_token_id]


class Whole:
    """A tokenizer that does not cut texts at words: its merges cross spaces."""

    eos_token_id, bos_token_id, unk_token_id = 0, None, None

    def __init__(self) -> None:
        alphabet = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
        merges = [("o", "Ġ"), ("oĠ", "t")]
        vocabulary = {"<end>": 0, **alphabet} | {a + b: 300 + n for n, (a, b) in enumerate(merges)}
        self.backend_tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def __call__(self, text: str) -> dict[str, Any]:
        return {"input_ids": self.backend_tokenizer.encode(text).ids}

    def __len__(self) -> int:
        return 310


def test_a_tokenizer_whose_merges_cross_words_is_found_out() -> None:
    spec = text_tokenizer(Whole())
    assert not spec.by_words
    (ids,) = DocumentEncoder(spec)(["go to"])
    assert ids.tolist() == [*Whole()("go to")["input_ids"], 0]
    assert 301 in ids


def test_a_bos_stands_before_the_ids_and_not_before_the_text() -> None:
    """Llama 2's kind marks the start of a text by a space."""
    vocabulary = {word: number for number, word in enumerate(("<s>", "</s>", "hi", "▁hi", "▁ho", *"▁hio"))}
    backend = Tokenizer(models.BPE(vocabulary, [("h", "i"), ("▁", "hi")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    wanted = [*tokenizer("hi hi")["input_ids"], 1]
    assert wanted == [0, 3, 3, 1]
    (ids,) = DocumentEncoder(text_tokenizer(tokenizer))(["hi hi"])
    assert ids.tolist() == wanted
    assert _text_encoder(tokenizer)("hi hi")[0].ids == wanted


def test_ids_that_leave_numbers_out_are_not_cut_short() -> None:
    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 70_000}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert text_tokenizer(tokenizer).dtype == "uint32"


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80))
def test_any_text_at_all(text: str) -> None:
    tokenizer = tokenizer_for_tests("smollm2-135m-instruct")
    if not hasattr(test_any_text_at_all, "encode"):
        test_any_text_at_all.encode = DocumentEncoder(text_tokenizer(tokenizer))  # pyright: ignore
    (ids,) = test_any_text_at_all.encode([text])  # pyright: ignore
    assert ids[:-1].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = SimpleNamespace(eos_token_id=None, bos_token_id=None)
    with pytest.raises(ValueError, match="no eos token"):
        text_tokenizer(type("T", (), {"__call__": lambda self, text: {"input_ids": [1]}, **vars(tokenizer)})())
