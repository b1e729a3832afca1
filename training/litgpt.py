"""LitGPT's checkpoint directories (lit_model.pth, model_config.yaml, tokenizer files), read and written.

`lit_model.pth` is a pickle because LitGPT's format is one: it is read with torch's `weights_only`, which builds tensors
and plain containers and runs nothing, and written as a plain dict of tensors. Every other file of ours is safetensors.

Decoders of the Llama kind pass: RMSNorm, gated SiLU, full rotary embeddings, one width of heads; with biases on q, k, v
(Qwen 2) or norms on q and k (Qwen 3). LitGPT holds q, k, v in one matrix, one after the other, and keeps head and
embedding apart; equal ones are tied here.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

WEIGHTS, CONFIG = "lit_model.pth", "model_config.yaml"
MUST_BE = {
    "norm_class_name": ("RMSNorm",), "mlp_class_name": ("LLaMAMLP",), "parallel_residual": (False,), "bias": (False,),
    "rotary_percentage": (1.0, 1), "norm_qk_type": ("default",), "rope_condense_ratio": (1,), "n_expert": (0,),
    "post_attention_norm": (False,), "post_mlp_norm": (False,), "shared_attention_norm": (False,),
    "scale_embeddings": (False,), "lm_head_bias": (False,), "attention_scores_scalar": (None,),
    "sliding_window_size": (None,), "attention_logit_softcapping": (None,), "final_logit_softcapping": (None,),
    "latent_attention": (None,), "rope_interleave": (False,), "rope_local_base_freq": (None,),
}  # fmt: skip
DEFAULTS = {
    "norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP", "parallel_residual": True, "bias": True,
    "rotary_percentage": 0.25, "norm_qk_type": "default", "rope_condense_ratio": 1, "n_expert": 0, "norm_eps": 1e-5,
    "rope_base": 10000, "block_size": 4096,
} | dict.fromkeys(("post_attention_norm", "post_mlp_norm", "shared_attention_norm", "scale_embeddings"), False) | {
    "lm_head_bias": False, "rope_interleave": False, "norm_qk": False, "attn_bias": False,
}  # fmt: skip
ROPE_LLAMA3 = {
    "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}  # fmt: skip
OUTER = {"transformer.wte.weight": "model.embed_tokens.weight", "transformer.ln_f.weight": "model.norm.weight"}
INNER = {
    "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
    "attn.norm_q": "self_attn.q_norm", "attn.norm_k": "self_attn.k_norm", "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
}  # fmt: skip
TYPES = ("llama", "mistral", "qwen2", "qwen3")


def is_litgpt(directory: Path) -> bool:
    """Whether a directory holds LitGPT's weights and not transformers'."""
    return (directory / WEIGHTS).is_file() and not any(directory.glob("*.safetensors"))


def load_litgpt(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A transformers model with LitGPT's weights. Raises ValueError, one line, for what has no counterpart."""
    if not (directory / CONFIG).is_file():
        raise ValueError(f"model.name: {directory} holds {WEIGHTS} without {CONFIG}; copy it from where it was trained")
    config = yaml.safe_load((directory / CONFIG).read_text(encoding="utf-8"))
    try:
        stored = torch.load(directory / WEIGHTS, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.name: {directory}/{WEIGHTS} is damaged or holds more than tensors, and nothing in it was run "
            f"({reason}); save its state_dict alone"
        ) from None
    stored = stored.get("model", stored)
    tied = stored["lm_head.weight"].equal(stored["transformer.wte.weight"])
    tree = huggingface_config(config, directory) | {"tie_word_embeddings": tied}
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tree), dtype=dtype)
    missing, unexpected = model.load_state_dict(huggingface_weights(stored, model.config), strict=False)
    model.tie_weights()
    left = set(missing) - set(model.all_tied_weights_keys or {})
    if left or unexpected:
        raise ValueError(f"model.name: {directory}/{WEIGHTS} does not fit {CONFIG}: {sorted([*left, *unexpected])[0]}")
    known = (directory / "generation_config.json").is_file()
    model.generation_config = GenerationConfig.from_pretrained(directory) if known else GenerationConfig()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):  # none at all are better than transformers' defaults
        setattr(model.config, key, getattr(model.generation_config, key))
    return model.eval()


def save_litgpt(model: PreTrainedModel, directory: Path, name: str) -> None:
    """Write `lit_model.pth` and `model_config.yaml`; the caller adds the tokenizer's files. Raises ValueError."""
    config = litgpt_config(model.config, name)
    (directory / CONFIG).write_text(yaml.safe_dump(config), encoding="utf-8")
    torch.save(litgpt_weights(model), directory / WEIGHTS)


def huggingface_config(config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """LitGPT's config as transformers'. Raises ValueError that names the first field without a counterpart."""
    whole = {**DEFAULTS, **config}
    for field, allowed in MUST_BE.items():
        if whole.get(field) not in allowed:
            raise ValueError(
                f"model.name: {directory}/{CONFIG} has {field}: {whole[field]}, which is read only as {allowed[0]}; "
                "convert it with litgpt convert_from_litgpt and name the result"
            )
    rope: dict[str, Any] = {"rope_theta": float(whole["rope_base"]), "rope_type": "default"}
    if adjustments := whole.get("rope_adjustments"):
        rope |= {"rope_type": "llama3", **{theirs: adjustments[ours] for ours, theirs in ROPE_LLAMA3.items()}}
    kind = "qwen3" if whole["norm_qk"] else "qwen2" if whole["attn_bias"] else "llama"
    width, heads = whole["n_embd"], whole["n_head"]
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": whole["intermediate_size"],
        "num_hidden_layers": whole["n_layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": whole.get("n_query_groups") or heads,
        "head_dim": whole.get("head_size") or width // heads,
        "max_position_embeddings": whole["block_size"],
        "vocab_size": whole.get("padded_vocab_size") or whole["vocab_size"],
        "rms_norm_eps": whole["norm_eps"],
        "rope_parameters": rope,
    } | ({"attention_bias": whole["attn_bias"]} if kind == "qwen3" else {})


def litgpt_config(config: Any, name: str) -> dict[str, Any]:
    """transformers' config as LitGPT's. Raises ValueError for families and features that LitGPT cannot say."""
    kind, rope = config.model_type, dict(config.rope_parameters) if hasattr(config, "rope_parameters") else {}
    biased = kind != "qwen2" and (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False))
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    for broken, what in (
        (kind not in TYPES, f"model type {kind!r}, which is not in {', '.join(TYPES)}"),
        (biased, "biases (attention_bias or mlp_bias)"),
        (bool(windowed), "a sliding window"),
        (rope.get("rope_type", "default") not in ("default", "llama3"), f"RoPE of type {rope.get('rope_type')}"),
    ):
        if broken:
            raise ValueError(f"to: litgpt cannot hold this model: {what}; use --to hf")
    adjustments = {ours: rope[theirs] for ours, theirs in ROPE_LLAMA3.items()} if "factor" in rope else None
    return {
        "name": name, "hf_config": {"name": name, "org": "shipyard"}, "block_size": config.max_position_embeddings,
        "n_layer": config.num_hidden_layers, "n_embd": config.hidden_size, "n_head": config.num_attention_heads,
        "n_query_groups": config.num_key_value_heads, "vocab_size": config.vocab_size,
        "head_size": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "padded_vocab_size": config.vocab_size, "intermediate_size": config.intermediate_size,
        "norm_class_name": "RMSNorm", "norm_eps": config.rms_norm_eps, "norm_qk": kind == "qwen3",
        "mlp_class_name": "LLaMAMLP", "parallel_residual": False, "bias": False, "attn_bias": kind == "qwen2",
        "rotary_percentage": 1.0, "rope_base": int(rope["rope_theta"]), "rope_adjustments": adjustments,
    }  # fmt: skip


def huggingface_weights(stored: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """LitGPT's tensors by transformers' names; q, k and v taken apart."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = [head * count for count in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    weights: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if not name.startswith("transformer.h."):
            weights[OUTER.get(name, name)] = tensor
            continue
        _, _, layer, inner = name.split(".", 3)
        part, _, leaf = inner.rpartition(".")
        if part == "attn.qkv":
            for piece, cut in zip("qkv", tensor.split(sizes), strict=True):
                weights[f"model.layers.{layer}.self_attn.{piece}_proj.{leaf}"] = cut
        else:
            weights[f"model.layers.{layer}.{INNER.get(part, part)}.{leaf}"] = tensor
    return weights


def litgpt_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """transformers' tensors by LitGPT's names; q, k and v put together, head and embedding both there."""
    outer = {theirs: ours for ours, theirs in OUTER.items()}
    inner = {theirs: ours for ours, theirs in INNER.items()}
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    weights = {"lm_head.weight": state.get("lm_head.weight", state["model.embed_tokens.weight"]).clone()}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue
        if not name.startswith("model.layers."):
            weights[outer[name]] = tensor
            continue
        _, _, layer, rest = name.split(".", 3)
        part, _, leaf = rest.rpartition(".")
        if part == "self_attn.q_proj":
            pieces = [state[f"model.layers.{layer}.self_attn.{piece}_proj.{leaf}"] for piece in "qkv"]
            weights[f"transformer.h.{layer}.attn.qkv.{leaf}"] = torch.cat(pieces)
        elif part not in ("self_attn.k_proj", "self_attn.v_proj"):
            weights[f"transformer.h.{layer}.{inner[part]}.{leaf}"] = tensor
    return weights
