"""Plugs the kernels into a transformers model, and takes them out again.

`plug(model)` is the one call. On a GPU it puts in the Triton kernels; on a machine without one the same call gives the
PyTorch path, in which a packed row costs one SDPA call per document instead of a T x T block mask.

Shape suffixes: B rows, T tokens, H query heads, G key/value heads, D head width, E value width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral", "deepseek_v3")
TORCH_ATTENTION = "shipyard_torch"


@dataclass
class Plug:
    """What `plug` changed. `path` is the code that runs now, `parts` what it replaced, `remove()` undoes all of it."""

    path: Literal["torch", "triton"]
    parts: tuple[str, ...]
    undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def remove(self) -> None:
        """Puts the model's own code back, last change first. A second call does nothing."""
        while self.undo:
            self.undo.pop()()


def plug(model: torch.nn.Module, kernels: Literal["auto", "torch", "triton"] = "auto") -> Plug:
    """Puts the kernels into `model` (also when PEFT wraps it), in place. Same numbers, less time and memory.

    `auto` takes Triton where the weights are on a GPU and the PyTorch path elsewhere; a model type that is not in
    `MODEL_TYPES` is left as it is under `auto` (the Plug then has no parts) and is an error when a path was asked for.
    """
    if kernels not in ("auto", "torch", "triton"):
        raise ValueError(f"kernels: {kernels!r}, must be auto, torch or triton")
    bases = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not bases or bases[0].config.model_type not in MODEL_TYPES:
        if kernels == "auto":
            return Plug("torch", ())
        kind = bases[0].config.model_type if bases else type(model).__name__
        raise ValueError(f"kernels: {kernels!r}, but model type {kind!r} is not in {MODEL_TYPES}; use kernels: auto")
    if kernels == "triton":
        raise ValueError("kernels: 'triton', needs an NVIDIA or AMD GPU; use kernels: auto")
    return _plug_torch(bases[0])


def _plug_torch(base: PreTrainedModel) -> Plug:
    before = base.config._attn_implementation or "sdpa"
    base.set_attn_implementation(TORCH_ATTENTION)
    return Plug("torch", ("attention",), [lambda: base.set_attn_implementation(before)])


def document_ends(position_ids_BT: torch.Tensor) -> list[list[int]]:
    """For each row, the ends of its documents: a document goes on as long as positions count up by one."""
    ends: list[list[int]] = []
    width = position_ids_BT.shape[1]
    breaks_BT = (position_ids_BT[:, 1:] - position_ids_BT[:, :-1]) != 1
    for breaks_T in breaks_BT.cpu():
        ends.append([*(torch.nonzero(breaks_T).flatten() + 1).tolist(), width])
    return ends


def sdpa_document(q_1HTD, k_1GTD, v_1GTE, scale, dropout, window, causal: bool) -> torch.Tensor:
    """SDPA over whole documents of equal length, (B,H,T,D) x (B,G,T,D) x (B,G,T,E) -> (B,H,T,E)."""
    length, mask = q_1HTD.shape[2], None
    if causal and window is not None and length > window:
        index = torch.arange(length, device=q_1HTD.device)
        back = index[:, None] - index[None, :]
        mask = (back >= 0) & (back < window)
    gqa = k_1GTD.shape[1] != q_1HTD.shape[1]
    return F.scaled_dot_product_attention(
        q_1HTD, k_1GTD, v_1GTE, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None and length > 1,
        scale=scale, enable_gqa=gqa,
    )  # fmt: skip


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
    **kwargs,  # transformers hands every attention function its own extras
) -> tuple[torch.Tensor, None]:
    """The AttentionInterface function: (B,H,T,D), (B,G,S,D), (B,G,S,E) -> ((B,T,H,E), None).

    With a padding mask, or a cache that already holds tokens, transformers' SDPA does the work.
    """
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    rows, length = query.shape[0], query.shape[2]
    ends = document_ends(position_ids) if position_ids is not None else [[length]]
    if all(row == [length] for row in ends):
        out_BHTE = sdpa_document(query, key, value, scaling, dropout, sliding_window, causal)
        return out_BHTE.transpose(1, 2).contiguous(), None
    ends = ends * rows if len(ends) == 1 else ends  # position ids may be given once for all rows
    out_rows = []
    for row, row_ends in enumerate(ends):
        pieces, start = [], 0
        for end in row_ends:
            part = (slice(row, row + 1), slice(None), slice(start, end))
            pieces.append(sdpa_document(query[part], key[part], value[part], scaling, dropout, sliding_window, causal))
            start = end
        out_rows.append(torch.cat(pieces, dim=2))
    return torch.cat(out_rows).transpose(1, 2).contiguous(), None


def documents_mask(batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, **kwargs):
    """The mask function beside it: no mask where position ids say everything, transformers' SDPA mask elsewhere."""
    padding_BT = kwargs.get("attention_mask")
    whole = padding_BT is None or bool(padding_BT.all())
    if whole and q_length == kv_length and q_offset == 0 and kv_offset == 0:
        return None
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, **kwargs
    )


AttentionInterface.register(TORCH_ATTENTION, attention_per_document)
AttentionMaskInterface.register(TORCH_ATTENTION, documents_mask)
