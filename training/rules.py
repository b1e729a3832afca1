"""Combinations of knobs that cannot work, each with one line that names the field, the rule and the remedy."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .recipe import Recipe

Rule = tuple[bool, str]


def broken_rule(recipe: "Recipe") -> str | None:
    """The first rule that a recipe breaks, in words; None if it breaks none."""
    for rules in (_data(recipe), _paths(recipe), _shards(recipe), _model(recipe), _parallel(recipe)):
        for broken, message in rules:
            if broken:
                return message
    return None


def _data(recipe: "Recipe") -> Iterator[Rule]:
    """What is trained on, by which method, for how long."""
    yield ((recipe.steps is None) == (recipe.epochs is None), "steps: give exactly one of `steps` and `epochs`")
    yield (
        (recipe.data.train == "") == (recipe.data.mixture is None),
        "data.train: give exactly one of `data.train` and `data.mixture` (sources and their weights)",
    )
    yield (
        (recipe.data.mixture is not None or recipe.data.tokens is not None) and recipe.method != "pretrain",
        "data.tokens: token shards and mixtures are for method pretrain; give rows in data.train",
    )
    yield (
        recipe.method == "grpo" and not recipe.data.train.startswith("task:"),
        "data.train: grpo needs a task with a verifier; use task:NAME, chain_sum for instance",
    )
    yield (
        recipe.method != "grpo" and recipe.data.train.startswith("task:"),
        "data.train: task: sources are for method grpo; give a file, asset: or hub name",
    )
    yield (
        recipe.method == "grpo" and recipe.epochs is not None,
        "epochs: a task generates without end; give `steps`",
    )
    yield (
        recipe.data.prompt is not None and recipe.data.completion is None and recipe.method == "sft",
        "data.completion: data.prompt is set, so say what the reply is, '{label}' for instance",
    )
    yield (
        recipe.data.completion is not None and recipe.data.prompt is None,
        "data.completion: a template for the reply needs one for the question; set data.prompt too",
    )
    yield (recipe.data.mixture == {}, "data.mixture: it names no source; give sources and their weights")
    reader, unread = _unread(recipe)
    fields = type(recipe.data).model_fields
    changed = [name for name in unread if getattr(recipe.data, name) != fields[name].default]
    yield (bool(changed), f"data.{', '.join(changed)}: {reader} does not read it; leave it out")


def _unread(recipe: "Recipe") -> tuple[str, tuple[str, ...]]:
    """Knobs of rows that a recipe's method or format would ignore, and which that is."""
    if recipe.method == "grpo":
        return "a task, which makes its own rows,", tuple(name for name in ROW_KNOBS if name != "system")
    if recipe.method == "dpo":
        return "method dpo, whose replies are the columns chosen and rejected,", ("completion", "labels")
    if recipe.data.format == "text" and recipe.data.tokens is None:
        return "format text, which takes the column text as it is,", ("prompt", "completion", "labels", "system")
    return "", ()


SHARD_KNOBS = ("mixture", "validation_fraction", "near_duplicates", "decontaminate")
ROW_KNOBS = ("validation", "validation_rows", "train_rows", "system", "prompt", "completion", "labels", "on_long_row")


def _shards(recipe: "Recipe") -> Iterator[Rule]:
    """Token shards, which `shipyard data build` makes of documents."""
    data, fields = recipe.data, type(recipe.data).model_fields
    changed = [name for name in SHARD_KNOBS if getattr(data, name) != fields[name].default]
    yield (
        data.tokens is None and bool(changed),
        f"data.{', '.join(changed)}: for token shards; name their directory in data.tokens, and run "
        "`shipyard data build`",
    )
    changed = [name for name in ROW_KNOBS if getattr(data, name) != fields[name].default]
    yield (
        data.tokens is not None and bool(changed),
        f"data.{', '.join(changed)}: token shards are made of whole documents of text; leave it out "
        "(data.validation_fraction holds documents out)",
    )
    yield (
        data.tokens is not None and data.format not in ("auto", "text"),
        f"data.format: {data.format}, but token shards are made of text; leave it out",
    )
    yield (
        data.tokens is not None and not recipe.batch.packing,
        "batch.packing: token shards are packed, with documents apart; leave it true",
    )
    yield (
        data.tokens is not None and data.max_tokens < 2,
        "data.max_tokens: 1 token predicts nothing; give more",
    )
    yield (
        data.mixture is not None and len(data.mixture) > 1 and recipe.epochs is not None,
        "epochs: a mixture's sources end at different times; give `steps`",
    )


def _paths(recipe: "Recipe") -> Iterator[Rule]:
    """A shell knows a user's home, and not every machine of a job has the same."""
    model, data = recipe.model, recipe.data
    named = {
        "run_dir": recipe.run_dir, "model.name": model.name, "model.tokenizer": model.tokenizer,
        "model.shape": model.shape, "data.train": data.train, "data.validation": data.validation,
        "data.tokens": data.tokens,
    }  # fmt: skip
    for field, path in named.items():
        yield (path or "").startswith("~"), f"{field}: {path} would be a folder named ~; write the whole path"


def _model(recipe: "Recipe") -> Iterator[Rule]:
    """The model and its optimizer."""
    run_dir = Path(recipe.run_dir).resolve()
    yield (
        Path(recipe.model.name).resolve() in (run_dir, run_dir / "model"),
        f"run_dir: {recipe.run_dir} holds the model that this run begins with, and would replace it; name another",
    )
    yield (
        recipe.model.quantize == "nf4" and recipe.lora.rank == 0,
        "model.quantize: nf4 weights are frozen, so there is nothing to train; set lora.rank (16, say)",
    )
    yield (
        recipe.optim.name == "muon" and recipe.parallel.engine == "zero3",
        "optim.name: muon needs whole matrices, and zero3 scatters each one over the ranks; use parallel.engine zero1, "
        "zero2, ddp or fsdp2, or optim.name: adamw",
    )
    yield (
        recipe.optim.name == "muon" and recipe.parallel.offload == "cpu",
        "parallel.offload: muon gathers whole matrices on the device; use offload: none, or optim.name: adamw",
    )
    yield (
        recipe.optim.name == "muon" and recipe.lora.rank > 0,
        "optim.name: muon is for the hidden matrices of a whole model, not for adapters; use adamw",
    )
    yield (
        recipe.optim.z_loss > 0 and recipe.method not in ("sft", "pretrain"),
        f"optim.z_loss: belongs to the next-token loss, which {recipe.method} has not; set it to 0",
    )
    yield (
        recipe.model.init == "mup" and recipe.lora.rank > 0,
        "model.init: muP has no rule for adapters; use init: scaled, or lora.rank: 0",
    )
    yield (
        recipe.model.compile and (recipe.model.quantize == "nf4" or recipe.deterministic == "elastic"),
        "model.compile: nf4 layers and deterministic: elastic must run as written; set compile: false",
    )
    yield (
        recipe.model.compile and (recipe.method == "grpo" or recipe.parallel.engine == "zero3"),
        "model.compile: sampling (grpo) and ZeRO-3's gathering of weights cannot be compiled; set compile: false",
    )
    yield (
        recipe.model.float8 and (recipe.lora.rank > 0 or recipe.model.dtype != "bfloat16"),
        "model.float8: it takes the place of bf16 where whole weights train; set dtype: bfloat16 and lora.rank: 0, or "
        "float8: false",
    )


def _parallel(recipe: "Recipe") -> Iterator[Rule]:
    """How the work is spread."""
    yield (
        recipe.model.quantize == "nf4" and recipe.parallel.engine in ("zero3", "fsdp2"),
        f"parallel.engine: {recipe.parallel.engine} cannot cut nf4 weights; use zero2, or model.quantize: none",
    )
    yield (
        recipe.parallel.offload == "cpu" and recipe.parallel.engine == "ddp",
        "parallel.offload: ddp has nothing to offload; use fsdp2, zero2 or zero3, or set offload: none",
    )
    yield (
        recipe.deterministic == "elastic" and recipe.parallel.engine != "ddp",
        "parallel.engine: deterministic: elastic keeps all on every rank; use ddp, or deterministic: off",
    )
    yield (
        recipe.parallel.tensor > 1 and recipe.parallel.engine != "fsdp2",
        f"parallel.tensor: {recipe.parallel.engine} cannot cut what ranks share already; use parallel.engine: fsdp2, "
        "or tensor: 1",
    )
    yield (
        recipe.parallel.tensor > 1 and (recipe.lora.rank > 0 or recipe.optim.name == "muon"),
        "parallel.tensor: adapters and muon need whole matrices; use adamw with lora.rank: 0, or tensor: 1",
    )
    yield (
        recipe.parallel.tensor > 1 and (recipe.model.compile or recipe.parallel.offload == "cpu"),
        "parallel.tensor: does not go together with model.compile or parallel.offload here; leave these out, or set "
        "tensor: 1",
    )
    yield (
        recipe.parallel.context > 1
        and (recipe.parallel.engine.startswith("zero") or recipe.deterministic == "elastic"),
        "parallel.context: ranks share rows under ddp and fsdp2 alone; use parallel.engine: fsdp2 with deterministic: "
        "off, or context: 1",
    )
    yield (
        recipe.parallel.context > 1 and recipe.model.kernels == "triton",
        "parallel.context: the Triton kernels take whole rows; set model.kernels: auto, or context: 1",
    )
    yield (
        recipe.method == "grpo" and recipe.parallel.engine in ("zero3", "fsdp2"),
        f"parallel.engine: grpo samples from weights in place, which {recipe.parallel.engine} scatters; use ddp, "
        "zero1 or zero2",
    )
