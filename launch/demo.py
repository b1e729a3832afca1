"""`shipyard demo`: the whole product on a real 135M Llama, stage after stage.

fetch -> score -> QLoRA -> score -> DPO -> score -> GRPO -> score -> export -> serve -> ask -> report. The directory's
name is a hash of everything that decides the outcome; a stage whose verified output is there, made from the same
parent, is not done again.
"""

import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from .. import __version__
from ..evals.report import verdict, write_report
from ..evals.tasks import Result, evaluate, read_results, write_results
from ..serving.export import export
from ..training.loop import identity, train
from ..training.manifest import MANIFEST, new_directory, read_manifest, verify
from ..training.recipe import Recipe, dump_recipe, load_recipe
from .assets import resolve
from .server import connect, local_server, stream
from .tables import certificate_line, console, print_results, spinner

STAGES = ("sft", "dpo", "grpo")
# Every stage is scored on its own task before and after; the first and the last model on all three.
SCORED: Mapping[str, tuple[str, ...]] = {"base": STAGES, "sft": ("sft", "dpo"), "dpo": ("dpo", "grpo"), "grpo": STAGES}
EXPORTS: Mapping[str, str | None] = {"hf": None, "gguf": "f16,q8_0", "ollama": "q8_0"}
SERVED = (("llamacpp", "exports/gguf"), ("transformers", "grpo"))
QUESTION = "What is the capital of France?"


@dataclass
class Ship:
    """One demo under way: where it is, and what it has so far. Times are seconds of the run that did the work."""

    root: Path
    recipes: Mapping[str, Recipe]
    results: list[Result] = field(default_factory=list)
    certificates: list[dict[str, Any]] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)


def demo_recipes() -> dict[str, Recipe]:
    """The shipped recipes of the three stages."""
    folder = Path(__file__).with_name("recipes")
    return {stage: load_recipe(folder / f"smollm2-135m-{stage}.yaml") for stage in STAGES}


def run(recipes: Mapping[str, Recipe], runs: Path) -> Path:
    """Do every stage that is not there yet, and return the report's path. Raises ValueError, one line."""
    began = time.perf_counter()
    base = recipes[STAGES[0]].model.name
    ship = _lay_down(recipes, runs)
    with _stage(ship, "fetch"):
        model = resolve(base)
        for recipe in recipes.values():
            resolve(recipe.data.train)
    _score(ship, "base", model)
    for stage in STAGES:
        model = _train(ship, stage, model)
        _score(ship, stage, model)
    for target, quant in EXPORTS.items():
        _export(ship, target, quant, model)
    answers = {engine: _ask(ship, engine, path) for engine, path in SERVED}
    report = write_report(
        ship.root / "report.html",
        "SmolLM2-135M: fine-tuned, aligned, proven, exported, served",
        {stage: ship.root / stage / "log.jsonl" for stage in STAGES},
        ship.results,
        ship.certificates,
        ship.timings,
        {stage: dump_recipe(recipe) for stage, recipe in ship.recipes.items()},
    )
    _conclude(ship, answers, report, time.perf_counter() - began)
    return report


def _lay_down(recipes: Mapping[str, Recipe], runs: Path) -> Ship:
    """Name the run by everything that decides it, and chain its stages: each starts from the one before."""
    source = read_manifest(resolve(recipes[STAGES[0]].model.name)).digest
    text = "\n".join([__version__, source, *(dump_recipe(recipe) for recipe in recipes.values())])
    root = runs / f"demo-{xxhash.xxh3_64_hexdigest(text.encode())[:8]}"
    chained, parent = {}, recipes[STAGES[0]].model.name
    for stage in STAGES:
        model = recipes[stage].model.model_copy(update={"name": parent})
        chained[stage] = recipes[stage].model_copy(update={"run_dir": str(root / stage), "model": model})
        parent = chained[stage].run_dir
    root.mkdir(parents=True, exist_ok=True)
    timings = root / "timings.json"
    known = json.loads(timings.read_text(encoding="utf-8")) if timings.is_file() else {}
    return Ship(root, chained, timings=known)


@contextmanager
def _stage(ship: Ship, name: str, keep: bool = True) -> Iterator[None]:
    """Announce a stage and remember how long it took."""
    console.rule(f"[bold]{name}", align="left")
    began = time.perf_counter()
    yield
    if keep or name not in ship.timings:
        ship.timings[name] = time.perf_counter() - began
        draft = ship.root / ".timings.tmp"
        draft.write_text(json.dumps(ship.timings, indent=1), encoding="utf-8")
        draft.replace(ship.root / "timings.json")


def _digest(model: Path) -> str:
    return read_manifest(model).digest


def _train(ship: Ship, stage: str, parent: Path) -> Path:
    """Train a stage, or verify that it was trained from this very parent. Returns the model's directory."""
    recipe = ship.recipes[stage]
    run_dir = Path(recipe.run_dir)
    model = run_dir / "model"
    wanted = {"identity": identity(recipe), "parent": _digest(parent)}
    if _is_whole(model, wanted):
        with _stage(ship, f"train {stage}", keep=False):
            console.print(f"{model}: trained before, verified", soft_wrap=True)
    else:
        if (model / MANIFEST).is_file() and read_manifest(model).about.get("parent") != wanted["parent"]:
            recipe = recipe.model_copy(update={"resume": "never"})
        shutil.rmtree(model, ignore_errors=True)
        with _stage(ship, f"train {stage}"):
            train(recipe)
    ship.certificates.append(read_manifest(model).about["certificate"])
    return model


def _is_whole(directory: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a committed directory is there, undamaged, and about what is wanted. Damage is said aloud."""
    if not (directory / MANIFEST).is_file():
        return False
    try:
        about = verify(directory).about
    except ValueError as error:
        console.print(f"[yellow]{error}: made again[/]", soft_wrap=True)
        return False
    return all(about.get(key) == value for key, value in wanted.items())


def _score(ship: Ship, stage: str, model: Path) -> None:
    """Score a model on the held-out rows of the stages that SCORED names for it."""
    folder = ship.root / f"scores-{stage}"
    suites = {name: identity(ship.recipes[name]) for name in SCORED[stage]}
    wanted = {"model": _digest(model), "suites": suites}
    if _is_whole(folder, wanted):
        with _stage(ship, f"score {stage}", keep=False):
            console.print(f"{folder}: scored before, verified", soft_wrap=True)
    else:
        with _stage(ship, f"score {stage}"):
            scored = [evaluate(model, ship.recipes[name], stage=stage) for name in SCORED[stage]]
            with new_directory(folder, wanted) as scratch:
                write_results(scratch / "results.json", scored)
    results = read_results(folder / "results.json")
    print_results(results)
    ship.results += results


def _export(ship: Ship, target: str, quant: str | None, model: Path) -> None:
    """Export the last model, or verify that it was exported."""
    folder = ship.root / "exports" / target
    name, wanted = f"export {target}", {"source_digest": _digest(model), "quant": quant.split(",") if quant else []}
    if _is_whole(folder, wanted):
        with _stage(ship, name, keep=False):
            console.print(f"{folder}: exported before, verified", soft_wrap=True)
    else:
        with _stage(ship, name), spinner(f"exporting to {target} and comparing with the model"):
            export(model, folder, target, quant)
    for certificate in read_manifest(folder).about["certificates"]:
        ship.certificates.append(certificate)
        console.print(certificate_line(certificate), soft_wrap=True)


def _ask(ship: Ship, engine: str, path: str) -> str:
    """Serve what was made, and ask it the question through the openai client, streaming."""
    with _stage(ship, f"serve {engine}"):
        console.print(f"{engine} serves {ship.root / path}; asked: {QUESTION}", soft_wrap=True)
        pieces = []
        with ExitStack() as stack:
            with spinner(f"starting {engine}"):
                address = stack.enter_context(local_server(ship.root / path, engine))
            client, name = connect(address)
            for piece in stream(client, name, [{"role": "user", "content": QUESTION}], max_tokens=48):
                pieces.append(piece)
                console.print(piece, end="", style="green", markup=False, highlight=False)
            console.print()
    return "".join(pieces)


def _conclude(ship: Ship, answers: Mapping[str, str], report: Path, seconds: float) -> None:
    """Print the table, what changed, the certificates, the times and the report's path."""
    console.rule("[bold]result", align="left")
    print_results(ship.results)
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in ship.results:
        groups.setdefault((result.suite, result.metric, result.rows_hash), []).append(result)
    for group in groups.values():
        for before, after in itertools.pairwise(group):
            console.print(f"{after.suite}, {before.stage} -> {after.stage}: {verdict(before, after)}", soft_wrap=True)
    console.print()
    for certificate in ship.certificates:
        passed = "not checked" if certificate.get("checked") is False else "passed"
        console.print(f"certificate: {certificate_line(certificate)}: {passed}", soft_wrap=True)
    for engine, answer in answers.items():
        console.print(f"{engine} says: {answer.strip()}", soft_wrap=True, markup=False)
    console.print()
    for name, took in ship.timings.items():
        console.print(f"{name:20} {took:7.1f} s")
    console.print(f"{'this time':20} {seconds:7.1f} s\n")
    console.print(f"report: {report}", soft_wrap=True)
