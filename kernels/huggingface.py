"""Plugs the kernels into a transformers model, and takes them out again.

`plug(model)` is the one call. It gives the PyTorch path, in which a packed row costs one SDPA call per document instead
of a T x T block mask, or on a GPU that has run them, or where asked for, the Triton kernels.

Shape suffixes: B rows, T tokens, H query heads, G key/value heads, D head width, E value width.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from . import kept
from .attention import WIDTHS, flash_attention
from .documents import packing_of, sdpa_by_bucket, sdpa_document, sdpa_each
from .jit import HAS_TRITON, architecture, need_triton
from .linear_cross_entropy import linear_cross_entropy, token_log_probs
from .rms_norm import rms_norm
from .rope import rope
from .swiglu import swiglu

MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral", "deepseek_v3", "gpt2")
TORCH_ATTENTION, TRITON_ATTENTION = "shipyard_torch", "shipyard_triton"
KernelPath = Literal["torch", "triton"]

PROVEN_CARDS = ("sm_90",)
"""Architectures on which `shipyard verify kernels` ran on a real card (docs/kernels.md says which), and a model learned
the same with the kernels and without."""


def is_proven(device: torch.device) -> bool:
    """Whether `auto` takes the Triton kernels for weights there."""
    return device.type == "cuda" and HAS_TRITON and architecture(device) in PROVEN_CARDS


class SharedRows(Protocol):
    """Part of every row's tokens, other ranks holding the rest (context parallel)."""

    def attend(
        self, q_BHTD: torch.Tensor, k_BGTD: torch.Tensor, v_BGTE: torch.Tensor, scale: float | None, dropout: float,
        window: int | None,
    ) -> torch.Tensor: ...  # fmt: skip


@dataclass
class Plug:
    """What `plug` changed. `path` is the code that runs now, `parts` what it replaced, `remove()` undoes all of it.
    `fault` is why `auto` did not take the kernels where it wanted to."""

    path: KernelPath
    parts: tuple[str, ...]
    fault: str = ""
    undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def remove(self) -> None:
        """Puts the model's own code back, last change first. A second call does nothing."""
        while self.undo:
            self.undo.pop()()


def path_of(kernels: str, model_type: str, proven: bool, whole: bool) -> KernelPath | None:
    """The rule of `kernels:`, for `plug` and for those who ask beforehand: the code that computes a model's layers on a
    card that is `proven`, where ranks hold them `whole`. None leaves the model's own."""
    if model_type not in MODEL_TYPES:
        return None
    return "triton" if kernels == "triton" or (kernels == "auto" and proven and whole) else "torch"


def plug(
    model: torch.nn.Module, kernels: Literal["auto", "torch", "triton"] = "auto", whole: bool = True,
    device: torch.device | None = None, dtype: torch.dtype | None = None,
) -> Plug:  # fmt: skip
    """Puts the kernels into `model` (also when PEFT wraps it), in place. Same numbers, less time and memory.

    `triton` needs the weights on a GPU. `auto` takes it for weights on a card of `PROVEN_CARDS`, and PyTorch elsewhere:
    a training run must not be the first to try kernels on a card. Nor does it where ranks share rows or layers, or
    torch.compile traces the layers (not `whole`). On a GPU a layer runs both ways first (`trial.first_fault`): if they
    differ, `auto` takes PyTorch and `triton` is an error. `device` is where the model will run and `dtype` what it will
    multiply in, if its weights are elsewhere or wider.
    A model type that is not in `MODEL_TYPES` is left as it is under `auto` (the Plug then has no parts) and is an error
    when a path was asked for.
    """
    if kernels not in ("auto", "torch", "triton"):
        raise ValueError(f"kernels: {kernels!r}, must be auto, torch or triton")
    bases = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    kind = bases[0].config.model_type if bases else type(model).__name__
    if kind not in MODEL_TYPES:
        if kernels == "auto":
            return Plug("torch", ())
        raise ValueError(f"kernels: {kernels!r}, but model type {kind!r} is not in {MODEL_TYPES}; use kernels: auto")
    device = device or next(bases[0].parameters()).device
    if kernels == "triton":
        need_triton(device)
    path, fault = path_of(kernels, kind, is_proven(device), whole) or "torch", ""
    if path == "triton" and device.type == "cuda":
        from .trial import first_fault

        fault = first_fault(bases[0].config, device, dtype or bases[0].dtype)
        if fault and kernels == "triton":
            raise ValueError(f"kernels: triton, {fault}; use kernels: torch")
    plugged = plug_path(bases[0], "torch" if fault else path)
    plugged.fault = fault
    return plugged


def plug_path(base: PreTrainedModel, path: KernelPath) -> Plug:
    """Puts one path into a model, wherever its weights are and whether that path can run there or not."""
    plugged = Plug(path, ())
    _plug_attention(base, plugged)
    if plugged.path == "triton":
        _plug_rope(base, plugged)
    _plug_layers(base, plugged)
    _plug_loss(base, plugged)
    return plugged


def _done(plugged: Plug, part: str, undo: Callable[[], None]) -> None:
    plugged.undo.append(undo)
    if part not in plugged.parts:
        plugged.parts = (*plugged.parts, part)


def _replace_forward(plugged: Plug, part: str, module: torch.nn.Module, forward: Callable) -> None:
    """Shadows the class's forward on this one module, with a method: torch.compile takes a layer's program for the next
    one's where their methods are one function, and compiles anew for each `partial` that it meets."""
    module.forward = MethodType(forward, module)
    _done(plugged, part, lambda: delattr(module, "forward"))


def _plug_attention(base: Any, plugged: Plug) -> None:
    before, config = base.config._attn_implementation or "sdpa", base.config
    width = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    fits = width in WIDTHS and getattr(config, "v_head_dim", width) in WIDTHS
    base.set_attn_implementation(TRITON_ATTENTION if plugged.path == "triton" and fits else TORCH_ATTENTION)
    _done(plugged, "attention", lambda: base.set_attn_implementation(before))


def _plug_rope(base: PreTrainedModel, plugged: Plug) -> None:
    """The modeling files call rotary functions by their global name, so this part serves all models of the file."""
    module = sys.modules[type(base).__module__]
    for name, interleaved in (("apply_rotary_pos_emb", False), ("apply_rotary_pos_emb_interleave", True)):
        if stock := getattr(module, name, None):
            setattr(module, name, partial(rotary, interleaved))
            _done(plugged, "rope", partial(setattr, module, name, stock))


def _plug_layers(base: PreTrainedModel, plugged: Plug) -> None:
    norm, gated = (rms_norm, swiglu) if plugged.path == "triton" else (kept.norm, kept.swiglu)
    normed, mixed = partial(norm_forward, norm), partial(mlp_forward, gated)
    for module in base.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            _replace_forward(plugged, "rms_norm", module, normed)
        if name.endswith("MLP") and isinstance(getattr(module, "act_fn", None), (torch.nn.SiLU, SiLUActivation)):
            _replace_forward(plugged, "swiglu", module, mixed)


def _plug_loss(base: Any, plugged: Plug) -> None:
    if isinstance(getattr(base, "lm_head", None), torch.nn.Linear) and base.lm_head.bias is None:
        _replace_forward(plugged, "loss", base, causal_lm_forward)


def rotary(interleaved: bool, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest, **named):
    """transformers' apply_rotary_pos_emb: q (B,H,T,D), k (B,G,T,D), cos and sin (B,T,2R) in halves that repeat."""
    pairs = cos.shape[-1] // 2
    out = rope(q.transpose(1, 2), k.transpose(1, 2), cos[..., :pairs], sin[..., :pairs], interleaved)
    if interleaved:  # transformers leaves the pairs as two halves
        out = tuple(x.unflatten(-1, (pairs, 2)).transpose(-1, -2).flatten(-2) for x in out)
    return out[0].transpose(1, 2), out[1].transpose(1, 2)


def norm_forward(norm: Callable, module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """transformers' RMSNorm.forward, by a kernel or by `kept`.

    Mixed dtypes keep the stock code, whose result is the wider one, and so does PyTorch's path where a compiler writes
    the gradient, or in fp64, which transformers norms in fp32.
    """
    stock = norm is kept.norm and (torch.compiler.is_compiling() or hidden_states.dtype == torch.float64)
    if stock or module.weight.dtype != hidden_states.dtype or isinstance(module.weight, DTensor):
        return type(module).forward(module, hidden_states)
    y: Any = norm(hidden_states, module.weight, module.variance_epsilon)
    return y


def mlp_forward(gated: Callable, module: Any, x: torch.Tensor) -> torch.Tensor:
    """transformers' gated MLP, by a kernel or by `kept`; a compiler writes PyTorch's gradient itself."""
    if gated is kept.swiglu and torch.compiler.is_compiling():
        return type(module).forward(module, x)
    return module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))


@dataclass
class TokenTerms(ModelOutput):
    """What a call with `targets` returns: log p of each and log Z of its softmax, fp32, (N,) both."""

    log_p_N: torch.Tensor | None = None
    log_z_N: torch.Tensor | None = None


@dataclass(frozen=True)
class Targets:
    """The tokens to predict, (N,), and from which of the kept columns: `rows_N` counts through rows, then columns."""

    rows_N: torch.Tensor
    ids_N: torch.Tensor


def spares_logits(model: torch.nn.Module) -> bool:
    """Whether a call may name `targets`: the head's weight is whole and here, and its kernel is plugged in, or on
    PyTorch's path it is frozen."""
    for base in model.modules():
        if isinstance(base, PreTrainedModel) and hasattr(base, "lm_head"):
            path = base.config._attn_implementation if "forward" in vars(base) and _head_is_here(base) else None
            return path == TRITON_ATTENTION or (path == TORCH_ATTENTION and not base.lm_head.weight.requires_grad)
    return False


def _head_is_here(base: Any) -> bool:
    """ZeRO-3 and FSDP scatter the weight, and an adapter has more than one."""
    weight = base.lm_head.weight
    elsewhere = weight.numel() == 0 or isinstance(weight, DTensor) or hasattr(weight, "ds_id")
    return not elsewhere and type(base.lm_head) is torch.nn.Linear


def _terms(base: Any, targets: Targets, *args, logits_to_keep: torch.Tensor, **kwargs) -> TokenTerms:
    """Both numbers of each target, in the dtype in which the head would have multiplied."""
    hidden_BKD = base.base_model(*args, **kwargs).last_hidden_state[:, logits_to_keep]
    kind, weight_VD = hidden_BKD.device.type, base.lm_head.weight
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
    hidden_ND = hidden_BKD.reshape(-1, hidden_BKD.shape[-1])[targets.rows_N]
    terms = token_log_probs if base.config._attn_implementation == TRITON_ATTENTION else kept.head_terms
    return TokenTerms(*terms(hidden_ND.to(dtype), weight_VD.to(dtype), targets.ids_N))


def causal_lm_forward(base: Any, *args, labels: torch.Tensor | None = None, targets: Targets | None = None, **kwargs):
    """ForCausalLM.forward; with labels the loss comes without logits (None), computed at supervised tokens only, and
    with `targets` (see `spares_logits`) so do their log-probabilities.

    As transformers does, it shifts the labels, takes -100 as ignored and divides by `num_items_in_batch`, or by the
    supervised tokens. A head whose weight is elsewhere (ZeRO-3, FSDP) keeps the stock code.
    """
    if targets is not None:
        return _terms(base, targets, *args, **kwargs)
    weight, stock = base.lm_head.weight, type(base).forward
    if labels is None or not _head_is_here(base):
        return stock(base, *args, **kwargs) if labels is None else stock(base, *args, labels=labels, **kwargs)
    items, shifted = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
    if shifted is None:
        shifted = F.pad(labels[..., 1:], (0, 1), value=-100)
    kwargs.pop("logits_to_keep", None)
    outputs = base.base_model(*args, **kwargs)
    live = shifted != -100
    loss, _ = linear_cross_entropy(outputs.last_hidden_state[live], weight, shifted[live])
    mean: Any = loss / (live.sum() if items is None else items)
    return CausalLMOutputWithPast(
        loss=mean, logits=None, past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states, attentions=outputs.attentions,
    )  # fmt: skip


@torch.compiler.disable
def attention_per_document(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,
    shared_rows: SharedRows | None = None,
    **kwargs,  # transformers hands every attention function its own extras
) -> tuple[torch.Tensor, None]:
    """The AttentionInterface function: (B,H,T,D), (B,G,S,D), (B,G,S,E) -> ((B,T,H,E), None).

    With a padding mask, or a cache that already holds tokens, transformers' SDPA does the work; where ranks share rows,
    `shared_rows` does.
    """
    if shared_rows is not None:
        return shared_rows.attend(query, key, value, scaling, dropout, sliding_window), None
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    packing = packing_of(position_ids, query.shape[0], query.shape[2], query.device)
    options = (scaling, dropout, sliding_window, causal)
    if len(packing.borders) == query.shape[0] + 1:
        out_BHTE = sdpa_document(query, key, value, *options)
        return out_BHTE.transpose(1, 2).contiguous(), None
    attend = sdpa_each if query.device.type == "cpu" else sdpa_by_bucket
    return attend(packing, query, key, value, *options), None


def documents_mask(batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, **kwargs):
    """The mask function beside it: no mask where position ids say everything, transformers' SDPA mask elsewhere."""
    padding_BT = kwargs.get("attention_mask")
    whole = padding_BT is None or bool(padding_BT.all())
    if whole and q_length == kv_length and q_offset == 0 and kv_offset == 0:
        return None
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, **kwargs
    )


@torch.compiler.disable
def attention_triton(
    module: Any, query, key, value, attention_mask, dropout: float = 0.0, scaling: float | None = None,
    sliding_window: int | None = None, is_causal: bool | None = None, position_ids=None, shared_rows=None, **kwargs,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """`flash_attention` as an AttentionInterface function; dropout,
    padding and caches take `attention_per_document`."""
    assert shared_rows is None, "the kernels take whole rows"
    if attention_mask is not None or query.shape[2] != key.shape[2] or dropout:
        return attention_per_document(
            module,
            query,  # pyright: ignore
            key,
            value,
            attention_mask,
            dropout,
            scaling,
            sliding_window,
            is_causal,
            position_ids,
            **kwargs,
        )
    rows, heads, length, _ = query.shape
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    cu = packing_of(position_ids, rows, length, query.device).cu_seqlens
    q, k, v = (x.transpose(1, 2).reshape(rows * length, x.shape[1], x.shape[3]) for x in (query, key, value))
    out = flash_attention(q, k, v, cu, causal=causal, window=sliding_window if causal else None, scale=scaling)
    return out.view(rows, length, heads, value.shape[3]), None


for _name, _function in ((TORCH_ATTENTION, attention_per_document), (TRITON_ATTENTION, attention_triton)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, documents_mask)
