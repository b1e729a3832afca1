"""Low-rank adapters: put on (PEFT), and merged onto the base that was really trained against.

After QLoRA the usual advice, merging into the original bf16 weights, gives a model that nobody trained: the adapter
learned to correct the *dequantized* NF4 weights. So the merge dequantizes them first (docs/LOG.md has the distances).
"""

import copy
import zlib
from types import MethodType
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from . import recipe as recipes
from .experts import BIAS, keep_wide, routers
from .low_rank import dense, is_adapted, one_pass


def add_adapters(model: PreTrainedModel, lora: recipes.Lora, seed: int) -> PeftModel:
    """Freeze the model and add fp32 adapters (Hu et al. 2021): A random from the seed, B zero, no dropout.

    Dropout would make the loss depend on how a batch is cut, and rank decides capacity already.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=attention_layers(model) if lora.targets == "attention" else lora.targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for layer in adapted.modules():
        if is_adapted(layer):
            layer.forward = MethodType(one_pass, layer)
    return adapted  # pyright: ignore[reportReturnType]


def attention_layers(model: nn.Module) -> list[str]:
    """What PEFT is to call the linear layers of attention, whatever a family names them: q_proj, c_attn, kv_b_proj.

    The last word of their names; with the one before where layers outside attention end the same (GPT-2's c_proj).
    """
    linear = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    parts = [name for name, module in model.named_modules() if type(module).__name__.endswith("Attention")]
    inside = {name for name in linear if name.startswith(tuple(f"{part}." for part in parts))}
    outside = {name.rsplit(".", 1)[-1] for name in linear - inside}
    words = {name: 2 if name.rsplit(".", 1)[-1] in outside else 1 for name in inside}
    return sorted({".".join(name.split(".")[-count:]) for name, count in words.items()})


def base_weight(layer: nn.Module) -> Tensor:
    """Weight of a linear layer in fp32, as its forward uses it: NF4 dequantized, shape (out, in)."""
    return dense(cast(Tensor, layer.weight), torch.float32).detach().float()


@torch.no_grad()
def merged_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole weights by their plain transformers names: trained ones and base + B A alpha/rank, computed in fp32,
    rounded once, in bf16 so that what was learned remains (`rounded`).

    Works on a PEFT model or a plain one; quantized layers without an adapter are dequantized too.
    """
    weights: dict[str, Tensor] = {}
    peft = model.get_base_model() if isinstance(model, PeftModel) else model
    quantized: list[str] = []
    for name, layer in peft.named_modules():
        plain = plain_name(name)
        if isinstance(layer, LoraLayer):
            parameter = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
            base = cast(nn.Module, layer.get_base_layer())
            total = base_weight(base) if parameter == "weight" else getattr(base, parameter).detach().float()
            for adapter in layer.active_adapters:
                total = total + learned(layer, adapter)
            weights[f"{plain}.{parameter}"] = rounded(total.cpu(), dtype, zlib.crc32(plain.encode()))
        if hasattr(getattr(layer, "weight", None), "quant_state"):
            weights.setdefault(f"{plain}.weight", base_weight(cast(nn.Module, layer)).to(dtype).cpu())
            quantized.append(f"{plain}.weight.")  # what dequantizes it is no weight
    for name, value in peft.state_dict().items():
        plain = plain_name(name)
        if plain in weights or ".lora_" in plain or plain.startswith(tuple(quantized)) or not value.is_floating_point():
            continue
        whole, wide = value.detach().cpu(), torch.float32 if plain.endswith(BIAS) else dtype
        weights[plain] = rounded(whole, wide, zlib.crc32(plain.encode())) if whole.dtype != wide else whole
    return weights


def plain_name(name: str) -> str:
    """The name that a module or a weight has in a model without adapters."""
    return name.replace(".base_layer", "")


def learned(layer: Any, adapter: str) -> Tensor:
    """What an adapter adds to the weight under it, fp32, in that weight's shape: (out, in), GPT-2's (in, out), or of
    stacked experts (E, out, in) or (E, in, out), whose A and B PEFT lays side by side, (rank E, in) and (out, E rank).
    """
    up_OR, down_RI = (cast(Tensor, pair[adapter].weight).float() for pair in (layer.lora_B, layer.lora_A))
    if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
        down_ERI = down_RI.reshape(layer.num_experts, -1, down_RI.shape[-1])
        up_EOR = up_OR.reshape(len(up_OR), -1, layer.num_experts).permute(2, 0, 1)
        delta, lies_over = up_EOR @ down_ERI, not layer._did_swap_in_out_features
    else:
        delta, lies_over = up_OR @ down_RI, layer.fan_in_fan_out
    return (delta.mT if lies_over else delta) * layer.scaling[adapter]


def rounded(total: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """fp32 to dtype; to bf16 up or down by chance, by the distance to each (Gupta et al. 2015): the mean is exact.

    A base in bf16 lies on bf16's grid. What training added to a weight is mostly less than half a step of it, and
    rounding to the nearest would give the base back (docs/LOG.md). The same seed draws the same chances anywhere, and a
    weight that lies on the grid stays.
    """
    if (total.dtype, dtype) != (torch.float32, torch.bfloat16):
        return total.to(dtype)
    chance = torch.randint(0, 1 << 16, total.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    kept = (total.contiguous().view(torch.int32) + chance) & -(1 << 16)
    return kept.view(torch.float32).to(dtype)


def merge(model: nn.Module, source: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """Return an ordinary transformers model holding the merged weights. `source` is where the base came from, None for
    a model from scratch; the generation config is the trained model's."""
    config = AutoConfig.from_pretrained(source) if source else copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)  # of a base that is stored in NF4; what is merged is not
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
