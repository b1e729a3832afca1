"""Low-rank adapters: put on (PEFT), and merged onto the base that was really trained against.

After QLoRA the usual advice, merging into the original bf16 weights, gives a model that nobody trained: the adapter
learned to correct the *dequantized* NF4 weights. So the merge dequantizes them first (docs/LOG.md has the distances).

Shape legend: T tokens, I inputs, O outputs, R rank.
"""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..kernels.kept import Again
from . import recipe as recipes
from .experts import BIAS, keep_wide, routers

TARGETS = {"all-linear": "all-linear", "attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def add_adapters(model: PreTrainedModel, lora: recipes.Lora, seed: int, as_written: bool = False) -> PeftModel:
    """Freeze the model and add fp32 adapters (Hu et al. 2021): A random from the seed, B zero, no dropout.

    Dropout would make the loss depend on how a batch is cut, and rank decides capacity already. `as_written` keeps
    PEFT's operations everywhere: `one_pass` rounds otherwise than they do, and not under selective checkpointing.
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
        if type(layer) is Linear and not as_written:
            layer.forward = MethodType(one_pass, layer)
    return adapted  # pyright: ignore[reportReturnType]


def one_pass(layer: Linear, x: Tensor, *args, **named) -> Tensor:
    """PEFT's forward of a linear layer with one adapter, without a pass over the output for each of its operations.

    Layers that are quantized, scattered over ranks or of mixed dtypes keep PEFT's code, and so do all where torch looks
    at single operations: in a compiled block, and under selective checkpointing, which forbids sums in place.
    """
    base, adapters = layer.get_base_layer(), layer.active_adapters
    usual = type(base) is nn.Linear and "forward" not in vars(base) and base.bias is None and len(adapters) == 1
    watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    if not usual or watched or args or named or layer.merged or layer.disable_adapters or base.weight.requires_grad:
        return Linear.forward(layer, x, *args, **named)
    weight, name = cast(Tensor, base.weight), adapters[0]
    down, up = (cast(Tensor, part[name].weight) for part in (layer.lora_A, layer.lora_B))
    whole = all(type(each) is nn.Parameter and not hasattr(each, "ds_id") for each in (weight, down, up))
    one_dtype = x.dtype == weight.dtype == down.dtype and not torch.is_autocast_enabled(x.device.type)
    if not whole or not one_dtype:
        return Linear.forward(layer, x)
    again = Again.found(x)
    outer, kept = (again.outer, again.of) if again else (None, ())
    y: Any = _LowRank.apply(x, weight, down, up, layer.scaling[name], outer, *kept)
    return y


class _LowRank(torch.autograd.Function):
    """y = x W^T + s x A^T B^T with W frozen (Hu et al. 2021, equation 3): x (..., I), W (O, I), A (R, I), B (O, R).

    Keeps x, or where `outer` is given the tensors from which that has A's gradient (`kernels.kept.Again`).
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight_OI: Tensor, down_RI: Tensor, up_OR: Tensor, scaling: float,
        outer: Callable[..., Tensor] | None, *kept: Tensor,
    ) -> Tensor:  # fmt: skip
        x_TI = x.reshape(-1, x.shape[-1])
        low_TR = x_TI @ down_RI.T
        y_TO = (x_TI @ weight_OI.T).addmm_(low_TR, up_OR.T, alpha=scaling)
        ctx.save_for_backward(low_TR, weight_OI, down_RI, up_OR, *(kept if outer else (x_TI,)))
        ctx.scaling, ctx.shape, ctx.outer = scaling, x.shape, outer or _outer
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        low_TR, weight_OI, down_RI, up_OR, *kept = ctx.saved_tensors
        dy_TO = dy.reshape(-1, dy.shape[-1])
        dlow_TR = (dy_TO @ up_OR).mul_(ctx.scaling)
        dup_OR = (dy_TO.T @ low_TR).mul_(ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy_TO @ weight_OI).addmm_(dlow_TR, down_RI).view(ctx.shape)
        return dx, None, ctx.outer(dlow_TR, *kept), dup_OR, None, None, *(None for _ in kept)


def _outer(left_TR: Tensor, x_TI: Tensor) -> Tensor:
    return left_TR.T @ x_TI


def base_weight(layer: nn.Module) -> Tensor:
    """Weight of a linear layer in fp32, as its forward uses it: NF4 dequantized, shape (out, in)."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach().float()  # pyright: ignore[reportCallIssue]
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state).float()  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def merged_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole weights by their plain transformers names: base + B A alpha/rank, computed in fp32, rounded once.

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
            weights[f"{name}.weight"] = total.to(dtype).cpu()
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
