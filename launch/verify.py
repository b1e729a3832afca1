"""`shipyard verify`: every hash, parent and certificate under a directory, checked again; or the kernels."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..training.manifest import MANIFEST, Damage, Manifest, damages, read_manifest
from .assets import PREFIX, cache_dir

STEP = re.compile(r"step-(\d{6,})")
NAMED = 3
CERTIFICATES = "*certificate*.json"


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    path: str
    kind: str
    passed: bool
    detail: str


def verify(path: Path, cover: Literal["short", "standard", "full"], out: Path | None, as_json: bool) -> bool:
    """Prove what a word names, or check what lies under a path; return whether all of it holds."""
    if str(path) == "kernels":
        return verify_kernels(as_json)
    if str(path) == "crash":
        from ..evals.crash_page import verify_crash

        return verify_crash(cover, out, as_json)
    if str(path) == "invariance":
        from ..evals.invariance import verify_invariance

        return verify_invariance(cover, out or Path("runs/invariance"), as_json)
    if out is not None:
        raise ValueError(f"verify: --out is for proofs (crash, invariance), not for {path}; leave it out")
    return verify_tree(path, as_json)


def verify_kernels(as_json: bool, kernels: Sequence[str] = ()) -> bool:
    """Prove every kernel under the interpreter, and on the GPU where there is one; print a line for each as it comes,
    and return whether all of it holds.

    Takes minutes; `kernels` names some of them. Errors against fp64 are given over those of PyTorch's eager code in
    the same dtype.
    """
    import torch

    from ..kernels.accuracy import MAX_BAR, RMS_BAR
    from ..kernels.proof import Verdict, prove

    places = (False, True) if torch.cuda.is_available() else (False,)
    if as_json:
        verdicts: list[Verdict] = []
        passed = all([prove(verdicts.append, kernels, card) for card in places])
        rows = [asdict(verdict) | {"holds": verdict.holds} for verdict in verdicts]
        bars = {"rms": RMS_BAR, "max": MAX_BAR}
        print(json.dumps({"passed": passed, "bars": bars, "kernels": _finite(rows)}, indent=1, allow_nan=False))
        return passed
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[dim]{'':6} {'kernel':32} {'dtype':9} {'rms':>6} {'max':>6}  laws   memory[/]")
    console.print(f"[dim]{'bar':>6} {'error over eager PyTorch':42} {RMS_BAR:6.2f} {MAX_BAR:6.2f}  all    no faults[/]")
    heard = ["interpreter"]

    def show(verdict: Verdict) -> None:
        if verdict.where not in heard:
            heard.append(verdict.where)
            console.print(f"[dim]{verdict.where}[/]")
        mark = "[green]ok    [/]" if verdict.holds else "[red]FAILED[/]"
        laws = f"{verdict.laws - len(verdict.broken)} of {verdict.laws}"
        broken = f"  [red]broken: {', '.join(verdict.broken)}[/]" if verdict.broken else ""
        console.print(f"{mark} {verdict.kernel:32} {verdict.dtype:9} {verdict.rms:6.3f} {verdict.largest:6.3f}  {laws}"
                      f"   {'; '.join(verdict.faults) or 'clean'}{broken}")  # fmt: skip

    return all([prove(show, kernels, card) for card in places])


def _finite(rows: list[dict]) -> list[dict]:
    """JSON knows no infinity: what has no error because it crashed gets null."""
    return [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]


def verify_tree(path: Path, as_json: bool) -> bool:
    """Check everything under `path`, print what was found, and return whether all of it holds.

    Raises ValueError when there is nothing to check, which is not the same as nothing wrong.
    """
    root = path if path.is_dir() else path.parent
    if not path.exists():
        raise ValueError(f"verify: {path} does not exist; give a run, checkpoint, model or export")
    if path.is_file() and not (root / MANIFEST).is_file() and not path.match(CERTIFICATES):
        raise ValueError(f"verify: {path} is in no committed directory; give a run, checkpoint, model or export")
    findings = list(findings_under(root))
    if not findings:
        raise ValueError(f"verify: {root} holds no {MANIFEST} and no certificate, so nothing there was ever committed")
    passed = all(finding.passed for finding in findings)
    if as_json:
        print(json.dumps({"passed": passed, "findings": [asdict(finding) for finding in findings]}, indent=1))
        return passed
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    for finding in findings:  # paths hold brackets of their own
        mark = ("ok    ", "green") if finding.passed else ("FAILED", "red")
        console.print(Text.assemble(mark, f" {finding.kind:11} {finding.path}  ", (finding.detail, "dim")))
    return passed


def findings_under(root: Path) -> Iterator[Finding]:
    """Check committed directories, then certificates, in path order. Unfinished scratch directories do not count."""
    manifests = sorted(item.parent for item in root.rglob(MANIFEST) if not _is_scratch(item, root))
    damaged: list[Path] = []
    for directory in manifests:
        findings = list(_files(directory))
        if not findings[0].passed:
            damaged.append(directory)
        yield from findings
    for run in sorted({directory.parent for directory in damaged if STEP.fullmatch(directory.name)}):
        yield _fall_back(run, manifests, damaged)
    for directory in manifests:
        yield from _lineage(directory)
    for certificate in sorted(root.rglob(CERTIFICATES)):
        if not _is_scratch(certificate, root):
            yield _certificate(certificate)


def _files(directory: Path) -> Iterator[Finding]:
    """Everything that is wrong with a committed directory's files, or that they are whole."""
    try:
        manifest = read_manifest(directory)
    except ValueError as error:
        yield Finding(str(directory), "files", False, str(error))
        return
    whole = True
    for damage in damages(manifest):
        whole = False
        yield Finding(str(directory), "files", False, f"{damage}{_tensors(damage)}")
    if whole:
        size = sum(entry["bytes"] for entry in manifest.files.values())
        yield Finding(
            str(directory), "files", True, f"{len(manifest.files)} files, {size / 1e6:.1f} MB, {manifest.digest}"
        )


def _tensors(damage: Damage) -> str:
    if damage.path.suffix != ".safetensors" or not damage.spans:
        return ""
    from ..training.shard import damaged_tensors

    names = damaged_tensors(damage)
    if not names:
        return "; in its header"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"; {'in' if damage.flipped else 'maybe in'} {', '.join(names[:NAMED])}{more}"


def _fall_back(run: Path, manifests: list[Path], damaged: list[Path]) -> Finding:
    """Which checkpoint a run with damaged ones goes on from: what `training/checkpoint.py` does by itself."""
    steps = {int(match[1]): item for item in manifests if item.parent == run and (match := STEP.fullmatch(item.name))}
    whole = [step for step, item in steps.items() if item not in damaged]
    if not whole:
        return Finding(str(run), "resume", False, "no checkpoint is whole; the same command starts the run over")
    newest = f"goes on from {steps[max(whole)].name}"
    if max(whole) == max(steps):
        return Finding(str(run), "resume", True, f"{newest}, its newest, which is whole")
    return Finding(str(run), "resume", False, f"fall back to step {max(whole)}: the same command {newest} by itself")


def _is_scratch(path: Path, root: Path) -> bool:
    return any(part.startswith(".") and part.endswith((".tmp", ".old")) for part in path.relative_to(root).parts)


def _lineage(directory: Path) -> Iterator[Finding]:
    """A directory that names its parent's digest is checked against that parent, if the parent is still there."""
    try:
        about = read_manifest(directory).about
    except ValueError:
        return
    parent = about.get("model", about.get("source"))
    digest = about.get("parent", about.get("source_digest"))
    if not isinstance(parent, str) or not isinstance(digest, str):
        return
    manifest = _parent_manifest(parent)
    if manifest is None:
        yield Finding(str(directory), "lineage", True, f"made from {digest}; {parent} is not here to compare")
    else:
        same = manifest.digest == digest
        detail = f"made from {parent}" if same else f"made from {digest}, but {parent} now holds {manifest.digest}"
        yield Finding(str(directory), "lineage", same, detail)


def _parent_manifest(name: str) -> Manifest | None:
    """The manifest of a run's model, a model directory or a cached asset; None if it is not on this machine."""
    path = cache_dir() / name.removeprefix(PREFIX) if name.startswith(PREFIX) else Path(name)
    for candidate in (path / "model", path):
        if (candidate / MANIFEST).is_file():
            try:
                return read_manifest(candidate)
            except ValueError:
                return None
    return None


def _certificate(path: Path) -> Finding:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return Finding(str(path), "certificate", False, "is not JSON; export again")
    if not isinstance(tree, dict):
        return Finding(str(path), "certificate", False, "is no certificate of shipyard's")
    if tree.get("kind") == "invariance":
        return _invariance(path, tree)
    if tree.get("checked") is False:
        return Finding(str(path), "certificate", True, "; ".join(tree.get("limits", [])) or "not checked")
    numbers = f", KL {tree['mean_kl']:.1e} (budget {tree['budget']:.0e})" if "mean_kl" in tree else ""
    failures = "; ".join(tree.get("failures", []))
    detail = f"{tree.get('subject', 'template')}{numbers}{': ' + failures if failures else ''}"
    return Finding(str(path), "certificate", tree.get("passed") is True, detail)


def _invariance(path: Path, tree: Mapping[str, Any]) -> Finding:
    """An invariance certificate must follow from its own numbers: no cell beyond the tolerance, no hash of its own."""
    beyond = [
        cell["name"]
        for cell in tree["cells"]
        if cell["dtype"] == "float32"
        and not all((cell[key] or 0.0) <= tree["tolerance"] for key in ("loss", "grad_norm", "weights"))
    ]
    failures = [*tree["failures"], *(f"{name}: beyond {tree['tolerance']:.0e}" for name in beyond)]
    failures += [f"{group['name']}: bits differ" for group in tree["elastic"]["hashes"] if len(group["sha256"]) != 1]
    passed = tree["passed"] is True and not failures and bool(tree["cells"])
    return Finding(str(path), "certificate", passed, "; ".join([tree["subject"], *failures]))
