"""Adapters over half-precision weights: what a small step changes arrives, and gradients are autograd's."""

from pathlib import Path
from types import MethodType
from typing import Any, Literal

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from shipyard.training.lora import add_adapters, base_weight, merged_weights
from shipyard.training.low_rank import LowRank, Onto, one_pass
from shipyard.training.models import load_model
from shipyard.training.recipe import Lora, Model
from torch import Tensor, nn

WIDTH, OUT, TOKENS = 64, 160, 400
KINDS = ("dense", "biased", "nf4", "gathered")
"""gathered: as under ZeRO-3, which names the weights that it scatters; the lattice trains it with DeepSpeed."""


class One(nn.Module):
    """A linear layer of bf16 or NF4 weights."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        weight = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(3)).mul(0.05).bfloat16()
        if kind == "nf4":
            self.proj = bnb.nn.Linear4bit(WIDTH, OUT, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            self.proj.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")  # pyright: ignore[reportCallIssue]
            self.proj.to("cpu")
        else:
            self.proj = nn.Linear(WIDTH, OUT, bias=kind in ("biased", "gathered"), dtype=torch.bfloat16)
            self.proj.weight.data = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def adapted(kind: str, size: float) -> Any:
    """The layer with an fp32 adapter whose B is +-size, as the first steps of Adam at that learning rate leave it."""
    torch.manual_seed(5)
    model: Any = get_peft_model(One(kind), LoraConfig(r=4, lora_alpha=8, target_modules=["proj"]))  # pyright: ignore
    layer = model.base_model.model.proj
    up = layer.lora_B["default"].weight
    up.data = torch.randn(up.shape).sign() * size
    assert up.dtype == torch.float32
    layer.forward = MethodType(one_pass, layer)
    if kind == "gathered":
        layer.get_base_layer().weight.ds_id = 0
    return layer


def rows() -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(6)).bfloat16()


def exact(layer: Any, x: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The product without its adapter, and the adapter's term, both in fp64."""
    base = layer.get_base_layer()
    plain = x.double() @ base_weight(base).double().T
    bias = 0.0 if base.bias is None else base.bias.detach().double()
    return plain + bias, x.double() @ down.double().T @ up.double().T * layer.scaling["default"]


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_small_term_arrives(kind: str, size: float) -> None:
    """The part of the term found in the layer's output, by least squares. PEFT's sum keeps 0.2 of it at 1e-4."""
    layer, x = adapted(kind, size), rows()
    up = layer.lora_B["default"].weight
    with torch.no_grad():
        _, term = exact(layer, x, layer.lora_A["default"].weight, up)
        got = layer(x).double()
        up.zero_()
        change = got - layer(x).double()
    part = part_arrived(change, term)
    noise = 2**-9 * float(got.square().mean().sqrt() / term.square().mean().sqrt()) / (TOKENS * OUT) ** 0.5
    assert abs(part - 1) < 0.01 + 4 * noise


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_fp64(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = adapted(kind, 0.05), rows().requires_grad_()
    by = Onto if kind == "gathered" else LowRank
    calls, apply = [], by.apply
    monkeypatch.setattr(by, "apply", lambda *arguments: calls.append(1) or apply(*arguments))
    slope = torch.randn(TOKENS, OUT, generator=torch.Generator().manual_seed(7)).bfloat16()
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    got = torch.autograd.grad(layer(x), (x, down, up), slope)
    assert calls == [1]
    wide = [each.detach().double().requires_grad_() for each in (x, down, up)]
    plain, term = exact(layer, *wide)
    wanted = torch.autograd.grad(plain + term, wide, slope.double())
    of_x = 2**-7 if kind == "gathered" else 2**-8  # there autograd adds two parts, each rounded
    for mine, theirs, bar in zip(got, wanted, (of_x, 1e-5, 1e-5), strict=True):
        assert float((mine - theirs).abs().max()) < bar * float(theirs.abs().max())


def part_arrived(change: Tensor, term: Tensor) -> float:
    """How much of a term is in a change, by least squares."""
    return float((change.double() * term.double()).sum() / term.double().square().sum())


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_bf16_merge_keeps_what_small_steps_learned(quantize: Literal["none", "nf4"], tiny_model: Path) -> None:
    """Rounded to the nearest, the merged model would be nearly the base. Merged twice: the same bits."""
    base = load_model(Model(name=str(tiny_model), quantize=quantize), trains_all=False)
    model = add_adapters(base, Lora(rank=4), seed=0)
    changed, wanted = [], []
    plain: Any = model.get_base_model()
    layers: dict[str, Any] = {name: each for name, each in plain.named_modules() if isinstance(each, LoraLayer)}
    for layer in layers.values():
        layer.lora_B["default"].weight.data.fill_(1e-5)
    merged, again = merged_weights(model, torch.bfloat16), merged_weights(model, torch.bfloat16)
    for name, layer in layers.items():
        weight, term = base_weight(layer.get_base_layer()), layer.get_delta_weight("default").detach()
        assert merged[f"{name}.weight"].equal(again[f"{name}.weight"])
        changed.append((merged[f"{name}.weight"].float() - weight).flatten())
        wanted.append(term.flatten())
    assert abs(part_arrived(torch.cat(changed), torch.cat(wanted)) - 1) < 0.2


def test_adapters_on_nf4_weights_take_it(tiny_model: Path) -> None:
    model = load_model(Model(name=str(tiny_model), quantize="nf4"), trains_all=False)
    layers = [each for each in add_adapters(model, Lora(rank=2), seed=0).modules() if isinstance(each, LoraLayer)]
    assert layers
    assert all(vars(layer)["forward"].__func__ is one_pass for layer in layers)
