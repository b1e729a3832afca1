"""Turn a model into what other programs load: safetensors, GGUF, GGUF with an Ollama Modelfile, LitGPT, each certified.

The directory appears only when every certificate has passed; its manifest names the source by the digest of its files.
"""

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..training.deepspeed_files import export_deepspeed, import_deepspeed
from ..training.litgpt import load_litgpt, save_litgpt
from ..training.manifest import MANIFEST, hash_file, new_directory, read_manifest, verify
from .gguf import KINDS, write_gguf
from .llamacpp import require_llamacpp
from .modelfile import TemplateCertificate, write_modelfile
from .parity import Certificate, certify_gguf, certify_merge, certify_safetensors, read_reference
from .vocabulary import read_json

TARGETS = ("hf", "gguf", "ollama", "litgpt", "deepspeed", "checkpoint")
DEFAULT_QUANT = {"gguf": "f16", "ollama": "q8_0"}
HF_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json")
HF_EXTRAS = (
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE*",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "additional_chat_templates/*.jinja",
)


def model_directory(model: Path) -> Path:
    """A run directory's model, or the model directory itself. Raises ValueError when neither holds a model."""
    for folder in (model / "model", model):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"model: {model} holds no config.json (nor model/config.json); give a run or a model directory")


def source_digest(model_dir: Path) -> str:
    """A digest of the model's files: its manifest's, after checking every hash, or one computed the same way."""
    if (model_dir / MANIFEST).is_file():
        return verify(model_dir).digest
    files = sorted(p for p in model_dir.iterdir() if p.is_file() and not p.name.startswith("."))
    return xxhash.xxh3_128_hexdigest("\n".join(f"{p.name} {hash_file(p)['xxh3_128']}" for p in files).encode())


def _quants(to: str, quant: str | None) -> list[str]:
    if to not in TARGETS:
        raise ValueError(f"to: {to!r} is not one of {', '.join(TARGETS)}")
    if to not in DEFAULT_QUANT:
        if quant is not None:
            raise ValueError(f"quant: {quant!r} with --to {to}, which keeps the model's own dtype; leave --quant out")
        return []
    kinds = (quant or DEFAULT_QUANT[to]).split(",")
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"quant: {kind!r} is not one of {', '.join(KINDS)}")
    if to == "ollama" and len(kinds) > 1:
        raise ValueError(f"quant: {quant!r}, an Ollama model is made from one file; name one kind")
    return kinds


def _check_out(out_dir: Path) -> None:
    """An earlier export makes room for the next; a run's model or checkpoint, committed as well, does not."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return
    with contextlib.suppress(ValueError):
        if read_manifest(out_dir).about.get("kind") == "export":
            return
    raise ValueError(f"out: {out_dir} exists and is no export of shipyard's; name a new directory")


def _copy(model_dir: Path, folder: Path, patterns: Sequence[str]) -> None:
    for path in (path for pattern in patterns for path in model_dir.glob(pattern)):
        to = folder / path.relative_to(model_dir)
        to.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, to)


def _export_hf(model_dir: Path, folder: Path) -> list[Certificate]:
    _copy(model_dir, folder, (*HF_FILES, *HF_EXTRAS))
    certificate = certify_safetensors(model_dir, folder)
    certificate.write(folder / "safetensors.certificate.json")
    return [certificate]


def _export_litgpt(model_dir: Path, folder: Path) -> list[Certificate]:
    """LitGPT's files, read back, must say what the model says."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    save_litgpt(model, folder, model_dir.resolve().parent.name if model_dir.name == "model" else model_dir.name)
    _copy(model_dir, folder, ("generation_config.json", "tokenizer*.json", *HF_EXTRAS))
    back = load_litgpt(folder, model.dtype)
    certificate = certify_merge(model, back, AutoTokenizer.from_pretrained(model_dir))
    certificate.subject, certificate.reference = "lit_model.pth", str(model_dir)
    certificate.limits = ["LitGPT's layout was read back and run by transformers"]
    certificate.write(folder / "litgpt.certificate.json")
    return [certificate]


def _export_gguf(model_dir: Path, folder: Path, kinds: list[str]) -> list[Certificate]:
    files = [folder / f"model-{kind}.gguf" for kind in kinds]
    for path, kind in zip(files, kinds, strict=True):
        write_gguf(model_dir, path, kind)
    certificates = certify_gguf(model_dir, files, read_reference(model_dir))
    for path, certificate in zip(files, certificates, strict=True):
        certificate.write(path.with_suffix(".certificate.json"))
    return certificates


def export(model: Path, out_dir: Path, to: str, quant: str | None = None) -> Path:
    """Export `model` (a run or a Hugging Face directory) into the new directory `out_dir` and return it.

    `to` is hf, gguf, ollama or litgpt; deepspeed writes a run's checkpoint in DeepSpeed's universal layout; checkpoint
    makes a run directory of a DeepSpeed checkpoint and returns the step in it. `quant` is f32, f16, bf16 or q8_0, for
    gguf several with commas. Raises ValueError, with nothing left behind, when the model cannot be written in that form
    or a certificate does not pass.
    """
    kinds = _quants(to, quant)
    if to == "checkpoint":
        return import_deepspeed(model, out_dir)
    _check_out(out_dir)
    if to == "deepspeed":
        return export_deepspeed(model, out_dir)
    model_dir = model_directory(model)
    read_json(model_dir / "tokenizer.json")
    if to in ("gguf", "ollama"):
        require_llamacpp()
    about: dict[str, Any] = {"kind": "export", "to": to, "quant": kinds, "source": str(model_dir.resolve())}
    about["source_digest"] = source_digest(model_dir)
    with new_directory(out_dir, about) as folder:
        certificates: list[Certificate | TemplateCertificate] = []
        if to == "ollama":
            template = write_modelfile(model_dir, f"model-{kinds[0]}.gguf", folder / "Modelfile")
            template.write(folder / "Modelfile.certificate.json")
            certificates.append(template)
        if kinds:
            certificates += _export_gguf(model_dir, folder, kinds)
        else:
            certificates += (_export_hf if to == "hf" else _export_litgpt)(model_dir, folder)
        for certificate in certificates:
            if not certificate.passed and not (
                isinstance(certificate, TemplateCertificate) and not certificate.checked
            ):
                raise ValueError(f"parity: {certificate.line()}; nothing was written")
        about["certificates"] = [asdict(certificate) for certificate in certificates]
    return out_dir
