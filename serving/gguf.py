"""Write a Hugging Face model directory as one GGUF file, for the Llama, Mistral, Qwen2 and Qwen3 architectures.

What must be right, each fault measured (mean KL against the model): rows of q and k permuted for Llama's rotary layout,
k with its own head count (1.05 when not); `rope_freqs.weight` for Llama 3.1's scaling (0.75); `rope.freq_base` (0.05).
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors stream: one is in memory at a time.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

from .vocabulary import Vocabulary, read_json, read_vocabulary

KINDS = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
# Hugging Face architecture -> (GGUF's name, whether q and k rows are permuted: llama.cpp rotates Llama's in pairs)
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
}
LAYER_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
F16_MAX = 65504.0


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that GGUF's header and the tensors' layout need. `rope` is HF's rope_parameters."""

    architecture: str
    permuted: bool
    tied: bool
    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    rms_norm_eps: float
    rope_theta: float
    rope: dict[str, Any]


def read_shape(model_dir: Path) -> Shape:
    """Read config.json. Raises ValueError for an architecture, activation or rotary setting not written here."""
    config = read_json(model_dir / "config.json")
    names = config.get("architectures") or ["none"]
    if names[0] not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"model: architecture {names[0]!r}, GGUF is written for {known}; export with --to hf")
    architecture, permuted = ARCHITECTURES[names[0]]
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"model: hidden_act {config['hidden_act']!r}, llama.cpp computes silu; export with --to hf")
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise ValueError("model: config.json names no rope_theta; add the one it was trained with")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("model: partial_rotary_factor below 1 is not written; export with --to hf")
    context, window = config["max_position_embeddings"], config.get("sliding_window")
    if window and config.get("use_sliding_window", True):
        context = min(context, window)  # llama.cpp attends to everything: equal only while the window holds it all
    heads = config["num_attention_heads"]
    return Shape(
        architecture=architecture,
        permuted=permuted,
        tied=bool(config.get("tie_word_embeddings", False)),
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        feed_forward=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        context=context,
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=float(theta),
        rope=rope,
    )


def rope_kind(shape: Shape) -> str:
    """The name of the rotary scaling; older configs call the key `type`."""
    return shape.rope.get("rope_type", shape.rope.get("type", "default"))


def permute_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder each head's rows, (rows, ...), from HF's two halves to the neighbouring pairs that llama.cpp rotates."""
    rows = weight.shape[0]
    halves = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def llama3_rope_factors(shape: Shape) -> np.ndarray:
    """Per-frequency divisors of Llama 3.1's scaling, (head_dim / 2,) float32; as transformers' `llama3` rope type."""
    rope = shape.rope
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    exponents = np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim
    turns = trained * shape.rope_theta**-exponents / (2 * math.pi)  # full turns within the trained context
    smooth = (turns - low) / (high - low)
    mixed = 1 / ((1 - smooth) / factor + smooth)
    return np.where(turns < low, factor, np.where(turns > high, 1.0, mixed)).astype(np.float32)


class Weights:
    """The tensors of a model directory's safetensors files, by name, read one at a time."""

    def __init__(self, model_dir: Path) -> None:
        index = model_dir / "model.safetensors.index.json"
        names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        for name in names:
            if not (model_dir / name).is_file():
                raise ValueError(f"model: {model_dir} has no {name}; GGUF is written from safetensors")
        self.files = [safe_open(model_dir / name, framework="pt") for name in names]
        self.where = {key: file for file in self.files for key in file.keys()}  # noqa: SIM118

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self.where[name].get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored."""
        return self.where[name].get_tensor(name)


def gguf_name(name: str) -> str:
    """Translate a tensor's name. Raises ValueError for a tensor that the architectures here do not have."""
    stem, _, suffix = name.rpartition(".")
    if stem in TOP_TENSORS:
        return f"{TOP_TENSORS[stem]}.{suffix}"
    parts = stem.split(".", 3)
    if parts[:2] == ["model", "layers"] and len(parts) == 4 and parts[3] in LAYER_TENSORS:
        return f"blk.{parts[2]}.{LAYER_TENSORS[parts[3]]}.{suffix}"
    raise ValueError(f"model: tensor {name!r} has no place in GGUF; merge adapters first, or export with --to hf")


def tensor_type(shape: tuple[int, ...], kind: str) -> gguf.GGMLQuantizationType:
    """The type a tensor is stored in: vectors (norms, biases) f32; q8_0 needs rows of whole blocks of 32, else f16."""
    if len(shape) == 1:
        return KINDS["f32"]
    if kind == "q8_0" and shape[-1] % 32:
        return KINDS["f16"]
    return KINDS[kind]


def _encode(name: str, tensor: torch.Tensor, shape: Shape, stored: gguf.GGMLQuantizationType) -> np.ndarray:
    values = tensor.to(torch.float32).numpy()
    if shape.permuted and ".self_attn.q_proj." in name:
        values = permute_rows(values, shape.heads)
    if shape.permuted and ".self_attn.k_proj." in name:
        values = permute_rows(values, shape.kv_heads)
    if stored == KINDS["f16"] and np.abs(values).max(initial=0.0) > F16_MAX:
        raise ValueError(f"quant: {name} holds values beyond f16's {F16_MAX:.0f}; export bf16 or f32")
    return gguf.quants.quantize(np.ascontiguousarray(values), stored)


def _write_header(writer: gguf.GGUFWriter, shape: Shape, kind: str, name: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kind_of_rope = rope_kind(shape)
    if kind_of_rope == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(shape.rope["factor"])
    elif kind_of_rope == "yarn" and not set(shape.rope) & {"beta_fast", "beta_slow", "mscale", "attention_factor"}:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(shape.rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(shape.rope["original_max_position_embeddings"])
    elif kind_of_rope == "llama3":
        factors = llama3_rope_factors(shape)
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    elif kind_of_rope != "default":
        raise ValueError(f"model: rope_type {kind_of_rope!r} with {sorted(shape.rope)} is not written; use --to hf")


def _write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(False)
    for value, add in (
        (vocabulary.bos_id, writer.add_bos_token_id),
        (vocabulary.pad_id, writer.add_pad_token_id),
        (vocabulary.unknown_id, writer.add_unk_token_id),
    ):
        if value is not None:
            add(value)
    # GGUF has three keys for ends of a turn; llama.cpp finds further ones by their text, which the certificate checks.
    for value, add in zip(
        vocabulary.end_ids, (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), strict=False
    ):
        add(value)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _tensors(weights: Weights, shape: Shape) -> Iterator[str]:
    """The names to write, embeddings first; a tied head is omitted, for llama.cpp takes the embeddings for it."""
    if "model.embed_tokens.weight" not in weights.where:
        raise ValueError("model: model.embed_tokens.weight is missing; merge adapters first")
    if not shape.tied and "lm_head.weight" not in weights.where:
        raise ValueError("model: lm_head.weight is missing though tie_word_embeddings is false")
    for name in sorted(weights.where):
        if not (shape.tied and name == "lm_head.weight") and not name.endswith("rotary_emb.inv_freq"):
            yield name


def write_gguf(model_dir: Path, out: Path, kind: str) -> None:
    """Write `model_dir` as the GGUF file `out`, its matrices in `kind`: f32, f16, bf16 or q8_0.

    The file appears under its name only when it is complete. Raises ValueError for a kind, architecture, tokenizer or
    value that GGUF cannot hold.
    """
    if kind not in KINDS:
        raise ValueError(f"quant: {kind!r} is not one of {', '.join(KINDS)}; K-quants are made from an f16 file")
    shape, weights = read_shape(model_dir), Weights(model_dir)
    vocabulary = read_vocabulary(model_dir, shape.vocab_size)
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        writer = gguf.GGUFWriter(draft, shape.architecture)
        _write_header(writer, shape, kind, model_dir.resolve().name)
        _write_vocabulary(writer, vocabulary)
        names = list(_tensors(weights, shape))
        stored = {name: tensor_type(weights.shape(name), kind) for name in names}
        for name in names:
            dims = weights.shape(name)
            nbytes = math.prod(gguf.quant_shape_to_byte_shape(dims, stored[name]))
            writer.add_tensor_info(gguf_name(name), dims, np.dtype(np.float32), nbytes, raw_dtype=stored[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if rope_kind(shape) == "llama3":
            writer.write_tensor_data(llama3_rope_factors(shape))
        for name in names:
            writer.write_tensor_data(_encode(name, weights.read(name), shape, stored[name]))
        writer.close()
        draft.rename(out)
    finally:
        draft.unlink(missing_ok=True)
