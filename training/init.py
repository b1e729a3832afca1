"""First values of a model from scratch, and the learning rate that each weight is due: plain, or muP.

`scaled`: every matrix is normal with the config's `initializer_range`; those that write into the residual stream are
narrower by sqrt(2 layers) (Radford et al. 2019). `mup`: the maximal update parametrization (Yang et al. 2022, Tensor
Programs V, table 3), under which the best learning rate found at `model.mup_base_width` stays the best at any width.
Table 3 has no multipliers in the forward pass, so what is trained is an ordinary model that every engine serves; the
price is that head and embedding cannot be tied. With m = width / base width:

| weights | standard deviation | Adam's learning rate | Muon's |
| --- | --- | --- | --- |
| input: embeddings; biases, norms | 1 | 1 | |
| hidden matrices | 1/sqrt(m) | 1/m | 1/sqrt(m) |
| output: head, router | 1/m | 1/m | |

Muon's updates have full rank, so their spectral norm grows as sqrt(width), not as width (Large et al. 2024). Weight
decay is divided by the learning rate's factor: what decays in a step does not depend on width. Widths are compared at
one head width (more width means more heads), so attention keeps its 1/sqrt(head width).
"""

import hashlib
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from . import recipe as recipes

Kind = Literal["input", "hidden", "output", "vector"]
RESIDUAL_WRITERS = ("o_proj", "down_proj", "c_proj")
FALLBACK_STD = 0.02


def kinds(model: nn.Module) -> dict[str, Kind]:
    """What each parameter is to muP and Muon, by name: read off its module and its number of dimensions."""
    bases = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    head = bases[0].get_output_embeddings() if bases else None
    found: dict[str, Kind] = {}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if len(getattr(parameter, "ds_shape", parameter.shape)) < 2:
            found[name] = "vector"
        elif isinstance(module, nn.Embedding):
            found[name] = "input"  # a tied head has no name of its own
        elif module is head or hasattr(module, "e_score_correction_bias"):
            found[name] = "output"
        else:
            found[name] = "hidden"
    return found


def width_ratio(model: nn.Module, knobs: recipes.Model) -> float:
    """m: how much wider the model is than the one that the learning rate was tuned at; 1 without muP."""
    if knobs.init != "mup":
        return 1.0
    config: Any = next(module for module in model.modules() if isinstance(module, PreTrainedModel)).config
    if config.tie_word_embeddings:
        raise ValueError(
            "model.init: mup scales head and embedding in different ways, and this model ties them; give a model.shape "
            "with tie_word_embeddings: false, or use init: scaled"
        )
    return config.hidden_size / knobs.mup_base_width


def lr_factor(kind: Kind, ratio: float, muon: bool) -> float:
    """The factor of a weight's learning rate under muP."""
    if kind in ("input", "vector"):
        return 1.0
    return ratio**-0.5 if muon else 1 / ratio


@torch.no_grad()
def initialise(model: PreTrainedModel, knobs: recipes.Model, seed: int) -> None:
    """Draw every weight anew, in place. Each one's values are a function of seed, name and shape alone."""
    config: Any = model.config
    ratio = width_ratio(model, knobs)
    std = getattr(config, "initializer_range", FALLBACK_STD)
    for (name, kind), parameter in zip(kinds(model).items(), model.parameters(), strict=True):
        if kind == "vector":
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        own = std * {"input": 1.0, "hidden": ratio**-0.5, "output": 1 / ratio}[kind]
        if any(part in RESIDUAL_WRITERS for part in name.split(".")):
            own /= (2 * config.num_hidden_layers) ** 0.5
        digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
        generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest, "little") >> 1)
        parameter.normal_(0.0, own, generator=generator)
