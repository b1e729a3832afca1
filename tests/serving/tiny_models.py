"""Small random models with tokenizers of their own, whose faults are as loud as a real model's."""

from pathlib import Path
from typing import Any

import torch
from shipyard.serving.probes import TEXTS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n"
    "{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
NUMBERS_BY_THREE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUMBERS_BY_ONE = NUMBERS_BY_THREE.replace("{1,3}", "")


def split(pattern: str) -> Any:
    """The pre-tokenizer of Llama 3 and Qwen: a regular expression, then bytes."""
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


PRE = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
    "llama-bpe": lambda: split(NUMBERS_BY_THREE),
    "qwen2": lambda: split(NUMBERS_BY_ONE),
}


def make_tokenizer(pre: str, bos: bool = False, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the probe texts; `bos`: it puts <s> before every text."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for text in TEXTS for _ in range(2)], trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if bos else None, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = "{{ bos_token }}" + template if bos and template else template
    return fast


SHAPES: dict[str, tuple[type, type, dict[str, Any], str, bool]] = {
    # name: config, model, what makes it hard, pre, BOS
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}, "smollm", False),
    "llama-3.1": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "tie_word_embeddings": False,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        "llama-bpe",
        True,
    ),
    "mistral": (
        MistralConfig,
        MistralForCausalLM,
        {"sliding_window": None, "tie_word_embeddings": False},
        "gpt-2",
        True,
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}, "qwen2", False),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": False, "head_dim": 32}, "qwen2", False),
}


def make_model(folder: Path, name: str = "llama", template: str | None = CHATML, seed: int = 0) -> Path:
    """Write a two-layer model of the named shape and its tokenizer to `folder`."""
    config_class, model_class, hard, pre, bos = SHAPES[name]
    tokenizer = make_tokenizer(pre, bos, template)
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    ends = {"bos_token_id": 3 if bos else None, "eos_token_id": 2, "pad_token_id": 0}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}
    model = model_class(config_class(**{**shape, **heads, **ends, **rope, **hard}))
    for tensor_name, tensor in model.named_parameters():
        if tensor_name.endswith("norm.weight"):
            torch.nn.init.normal_(tensor, 1.0, 0.1)
        else:  # loud enough that attention is far from uniform, as in a trained model
            torch.nn.init.normal_(tensor, 0.0, 0.25)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
