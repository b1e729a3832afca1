"""The end of a run: the adapter, the whole merged model, and the certificate that the merge says what was trained."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig

from .chat import ChatEncoder
from .engine import Engine
from .log import StepLog
from .lora import merge
from .manifest import Manifest, new_directory, verify
from .models import config_source
from .recipe import Recipe


def finished(run_dir: Path, identity: str) -> Manifest | None:
    """The verified manifest of `run_dir/model` if this very run finished before, else None."""
    if not (run_dir / "model" / "manifest.json").is_file():
        return None
    manifest = verify(run_dir / "model")
    return manifest if manifest.about.get("identity") == identity else None


def finish(recipe: Recipe, engine: Engine, tokenizer: Any, run_dir: Path, identity: str, log: StepLog) -> None:
    """Write `adapter/` and `model/`, committed, with the merge's certificate. Collective; the first rank writes.

    Raises ValueError when the merged model does not say what the trained one said; nothing is committed then.
    """
    with engine.whole_weights():
        if engine.ranks.first:
            _write(recipe, engine, tokenizer, run_dir, identity, log)
    engine.ranks.wait()


def _write(recipe: Recipe, engine: Engine, tokenizer: Any, run_dir: Path, identity: str, log: StepLog) -> None:
    module, dtype = engine.module, getattr(torch, recipe.model.dtype)
    module.eval()
    source = config_source(recipe.model.name)
    plain = merge(module, source, dtype)
    about: dict[str, Any] = {
        "identity": identity,
        "method": recipe.method,
        "parent": _parent_digest(source),
        "model": recipe.model.name,
    }
    with new_directory(run_dir / "model", about) as scratch:
        plain.generation_config.eos_token_id = _ends(plain.generation_config.eos_token_id, tokenizer)
        _save(plain, scratch)
        tokenizer.save_pretrained(scratch)
        about["certificate"] = _certify(module, plain, tokenizer, run_dir)
        if isinstance(module, PeftModel):  # before model/, by which a run that is started again knows that it is done
            with new_directory(run_dir / "adapter", {"identity": identity}) as beside:
                module.save_pretrained(str(beside))
    log.say(f"{run_dir}/model: the merged model, certified; {_size(run_dir / 'model') / 2**20:.0f} MiB")


def _save(plain: Any, folder: Path) -> None:
    """`save_pretrained`, which alone would refuse the generation configs that some models come with, a temperature
    without sampling for instance: they are what they were."""
    spoken, plain.generation_config = plain.generation_config, GenerationConfig()
    plain.save_pretrained(folder)
    plain.generation_config = spoken
    spoken.to_json_file(folder / "generation_config.json")


def _ends(known: Any, tokenizer: Any) -> Any:
    """What an engine is to stop at: the tokens that end a turn in training, before those that the model had.

    A base model knows the end of a text alone, and is taught the end of a turn.
    """
    taught = {tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template:
        with suppress(ValueError):  # a template that training did not need
            taught |= ChatEncoder(tokenizer).end_ids
    before = known if isinstance(known, list) else [] if known is None else [known]
    return [*sorted(taught - {*before}), *before] if taught - {*before} else known


def _certify(module: torch.nn.Module, plain: Any, tokenizer: Any, run_dir: Path) -> dict[str, Any]:
    from dataclasses import asdict

    from ..serving.parity import certify_merge

    certificate = certify_merge(module, plain, tokenizer)  # pyright: ignore[reportArgumentType]
    certificate.write(run_dir / "certificate.json")
    if not certificate.passed:
        raise ValueError(f"merge: {certificate.line()}; the checkpoint is kept, model/ is not written")
    return asdict(certificate)


def _parent_digest(source: str | None) -> str | None:
    if source is None or not (Path(source) / "manifest.json").is_file():
        return None
    return verify(Path(source)).digest


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
