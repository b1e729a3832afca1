"""The real tokenizers the tests run on, fetched into the asset cache the first time and loaded once a process."""

from functools import cache
from typing import Any

from shipyard.launch.assets import resolve
from transformers import AutoTokenizer

TOKENIZERS = ("tokenizer-llama3", "tokenizer-deepseek-v3", "tokenizer-qwen3", "tokenizer-mistral-nemo")
NAMES = ("smollm2-135m-instruct", *TOKENIZERS)


@cache
def tokenizer_for_tests(name: str) -> Any:
    return AutoTokenizer.from_pretrained(resolve(f"asset:{name}"))
