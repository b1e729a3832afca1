"""What a recipe needs of one rank's memory, from the model's shape alone: arithmetic, nothing is loaded.

Counts of parameters are exact. Activations are an upper estimate for a plain decoder whose attention keeps no T x T
matrix. Legend: T tokens in one micro-batch, D hidden size, V vocabulary, R LoRA rank.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..training.recipe import Recipe

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits, one 8-bit scale per 64 weights, one fp32 scale per 256 of those
CHUNK_LOGITS = 1 << 26  # as in training/loss.py, which would import torch
ATTENTION = ("q", "k", "v", "o")
SHAPES = Path(__file__).with_name("shapes")

Shape = Mapping[str, Any]


def read_shape(name: str) -> dict[str, Any]:
    """Return the model config launch/shapes/NAME.json. Raises ValueError that lists the shapes there are."""
    path = SHAPES / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(item.stem for item in SHAPES.glob("*.json")))
        raise ValueError(f"model.shape: {name!r} is not in launch/shapes; choose one of {known}")
    return json.loads(path.read_text(encoding="utf-8"))


def linears(config: Shape) -> Iterator[tuple[str, int, int]]:
    """Yield (name, inputs, outputs) for each linear layer of one decoder block."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    groups = config.get("num_key_value_heads") or heads
    inner = config["intermediate_size"]
    yield from (("q", width, heads * head), ("k", width, groups * head), ("v", width, groups * head))
    yield from (("o", heads * head, width), ("gate", width, inner), ("up", width, inner), ("down", inner, width))


def count_parameters(config: Shape) -> dict[str, int]:
    """Return exact parameter counts of a Llama-shaped decoder: embeddings (with an untied head), linears, norms."""
    width, vocabulary, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    block = 0
    for name, inputs, outputs in linears(config):
        bias = config.get("attention_bias", False) if name in ATTENTION else config.get("mlp_bias", False)
        block += inputs * outputs + (outputs if bias else 0)
    tables = 1 if config.get("tie_word_embeddings", False) else 2
    return {
        "embeddings": tables * vocabulary * width,
        "linears": layers * block,
        "norms": (2 * layers + 1) * width,
    }


def count_lora(config: Shape, rank: int, targets: str) -> int:
    """Return the number of LoRA weights: R x (inputs + outputs) for every adapted linear layer (Hu et al. 2021)."""
    block = sum(i + o for name, i, o in linears(config) if targets == "all-linear" or name in ATTENTION)
    return config["num_hidden_layers"] * rank * block


def estimate(recipe: Recipe, config: Shape, world_size: int) -> list[tuple[str, int]]:
    """Return (category, bytes) of one rank's peak, in the order it is filled. Offloaded state counts as host memory."""
    counts = count_parameters(config)
    total = sum(counts.values())
    trained = count_lora(config, recipe.lora.rank, recipe.lora.targets) if recipe.lora.rank else total
    width = DTYPE_BYTES[recipe.model.dtype]
    stage = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp2": 3}[recipe.parallel.engine]
    weights_ranks = world_size if stage >= 3 else 1

    frozen = recipe.lora.rank > 0
    # Trained weights are fp32, as in training/models.py; ZeRO computes in the recipe's dtype and keeps fp32 beside it.
    trained_width = width if stage and not frozen else 4

    base = _weights(recipe, counts, width if frozen or stage else 4)
    rows: list[tuple[str, float]] = [("weights", base / weights_ranks)]
    if frozen:
        rows.append(("LoRA weights", trained * 4 / weights_ranks))
    elif recipe.method == "dpo" or (recipe.method == "grpo" and recipe.grpo.beta > 0):
        rows.append(("reference model", total * width / weights_ranks))
    rows.append(("gradients", trained * trained_width / (world_size if stage >= 2 else 1)))
    place = " (host)" if recipe.parallel.offload == "cpu" else ""
    rows.append((f"optimizer{place}", _optimizer(trained, trained_width) / (world_size if stage >= 1 else 1)))
    rows.append(("activations", _activations(recipe, config, width)))
    rows.append(("logits and loss", _logits(recipe, config, width)))
    if recipe.method == "grpo":
        rows.append(("rollout cache", _rollout_cache(recipe, config, width, world_size)))
    return [(name, round(size)) for name, size in rows]


def _weights(recipe: Recipe, counts: Mapping[str, int], width: int) -> float:
    """NF4 takes the linear layers only; embeddings, head and norms keep the recipe's dtype."""
    linear_bytes = NF4_BYTES if recipe.model.quantize == "nf4" else width
    return counts["linears"] * linear_bytes + (counts["embeddings"] + counts["norms"]) * width


def _optimizer(trained: int, trained_width: int) -> int:
    """AdamW: two fp32 moments, and an fp32 copy of the weights where they are narrower."""
    return trained * (8 if trained_width == 4 else 12)


def _micro_tokens(recipe: Recipe) -> int:
    """T: the longest micro-batch. A preference pair is two sequences; a rollout is a prompt and its reply."""
    length = recipe.data.max_tokens + (recipe.grpo.max_new_tokens if recipe.method == "grpo" else 0)
    return recipe.batch.micro * length * (2 if recipe.method == "dpo" else 1)


def _activations(recipe: Recipe, config: Shape, width: int) -> float:
    """Kept for backward, per token and layer: both norms' inputs (fp32 inside) and outputs, q, k, v before and after
    RoPE, attention's output, gate, up, their activation and product. LoRA adds R per adapted layer and an fp32 copy of
    its input. With checkpointing: D per layer, and one whole layer again.
    """
    tokens, layers, hidden = _micro_tokens(recipe), config["num_hidden_layers"], config["hidden_size"]
    sizes = {name: (inputs, outputs) for name, inputs, outputs in linears(config)}
    heads = sum(sizes[name][1] for name in ("q", "k", "v"))
    block = (4 * hidden + 2 * heads + sizes["o"][0] + 4 * sizes["gate"][1]) * width + 2 * hidden * 4
    if recipe.lora.rank:
        adapted = [pair for name, pair in sizes.items() if recipe.lora.targets == "all-linear" or name in ATTENTION]
        block += 4 * (sum(inputs for inputs, _ in adapted) + recipe.lora.rank * len(adapted))
    if recipe.model.activation_checkpointing == "full":
        return tokens * (layers * hidden * width + block)
    return tokens * layers * block


def _logits(recipe: Recipe, config: Shape, width: int) -> int:
    """Logits and their gradient in the model's dtype, T x V at most, and a chunk of each in fp32."""
    logits = _micro_tokens(recipe) * config["vocab_size"]
    return 2 * width * logits + 2 * 4 * min(logits, CHUNK_LOGITS)


def _rollout_cache(recipe: Recipe, config: Shape, width: int, world_size: int) -> int:
    """Keys and values of one rank's share of the rollouts, prompt and reply."""
    sequences = -(-recipe.batch.size // world_size)
    length = recipe.data.max_tokens + recipe.grpo.max_new_tokens
    groups = next(outputs for name, _, outputs in linears(config) if name == "k")
    return sequences * length * config["num_hidden_layers"] * 2 * groups * width
