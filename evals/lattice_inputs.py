"""What the invariance lattice trains: a two-layer Llama with its own tokenizer, and rows of very different lengths."""

import json
from pathlib import Path
from typing import Any

from ..launch.workers import runner
from ..training.preparation import build
from ..training.recipe import parse_recipe
from .lattice import Cell, recipe_tree

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda"]


def write_inputs(folder: Path) -> None:
    """Write `tiny` and `wide` (models with a tokenizer), `chat.jsonl`, `text.jsonl` and `pairs.jsonl`; build `tokens`.

    22 rows in batches of 8 and 11 pairs in batches of 6 leave ragged windows at the end of an epoch.
    """
    write_model(folder / "tiny", width=64, layers=2)
    write_model(folder / "wide", width=256, layers=4)
    _write_rows(folder / "chat.jsonl", [_conversation(number) for number in range(1, 23)])
    _write_rows(folder / "text.jsonl", [{"text": _counted(number)} for number in range(1, 23)])
    _write_rows(folder / "pairs.jsonl", [_pair(number, word) for number, word in enumerate(WORDS)])
    cell = Cell("pretrain", "ddp", 1, 1, True, "none", False)
    recipe = parse_recipe(recipe_tree(cell, folder, folder))
    build(recipe, runner("local", 1), lambda line: None)


def write_model(folder: Path, width: int, layers: int) -> None:
    """A Llama of fixed random weights, fp32, over bytes and three control tokens."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIALS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)


def _counted(number: int) -> str:
    return " ".join(map(str, range(1, 2 + number * (1 + number % 4))))


def _conversation(number: int) -> dict[str, Any]:
    asked = f"Count to {number}, please." * (1 + number % 3)
    turns = (("user", asked), ("assistant", _counted(number)))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _pair(number: int, word: str) -> dict[str, str]:
    return {
        "prompt": f"Say {word}.",
        "chosen": f"{word}! " * (1 + number % 4),
        "rejected": "No. " * (1 + number % 3),
    }


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
