"""Models and tokenizers: from a directory, an asset, a hub name, an earlier run, or from scratch."""

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from . import recipe as recipes
from .activations import recompute
from .experts import watch
from .float8 import require_hopper, use_float8
from .init import initialise
from .litgpt import is_litgpt, load_litgpt
from .manifest import MANIFEST, read_manifest

SCRATCH = "scratch"
PROGRAMS = 32
"""That a compiled layer may become."""


def locate(name: str) -> str:
    """Turn a recipe's model name into what transformers (or LitGPT) loads: a directory, or a hub name as it stands.

    `asset:NAME` is fetched and verified; the directory of an earlier run stands for the model that it trained.
    Raises ValueError when a path is meant and nothing whole is there.
    """
    from ..launch.assets import resolve

    path = resolve(name)
    if (path / "model" / "config.json").is_file():
        return str(path / "model")
    if path.is_dir() and not (path / "config.json").is_file() and not is_litgpt(path):
        unfinished = (path / "recipe.yaml").is_file()
        reason = "is a run that has not finished; train it to its end" if unfinished else "holds no config.json"
        raise ValueError(f"model.name: {name} {reason}, or name another model")
    looks_like_path = name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1
    if not path.exists() and looks_like_path:
        raise ValueError(f"model.name: {name} does not exist; give a directory, a hub name (owner/model) or asset:NAME")
    return str(path) if path.exists() else name


def config_source(name: str) -> str | None:
    """Where transformers finds the config of a recipe's model; None where there is none to find: the model has it."""
    source = locate(name) if name != SCRATCH else None
    return None if source is None or is_litgpt(Path(source)) else source


def committed_digest(name: str) -> str:
    """The digest of a recipe's model where that is a committed directory (a run's, an asset), else an empty text."""
    path = Path(name if name == SCRATCH else locate(name))
    return read_manifest(path).digest if (path / MANIFEST).is_file() else ""


def shape_config(shape: str) -> dict[str, Any]:
    """Read a model shape: a name in launch/shapes, or a path to a config.json."""
    from ..launch.memory import read_shape

    if not shape.endswith(".json"):
        return read_shape(shape)
    if not Path(shape).is_file():
        raise ValueError(f"model.shape: {shape!r} does not exist; give a config.json, or a name of launch/shapes")
    return json.loads(Path(shape).read_text(encoding="utf-8"))


def load_tokenizer(model: recipes.Model) -> PreTrainedTokenizerBase:
    """Load the tokenizer that goes with the model. Raises ValueError when it cannot be had."""
    name = model.tokenizer or model.name
    if name == SCRATCH:
        raise ValueError("model.tokenizer: a model from scratch needs one; name a directory, hub name or asset:NAME")
    source = _locate_tokenizer(name) if model.tokenizer else locate(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if tokenizer.decode(tokenizer("a b", add_special_tokens=False)["input_ids"]) == "ab":
            # DeepSeek V3's config names LlamaTokenizerFast, which transformers 5 rebuilds without its spaces
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    except (OSError, ImportError) as error:
        raise ValueError(_unreachable("model.tokenizer", name, error)) from None
    return tokenizer


def _locate_tokenizer(name: str) -> str:
    """A directory that holds a tokenizer and no model, an asset, or what `locate` knows."""
    from ..launch.assets import resolve

    path = resolve(name)
    if (path / "tokenizer.json").is_file():
        return str(path)
    if name.startswith((".", "/", "~", "runs/")) and not path.exists():
        raise ValueError(f"model.tokenizer: {name} does not exist; name another, or `shipyard data tokenizer` makes it")
    return locate(name)


def load_model(model: recipes.Model, *, trains_all: bool, seed: int = 0) -> PreTrainedModel:
    """Load weights for training.

    Weights that are trained directly are fp32 (`trains_all`; the engine computes in `model.dtype`); frozen ones are
    stored in `frozen_dtype`, or NF4 with double quantization (Dettmers et al. 2023, QLoRA).
    """
    loaded = for_training(_load(model, torch.float32 if trains_all else frozen_dtype(model.dtype), seed))
    if trains_all:  # adapters alone would not say what their routers have learned
        watch(loaded)
    return loaded


def _load(model: recipes.Model, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    if model.name == SCRATCH:
        if model.shape is None:
            raise ValueError("model.shape: a model from scratch needs one; name a file of launch/shapes")
        with no_init_weights():
            loaded = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape_config(model.shape)), dtype=dtype)
        loaded.tie_weights()  # that, too, was left undone
        initialise(loaded, model, seed)
        return loaded
    where = Path(locate(model.name))
    if is_litgpt(where):
        if model.quantize != "none":
            raise ValueError(
                "model.quantize: LitGPT's weights are read whole; train once without nf4 and name that run"
            )
        return load_litgpt(where, dtype)
    quantization = None
    if model.quantize == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    try:
        _refuse_quantized(model, AutoConfig.from_pretrained(locate(model.name)))
        loaded = AutoModelForCausalLM.from_pretrained(
            locate(model.name),
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": device} if quantization else None,
        )
    except OSError as error:
        raise ValueError(_unreachable("model.name", model.name, error)) from None
    keep_one_arithmetic(loaded)
    return loaded


def _refuse_quantized(model: recipes.Model, config: Any) -> None:
    """Raises ValueError for weights that are stored in fewer bits than a recipe reads: as NF4 for `quantize: nf4`."""
    stored = getattr(config, "quantization_config", None) or {}
    if not stored or (model.quantize == "nf4" and stored.get("load_in_4bit")):
        return
    kind = "bitsandbytes 4 bit" if stored.get("load_in_4bit") else stored.get("quant_method", "a form of its own")
    remedy = "set model.quantize: nf4, or name" if stored.get("load_in_4bit") else "name"
    raise ValueError(f"model.name: {model.name} is stored quantized ({kind}); {remedy} the model in whole weights")


def frozen_dtype(dtype: str) -> torch.dtype:
    """What weights that do not train are kept and multiplied in here, for a recipe's `model.dtype`.

    A processor without units for bf16 emulates it, some 70 times slower than fp32, which holds every bf16 value.
    """
    return getattr(torch, dtype) if has_bf16_units() else torch.float32


def compute_dtype(recipe: recipes.Recipe) -> torch.dtype:
    """What layers multiply in: as frozen weights are kept here, or as the recipe says where all weights train."""
    return frozen_dtype(recipe.model.dtype) if recipe.lora.rank else getattr(torch, recipe.model.dtype)


def has_bf16_units() -> bool:
    """Whether bf16 products run in hardware, on a card or this processor."""
    return torch.cuda.is_available() or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def take_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a model from scratch name its tokenizer's special tokens: a shape has those of another, or the defaults of
    transformers."""
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))


def for_training(model: PreTrainedModel) -> PreTrainedModel:
    """Put a model into training mode, without which activation checkpointing does nothing, and dropout to zero (a
    router's jitter too): its random numbers would make the loss depend on how a batch is cut, and one pass over much
    text needs none."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # OPT calls it dropout, Bloom hidden_dropout, Llama attention_dropout
            if isinstance(value, float) and re.search("drop|jitter", name):
                setattr(module, name, 0.0)
    return model.train()


def require_room(model: PreTrainedModel, largest_id: int, longest: int) -> None:
    """Raises ValueError for ids, or documents of so many tokens, that the model has no row for in its tables."""
    words: Any = model.get_input_embeddings()
    if largest_id >= len(words.weight):
        raise ValueError(
            f"model.tokenizer: it gives ids up to {largest_id}, and the model knows {len(words.weight)}; name the "
            "tokenizer that belongs to the model"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    learned = any(isinstance(module, nn.Embedding) and module is not words for module in model.modules())
    if positions and learned and longest > positions:
        raise ValueError(
            f"data.max_tokens: a document may have {longest} tokens, and the model has learned {positions} positions; "
            f"set data.max_tokens: {positions} or less, and data.on_long_row for rows"
        )


@torch.no_grad()
def require_apart(model: PreTrainedModel) -> None:
    """Raises ValueError for a model in which documents of one row see each other, though positions restart at each:
    recurrent layers, ALiBi and some attention of transformers' take no notice.

    What another first document changes in the second one's logits is measured by what it changes where both are one.
    D documents, B rows, T tokens, V vocabulary.
    """
    ids_DT = (torch.arange(12) * 37 % model.config.get_text_config().vocab_size).view(3, 4)
    ids_BT = torch.stack([torch.cat([ids_DT[first], ids_DT[2]]) for first in (0, 1, 0, 1)]).to(model.device)
    positions_BT = torch.stack([torch.arange(4).repeat(2)] * 2 + [torch.arange(8)] * 2).to(model.device)
    logits_BTV = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits[:, 4:].float()
    apart, joined = ((logits_BTV[a] - logits_BTV[a + 1]).abs().max().item() for a in (0, 2))
    if apart > max(1e-4, 10 * torch.finfo(model.dtype).eps) * joined:
        raise ValueError(
            f"batch.packing: documents of one row see each other in a model of type {model.config.model_type}; set "
            "batch.packing: false (for pretraining with data.format: text, not data.tokens)"
        )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformer, which compute one after the other."""
    wrapped: Any = model  # by PEFT, whose import takes seconds, which a plan of whole weights can spare
    plain: nn.Module = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = set(getattr(plain, "_no_split_modules", None) or ())
    return [module for module in plain.modules() if type(module).__name__ in kinds]


def prepare(model: nn.Module, knobs: recipes.Model, device: torch.device) -> None:
    """Make blocks recompute, multiply in float8 and compile as the recipe says, in place, before an engine takes them.

    Raises ValueError where this machine or this model cannot.
    """
    layers = blocks(model)
    if knobs.float8:
        require_hopper(device)
        if not use_float8(layers):
            raise ValueError("model.float8: no linear layer of this model has sizes that divide by 16; set it false")
    recompute(model, knobs.activation_checkpointing, knobs.compile)
    if knobs.compile:
        for layer in layers:
            for module in layer.modules():
                if type(module).__name__.endswith("MoE"):  # how many tokens an expert gets is known too late
                    module.forward = torch.compiler.disable(module.forward)
            layer.forward = _compiled(layer.forward)


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for any length. A program serves all layers of a kind; where each call wants one of its own, torch would
    run the rest as written and say so in a warning at most, so that is a mistake here.

    torch allows a function 8 programs. Training, a reference's pass without adapters, evaluation and kinds of layers
    (dense, experts) multiply.
    """
    from torch._dynamo import config, exc  # takes a second, which plain runs are spared

    config.recompile_limit = PROGRAMS
    config.fail_on_recompile_limit_hit = True
    fast = torch.compile(forward, dynamic=True)

    @functools.wraps(fast)
    def run(*args: Any, **named: Any) -> Any:
        try:
            return fast(*args, **named)
        except exc.FailOnRecompileLimitHit as error:
            raise ValueError(
                f"model.compile: this model's layers want more than {PROGRAMS} programs, and the rest would run as "
                "written; set compile: false"
            ) from error

    return run


def as_written(model: nn.Module) -> nn.Module:
    """Take compilation out of a copy, in place, and return it: compiled are the original's layers, and a copied one
    would compute with their weights."""
    for module in model.modules():
        if hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            del module.forward
    return model


def keep_one_arithmetic(model: nn.Module) -> None:
    """Make NF4 layers compute in evaluation as they do in training.

    On a CPU with AVX512-BF16, bitsandbytes repacks a layer at its first forward in evaluation mode and rounds in other
    ways from then on: samples would not come from the model that trains, nor a merge equal it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


def _unreachable(field: str, name: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    return f"{field}: {name} cannot be loaded ({first}); give a directory, or log in to the hub and run while online"
