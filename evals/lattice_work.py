"""The folder of a lattice that is being trained: what an interrupted run has measured is not measured again.

The whole lattice takes hours. Its measurements are the lines of `measured.jsonl`, under a first line that says which
code made them: a certificate is about one.
"""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft")
MEASURED = "measured.jsonl"


def versions() -> dict[str, str]:
    """Of the libraries that compute."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def sources_hash() -> str:
    """SHA-256 over this package's code, by which a certificate names it."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(
        path for room in ("evals", "kernels", "launch", "training") for path in (root / room).glob("*.py")
    ):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def open_work(folder: Path, cover: str) -> list[dict[str, Any]]:
    """What an earlier run left in `folder`, which is made if it is new.

    Raises ValueError if other code, or another choice of cells, left it.
    """
    about = {"cover": cover, "sources": sources_hash(), **versions()}
    path = folder / MEASURED
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about) + "\n", encoding="utf-8")
        return []
    written = path.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]  # a kill may leave half a line
    first, *lines = [json.loads(line) for line in whole.splitlines()] or [None]
    if first != about:
        raise ValueError(
            f"verify: {folder} holds an unfinished lattice of another version or choice of cells; remove it, or name "
            "another folder with --out"
        )
    path.write_bytes(whole)
    return lines


def keep(folder: Path, line: dict[str, Any]) -> None:
    """Add a measurement."""
    with (folder / MEASURED).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
