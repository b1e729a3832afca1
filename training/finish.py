"""The end of a run: the adapter, the whole merged model, and the certificate that the merge says what was trained."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

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
        plain.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        about["certificate"] = _certify(module, plain, tokenizer, run_dir)
    if isinstance(module, PeftModel):
        with new_directory(run_dir / "adapter", {"identity": identity}) as scratch:
            module.save_pretrained(str(scratch))
    log.say(f"{run_dir}/model: the merged model, certified; {_size(run_dir / 'model') / 2**20:.0f} MiB")


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
