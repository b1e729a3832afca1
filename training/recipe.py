"""The recipe: everything that decides a run, as frozen pydantic models read from YAML.

One recipe file drives every method on every machine. An unknown key is an error that names the nearest known key;
a combination that cannot work is refused before anything is loaded. `KNOBS` in `tests/training/test_recipe.py` holds
the complete list of keys, so that no option arrives unnoticed.
"""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .rules import broken_rule

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
CountInt = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What numpy's generators and torch's both take."""
PositiveFloat = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """Base of every recipe section: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False, protected_namespaces=())


class Model(Section):
    name: str = Field(description="directory, hub name, asset:NAME, or the run directory of an earlier stage")
    shape: str | None = Field(
        default=None, description="config JSON of launch/shapes: plans offline, or starts from scratch"
    )
    tokenizer: str | None = Field(default=None, description="where the tokenizer is, if not with the model")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantize: Literal["none", "nf4"] = "none"
    kernels: Literal["auto", "torch", "triton"] = "auto"
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        default="none", description="selective keeps matrix products and recomputes the rest"
    )
    compile: bool = Field(default=False, description="torch.compile, block by block")
    float8: bool = Field(default=False, description="linear layers in float8; needs an H100 or newer")
    init: Literal["scaled", "mup"] = Field(default="scaled", description="how a model from scratch is initialised")
    mup_base_width: PositiveInt = Field(default=256, description="hidden size that optim.lr was tuned at (muP)")


class Lora(Section):
    rank: CountInt = Field(default=0, description="0 trains every weight")
    alpha: PositiveFloat = 16.0
    targets: Literal["all-linear", "attention"] = "all-linear"


class Data(Section):
    train: str = Field(default="", description="file, directory, hub name, asset:NAME or task:NAME (reasoning-gym)")
    validation: str | None = Field(
        default=None, description="like train; without it, validation_rows are held out of train"
    )
    validation_rows: CountInt = 0
    train_rows: CountInt = Field(default=0, description="use so many rows (chosen by the seed); 0 uses all")
    split: str = "train"
    where: Mapping[str, str] | None = Field(default=None, description="use only rows whose columns hold these values")
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "preference", "text", "task"] = (
        "auto"
    )
    system: str | None = Field(default=None, description="system turn put before every conversation that has none")
    prompt: str | None = Field(default=None, description="str.format template over the row's columns")
    completion: str | None = Field(default=None, description="str.format template over the row's columns")
    labels: Mapping[str, str] | None = Field(default=None, description="replaces the whole completion: value -> text")
    max_tokens: PositiveInt = 2048
    on_bad_row: Literal["stop", "quarantine"] = "stop"
    on_long_row: Literal["stop", "quarantine", "truncate"] = "stop"
    tokens: str | None = Field(
        default=None, description="directory of token shards: `shipyard data build` writes it, method pretrain reads it"
    )
    mixture: Mapping[str, PositiveFloat] | None = Field(
        default=None, description="sources and their weights, in place of train (method pretrain)"
    )
    validation_fraction: Fraction = Field(default=0.0, description="documents held out of token shards, by their hash")
    near_duplicates: Fraction = Field(default=0.0, description="drop documents this similar (MinHash); 0 keeps them")
    decontaminate: tuple[str, ...] = Field(default=(), description="sources whose 13-grams no document may hold")


class Batch(Section):
    size: PositiveInt = Field(
        default=16, description="samples in one global optimizer step, whatever the number of ranks"
    )
    micro: PositiveInt = Field(default=4, description="samples in one forward pass on one rank, at most")
    packing: bool = Field(default=True, description="one row without padding, documents kept apart by position ids")


class Optim(Section):
    name: Literal["adamw", "muon"] = Field(default="adamw", description="muon: hidden matrices only, the rest AdamW")
    lr: PositiveFloat = 2e-4
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: CountInt = 0
    decay_fraction: Fraction = Field(default=0.2, description="last part of the run in which wsd decays")
    final_lr_fraction: Fraction = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0
    z_loss: Annotated[float, Field(ge=0)] = Field(default=0.0, description="weight of log(Z)^2 per token")


class Parallel(Section):
    engine: Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"] = "ddp"
    tensor: PositiveInt = Field(default=1, description="ranks that share each layer (tensor parallel)")
    context: PositiveInt = Field(default=1, description="ranks that share each sequence (context parallel)")
    offload: Literal["none", "cpu"] = Field(
        default="none", description="where ZeRO keeps optimizer state (ZeRO-3 and FSDP2: weights too)"
    )
    timeout_s: PositiveInt = 1800


class Checkpoints(Section):
    every_steps: CountInt = Field(default=0, description="0 saves at the end only")
    keep_last: PositiveInt = 2
    keep_every: CountInt = Field(default=0, description="also keep every checkpoint whose step is a multiple; 0 none")
    background: bool = Field(default=True, description="write while training goes on")
    max_mb_per_s: CountInt = Field(
        default=0,
        description="a rank writes no faster in the background, where disk, network or cores are training's too; 0 off",
    )


class Health(Section):
    on_bad_step: Literal["stop", "skip", "rewind"] = Field(
        default="stop", description="when a loss or gradient is not finite, or a spike; weights stay untouched"
    )
    spike_factor: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="a gradient norm beyond so many medians of the last 32 steps is a bad step; 0 off"
    )
    heartbeat_s: CountInt = Field(default=300, description="a rank silent for so long ends the job by name; 0 off")


class Log(Section):
    every_steps: PositiveInt = 1
    tensorboard: bool = False
    wandb: str | None = Field(default=None, description="project name; needs the wandb package and a login")


class Dpo(Section):
    beta: PositiveFloat = 0.1
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    sft_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="adds the chosen reply's NLL per global token"
    )


class Grpo(Section):
    group_size: Annotated[int, Field(ge=2)] = 8
    max_new_tokens: PositiveInt = 64
    temperature: PositiveFloat = 1.0
    beta: Annotated[float, Field(ge=0)] = Field(default=0.0, description="weight of the KL term against the reference")
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    inner_steps: PositiveInt = Field(default=1, description="optimizer steps on one set of rollouts")
    scale_rewards: bool = Field(default=True, description="divide advantages by the group's standard deviation")
    task_options: Mapping[str, Any] = Field(default_factory=dict, description="options of the reasoning-gym task")


class Recipe(Section):
    """One run. `steps` or `epochs` decides its length, exactly one of them."""

    method: Literal["sft", "dpo", "grpo", "pretrain"]
    run_dir: str = "runs/run"
    seed: Seed = 17
    steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    resume: Literal["auto", "never"] = "auto"
    deterministic: Literal["off", "elastic"] = Field(
        default="off", description="elastic: the same bits on any number of ranks (powers of two), at a price"
    )
    model: Model
    lora: Lora = Lora()
    data: Data
    batch: Batch = Batch()
    optim: Optim = Optim()
    parallel: Parallel = Parallel()
    checkpoints: Checkpoints = Checkpoints()
    health: Health = Health()
    log: Log = Log()
    dpo: Dpo = Dpo()
    grpo: Grpo = Grpo()

    @field_validator("deterministic", mode="before")
    @classmethod
    def _off_without_quotes(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false

    @model_validator(mode="after")
    def _combinations(self) -> "Recipe":
        if (message := broken_rule(self)) is not None:
            raise ValueError(message)
        return self


MAPPINGS = ("data.labels", "data.where", "data.mixture", "grpo.task_options")
"""Knobs that hold free keys of their own."""


def knobs(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Return every settable key, dotted, in the order of the file."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        names += knobs(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return names


def _section_of(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


class _Loader(yaml.SafeLoader):
    """Plain YAML, but a key given twice is an error, where PyYAML drops the first, and a date is text."""

    yaml_implicit_resolvers: typing.ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value}: given twice, keep one", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides (dotted keys, YAML values).

    Raises ValueError with one line that names the field, the value, the rule and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"recipe: {path} is not a file; recipes are in launch/recipes{_near_file(path)}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"recipe: {path} is not YAML: {reason}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"recipe: {path} must hold keys and values, not {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree)


def parse_recipe(tree: Mapping[str, Any]) -> Recipe:
    """Validate a tree of plain values. Raises ValueError, one line."""
    _refuse_unknown_keys(tree, Recipe, "")
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ValueError(_one_line(error)) from None


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, every knob spelled out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"override: {override!r} is not key=value; write optim.lr=1e-4, for instance")
    if key not in knobs() and key.rpartition(".")[0] not in MAPPINGS:
        raise ValueError(f"override: {key!r} is no recipe key{_did_you_mean(key, knobs())}")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        raise ValueError(f"override: {key}={text!r} is not a YAML value; quote it") from None
    *parents, leaf = key.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"override: {parent} holds {child!r}, not a section, so {key} cannot be set")
        tree = child
    tree[leaf] = value


def _refuse_unknown_keys(tree: Mapping[str, Any], section: type[BaseModel], prefix: str) -> None:
    for key, value in tree.items():
        if key not in section.model_fields:
            raise ValueError(f"{prefix}{key}: unknown key{_did_you_mean(f'{prefix}{key}', knobs())}")
        inner = _section_of(section.model_fields[key].annotation)
        if inner and not isinstance(value, Mapping):
            raise ValueError(f"{prefix}{key}: {value!r} is not a section; it holds {', '.join(inner.model_fields)}")
        if inner:
            _refuse_unknown_keys(value, inner, f"{prefix}{key}.")


def _did_you_mean(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        leaf = key.rsplit(".", 1)[-1]
        near = [name for name in known if name.rsplit(".", 1)[-1] == leaf][:1]
    return f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known[:8])}, ..."


def _near_file(path: Path) -> str:
    folder = Path(__file__).parent.parent / "launch" / "recipes"
    near = difflib.get_close_matches(path.name, [item.name for item in folder.glob("*.yaml")], n=1, cutoff=0.4)
    return f"; did you mean launch/recipes/{near[0]}?" if near else ""


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if not field:
        return message
    if first["type"] == "missing":
        return f"{field}: required, and the recipe does not give it; add it to the file or as {field}=VALUE"
    text = f"{field}: {first['input']!r} is refused: {message[0].lower()}{message[1:]}"
    return f"{text}; {_allowed(first['loc'])}"


def _allowed(location: Sequence[Any]) -> str:
    section: type[BaseModel] | None = Recipe
    for part in location[:-1]:
        section = (
            _section_of(section.model_fields[part].annotation) if section and part in section.model_fields else None
        )
    field = section.model_fields.get(str(location[-1])) if section else None
    if field is None:
        return "see the recipe's other values"
    if typing.get_origin(field.annotation) is Literal:
        return f"choose one of {', '.join(map(str, typing.get_args(field.annotation)))}"
    default = "" if field.is_required() or field.default is None else f" (default {field.default!r})"
    return f"give {' or '.join(_kinds(field.annotation))}{default}"


def _kinds(annotation: Any) -> list[str]:
    """What a field takes, in the words of YAML and Python."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _kinds(inner[0])
    if origin in (typing.Union, types.UnionType):
        return [name for kind in inner for name in _kinds(kind)]
    return ["null" if annotation is types.NoneType else getattr(annotation, "__name__", str(annotation))]
