"""What one step computes and how it is cut over ranks: everything that a plan follows from, except the cards."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..kernels.huggingface import PROVEN_CARDS, path_of
from ..training.parallel import computes_whole
from ..training.recipe import Recipe
from .footprint import Checkpointing, LayerPath, Loss, Pass

EngineName = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class Workload:
    """One optimizer step of `rounds` micro-batches of `micro` samples of `tokens` tokens on each data-parallel rank.

    Pipeline stages, a sequence-parallel residual stream and the like are here because published runs have them; our
    recipes do not.
    """

    config: str
    """The model's config as JSON."""
    ranks: int
    tokens: int
    micro: int
    rounds: int = 1
    engine: EngineName = "fsdp2"
    dtype: str = "bfloat16"
    checkpointing: Checkpointing = "none"
    compile: bool = False
    float8: bool = False
    quantize: str = "none"
    lora_rank: int = 0
    lora_targets: str = "all-linear"
    adapter_dtype: str = "float32"
    optimizer: str = "adamw"
    offload: bool = False
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    chunks: int = 1
    """Pieces of the model on each pipeline rank (interleaved 1F1B)."""
    sequence_parallel: bool = False
    """Tensor-parallel ranks also share the residual stream and the vocabulary."""
    async_tensor: bool = False
    """Tensor-parallel collectives are cut up and overlapped with the products they feed."""
    loss: Loss = "ours"
    packed: bool = False
    """The samples of a micro-batch lie in one row."""
    kernels: Literal["stock", "auto", "torch", "triton"] = "stock"
    """As a recipe asks for them; `stock` is other software, and no path of ours."""
    proven: bool = False
    """The cards are among those whose `auto` takes the Triton kernels."""
    flash3: bool = False
    """Attention by a Hopper kernel (FlashAttention-3, cuDNN) in place of FlashAttention-2."""
    reference: bool = False
    """A frozen copy of the model is held (DPO, or GRPO with a KL term)."""

    @property
    def data(self) -> int:
        """Ranks that see different samples."""
        return self.ranks // (self.tensor * self.context * self.pipeline)

    @property
    def shards(self) -> int:
        """Ranks over which a sharding engine cuts each weight: those of the sequence hold the same ones too."""
        return self.data * self.context

    @property
    def step_tokens(self) -> int:
        """Tokens in one global step."""
        return self.data * self.rounds * self.micro * self.tokens

    @property
    def autocast(self) -> bool:
        """DDP keeps fp32 weights and casts them where they are used; the others compute in the dtype held."""
        return self.engine == "ddp" and self.dtype == "bfloat16" and not self.lora_rank

    @property
    def path(self) -> LayerPath:
        """The code that the training loop would plug in, by its own rule."""
        kind = json.loads(self.config)["model_type"]
        whole = computes_whole(self.engine, self.tensor, self.context, self.compile)
        return "stock" if self.kernels == "stock" else path_of(self.kernels, kind, self.proven, whole) or "stock"

    def layers(self) -> int:
        return json.loads(self.config)["num_hidden_layers"]

    def one_pass(self) -> Pass:
        """What to measure. Ranks that share the residual stream have 1/tensor of everything, so they measure whole."""
        return Pass(
            config=self.config,
            samples=self.micro,
            tokens=self.tokens // self.context,
            checkpointing=self.checkpointing,
            dtype=self.dtype,
            autocast=self.autocast,
            lora_rank=self.lora_rank,
            lora_targets=self.lora_targets,
            adapter_dtype=self.adapter_dtype,
            loss=self.loss,
            packed=self.packed and self.micro > 1,
            path=self.path,
            head_elsewhere=self.engine in ("fsdp2", "zero3"),
            tensor=1 if self.sequence_parallel else self.tensor,
        )


def from_recipe(
    recipe: Recipe, config: Mapping[str, Any], ranks: int, arch: str = "", ragged: bool = False
) -> Workload:
    """Turn a recipe into a workload on `ranks` ranks of an architecture (`sm_90`; none is no GPU).

    Raises ValueError, one line, where the batch cannot be cut so, unless it may be `ragged`: training accepts that,
    some ranks then compute nothing.
    """
    parallel, batch = recipe.parallel, recipe.batch
    model = parallel.tensor * parallel.context
    if ranks % model:
        raise ValueError(
            f"parallel.tensor: tensor {parallel.tensor} x context {parallel.context} ranks share a sample, and {ranks} "
            f"GPUs are no multiple of {model}; change --gpus, or the two"
        )
    data = ranks // model
    if batch.size % (batch.micro * data) and not ragged:
        fits = max(1, round(batch.size / (batch.micro * data))) * batch.micro * data
        raise ValueError(
            f"batch.size: {batch.size} samples do not divide into micro-batches of {batch.micro} on {data} ranks; set "
            f"batch.size={fits}, another batch.micro or other --gpus"
        )
    length = recipe.data.max_tokens + (recipe.grpo.max_new_tokens if recipe.method == "grpo" else 0)
    if length % parallel.context:
        raise ValueError(
            f"parallel.context: {parallel.context} ranks cannot share {length} tokens evenly; change it or "
            "data.max_tokens"
        )
    frozen_copy = recipe.method == "dpo" or (recipe.method == "grpo" and recipe.grpo.beta > 0)
    return Workload(
        config=json.dumps(dict(config)),
        ranks=ranks,
        tokens=length,
        micro=batch.micro * (2 if recipe.method == "dpo" else 1),  # a preference pair is two sequences
        rounds=-(-batch.size // (batch.micro * data)),
        engine=parallel.engine,
        dtype=recipe.model.dtype,
        checkpointing=_checkpointing(recipe),
        compile=recipe.model.compile,
        float8=recipe.model.float8,
        quantize=recipe.model.quantize,
        lora_rank=recipe.lora.rank,
        lora_targets=recipe.lora.targets,
        optimizer=recipe.optim.name,
        offload=parallel.offload == "cpu",
        tensor=parallel.tensor,
        context=parallel.context,
        packed=recipe.batch.packing,
        kernels=recipe.model.kernels,
        proven=arch in PROVEN_CARDS,
        reference=frozen_copy and not recipe.lora.rank,
    )


def _checkpointing(recipe: Recipe) -> Checkpointing:
    """Compiled blocks keep products and recompute what is cheap, asked or not (training/activations.py)."""
    asked = recipe.model.activation_checkpointing
    return "selective" if recipe.model.compile and asked == "none" else asked
