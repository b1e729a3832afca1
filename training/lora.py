"""Low-rank adapters: put on (PEFT), and merged onto the base that was really trained against.

After QLoRA the usual advice, merging into the original bf16 weights, gives a model that nobody trained: the adapter
learned to correct the *dequantized* NF4 weights. So the merge dequantizes them first (docs/LOG.md has the distances).
"""

import copy
import zlib
from types import MethodType
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from . import recipe as recipes
from .experts import BIAS, keep_wide, routers
from .low_rank import dense, is_adapted, one_pass

TARGETS = {"all-linear": "all-linear", "attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def add_adapters(model: PreTrainedModel, lora: recipes.Lora, seed: int) -> PeftModel:
    """Freeze the model and add fp32 adapters (Hu et al. 2021): A random from the seed, B zero, no dropout.

    Dropout would make the loss depend on how a batch is cut, and rank decides capacity already.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=TARGETS[lora.targets],
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for layer in adapted.modules():
        if is_adapted(layer):
            layer.forward = MethodType(one_pass, layer)
    return adapted  # pyright: ignore[reportReturnType]


def base_weight(layer: nn.Module) -> Tensor:
    """Weight of a linear layer in fp32, as its forward uses it: NF4 dequantized, shape (out, in)."""
    return dense(cast(Tensor, layer.weight), torch.float32).detach().float()


@torch.no_grad()
def merged_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole weights by their plain transformers names: base + B A alpha/rank, computed in fp32, rounded once, in bf16
    so that what was learned remains (`rounded`).

    Works on a PEFT model or a plain one; quantized layers without an adapter are dequantized too.
    """
    weights: dict[str, Tensor] = {}
    peft = model.get_base_model() if isinstance(model, PeftModel) else model
    done: set[str] = set()
    for name, layer in peft.named_modules():
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            total = base_weight(base)
            for adapter in layer.active_adapters:
                up, down = (cast(Tensor, pair[adapter].weight).float() for pair in (layer.lora_B, layer.lora_A))
                total = total + (up @ down) * layer.scaling[adapter]
            weights[f"{name}.weight"] = rounded(total.cpu(), dtype, zlib.crc32(name.encode()))
            if isinstance(base.bias, Tensor):
                weights[f"{name}.bias"] = base.bias.detach().to(dtype).cpu()
            done.add(f"{name}.")
        elif hasattr(getattr(layer, "weight", None), "quant_state") and not any(map(name.startswith, done)):
            weights[f"{name}.weight"] = base_weight(layer).to(dtype).cpu()
            done.add(f"{name}.")
    for name, value in peft.state_dict().items():
        if not any(name.startswith(prefix) for prefix in done) and value.is_floating_point():
            weights[name] = value.detach().to(torch.float32 if name.endswith(BIAS) else dtype).cpu()
    return weights


def rounded(total: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """fp32 to dtype; to bf16 up or down by chance, by the distance to each (Gupta et al. 2015): the mean is exact.

    A base in bf16 lies on bf16's grid. What training added to a weight is mostly less than half a step of it, and
    rounding to the nearest would give the base back (docs/LOG.md). The same seed draws the same chances anywhere.
    """
    if dtype != torch.bfloat16:
        return total.to(dtype)
    chance = torch.randint(0, 1 << 16, total.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    kept = (total.contiguous().view(torch.int32) + chance) & -(1 << 16)
    return kept.view(torch.float32).to(dtype)


def merge(model: nn.Module, source: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """Return an ordinary transformers model holding the merged weights. `source` is where the base came from, None for
    a model from scratch; the generation config is the trained model's."""
    config = AutoConfig.from_pretrained(source) if source else copy.deepcopy(model.config)
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for _, router in routers(plain):
        keep_wide(router)
    plain.generation_config = copy.deepcopy(model.generation_config)
    fill(plain, merged_weights(model, dtype))
    return plain


def fill(plain: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Load weights into a plain model, strictly but for tied heads."""
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    tied = set(plain.all_tied_weights_keys or {})
    left = [name for name in missing if name not in tied]
    assert not left, f"merge lost {left}"
    assert not unexpected, f"merge invented {unexpected}"
    plain.tie_weights()
