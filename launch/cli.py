"""The command line: one console script. Heavy libraries load inside the command that needs them.

Exit codes: 0 success, 1 a check failed or a bug (with its traceback), 2 a user's mistake (one line), 3 a bad step, 4 a
silent rank, 130 Ctrl-C, 143 SIGTERM (saved).
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from .bench import Bench
from .bench import bench as run_bench
from .mistakes import line_of, mistake, usage

app = typer.Typer(
    name="shipyard",
    help="Pretrain, fine-tune, align, evaluate, export and serve language models, with proof at every stage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(no_args_is_help=True, help="Make token shards; look at data as the model will see it.")
app.add_typer(data_app, name="data")

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, launch/recipes/*.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, optim.lr=1e-4 say")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Resolve, check the data, plan memory; do not train.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe; an interrupted run goes on by itself."""
    from ..training.ending import RUN_DIR, heed, leave
    from ..training.exit_code import EXIT_MISTAKE
    from ..training.recipe import load_recipe

    folder = os.environ.get(RUN_DIR)
    try:
        resolved = load_recipe(recipe, overrides or ())
        if dry_run:
            from .preview import dry_run as preview

            preview(resolved, as_json)
            return
        folder = resolved.run_dir
        if ended := heed(Path(folder)):
            code, said = ended
            raise typer.Exit(mistake(f"{said} (this job ended so before, and is not computed again)", code))
        from ..training.pages import keep_pages

        keep_pages()
        from ..training.loop import train as run

        run_dir = run(resolved)
    except (ImportError, ValueError, OSError) as error:
        if folder and (line := line_of(error)) is not None:
            leave(Path(folder), EXIT_MISTAKE, line)
        raise
    if as_json and os.environ.get("RANK", "0") == "0":
        typer.echo(json.dumps({"run_dir": str(run_dir)}))


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[str, typer.Option(help="COUNTxCARD: 512xH100-80GB.")] = "8xH100-80GB",
    price: Annotated[float | None, typer.Option(help="Of one GPU for an hour, for the cost.")] = None,
    search: Annotated[bool, typer.Option(help="Also try other ways to cut the step.")] = True,
    as_json: Json = False,
) -> None:
    """Memory, step time, days and cost on GPUs you do not have yet, and what would be faster."""
    from .plan import plan_recipe
    from .plan_page import as_tree, print_plan
    from .tables import spinner

    with spinner("measuring the model without computing it", quiet=as_json):
        asked, others = plan_recipe(recipe, overrides or (), gpus, price, search)
    if as_json:
        typer.echo(json.dumps(as_tree(asked, others)))
    else:
        print_plan(asked, others)


@app.command()
def launch(
    recipe: RecipePath,
    overrides: Overrides = None,
    on: Annotated[Literal["local", "slurm", "kubernetes", "jobset", "skypilot", "ray"], typer.Option()] = "local",
    nodes: Annotated[int, typer.Option(help="How many machines.")] = 1,
    gpus: Annotated[int, typer.Option(help="Ranks on each: GPUs, or CPU processes where there is none.")] = 1,
    restarts: Annotated[int | None, typer.Option(min=0, help="After crashes (default: 3; local 0).")] = None,
    image: Annotated[str, typer.Option(help="Container image, for kubernetes, jobset and skypilot.")] = "",
    storage: Annotated[str, typer.Option(help="Where runs are kept: a volume claim, or skypilot's bucket.")] = "",
    accelerator: Annotated[str, typer.Option(help="What skypilot rents.")] = "H100",
    out: Annotated[Path | None, typer.Option(help="File to write (default: in RUN_DIR/launch).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the file; write and start nothing.")] = False,
) -> None:
    """Train on several GPUs or machines: write the job, start it."""
    from .cluster import CLUSTERS, describe
    from .cluster import launch as start

    job = describe(recipe, overrides or (), on, nodes, gpus, restarts, image, storage, accelerator)
    if dry_run:
        typer.echo(CLUSTERS[on].write(job), nl=False)
        return
    if code := start(job, on, out):
        raise typer.Exit(code)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run, or a model directory.")],
    to: Annotated[
        Literal["hf", "gguf", "ollama", "litgpt", "deepspeed", "checkpoint"], typer.Option(help="Format.")
    ] = "gguf",
    quant: Annotated[str | None, typer.Option(help="f32, f16, bf16 or q8_0; for gguf several with commas.")] = None,
    out: Annotated[Path | None, typer.Option(help="New directory (default: exports/MODEL-FORMAT).")] = None,
    as_json: Json = False,
) -> None:
    """Write a model, with a parity certificate; a checkpoint for DeepSpeed; a run from DeepSpeed's."""
    from ..serving.export import export as write
    from ..training.manifest import read_manifest

    source = _model_dir(model)
    target = write(source, out or Path("exports") / f"{Path(model).name.removeprefix('asset:')}-{to}", to, quant)
    certificates = read_manifest(target).about["certificates"]
    if as_json:
        typer.echo(json.dumps({"path": str(target), "certificates": certificates}, indent=1))
        return
    from .tables import print_certificates

    print_certificates(target, certificates)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A run, a model directory, or a GGUF file.")],
    engine: Annotated[Literal["auto", "llamacpp", "transformers", "vllm", "ollama"], typer.Option()] = "auto",
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
) -> None:
    """Serve a model over the OpenAI-compatible API."""
    from ..serving.gateway import serve as run

    run(_model_dir(model), engine, host, port)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A URL of an OpenAI-compatible server, a run, or a model.")],
    engine: Annotated[Literal["auto", "llamacpp", "transformers", "vllm", "ollama"], typer.Option()] = "auto",
    message: Annotated[str | None, typer.Option(help="Ask this one thing, print the reply and leave.")] = None,
) -> None:
    """Talk to a model in the terminal."""
    from .chat import talk

    talk(model if "://" in model else _model_dir(model), engine, message)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A run, or a model directory.")],
    suite: Annotated[str, typer.Option(help="demo, or a recipe: what it holds out is scored.")] = "demo",
    rows: Annotated[int, typer.Option(min=0, help="How many rows; 0 takes all.")] = 0,
    as_json: Json = False,
) -> None:
    """Score a model on held-out rows, with confidence intervals."""
    from ..evals.tasks import evaluate_suite
    from .tables import plain, print_results

    results = evaluate_suite(model, suite, rows)
    if as_json:
        typer.echo(json.dumps([plain(result) for result in results], indent=1))
    else:
        print_results(results)


@app.command()
def bench(
    name: Annotated[Bench, typer.Argument(help="What to time, or check.")],
    datasheet: Annotated[
        bool, typer.Option("--datasheet", help="kernels: what each card's compiler made of them; needs no GPU.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File to write; most have a page in docs/.")] = None,
    workload: Annotated[
        Literal["all", "fast", "alpaca", "reviews", "card"], typer.Option(help="train: which rows; card: on a GPU.")
    ] = "all",
    shape: Annotated[str, typer.Option(help="checkpoint: a model of launch/shapes.")] = "smollm2-135m",
    rounds: Annotated[int, typer.Option(min=1, help="train, checkpoint: how often.")] = 3,
    litgpt: Annotated[Path | None, typer.Option(help="train: a virtual environment that holds LitGPT.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="train: threads of a trainer (default: cores).")] = None,
) -> None:
    """Time the parts on this machine, beside their peers."""
    typer.echo(run_bench(name, out, datasheet, workload, shape, rounds, litgpt, threads))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A run, checkpoint, model or export; or: kernels, crash, invariance.")],
    short: Annotated[bool, typer.Option("--short", help="crash: 20 kills; invariance: 2 ranks. Minutes.")] = False,
    full: Annotated[bool, typer.Option("--full", help="crash: 200 kills; invariance: every cell. Goes on.")] = False,
    out: Annotated[Path | None, typer.Option(help="crash: page to write; invariance: directory.")] = None,
    as_json: Json = False,
) -> None:
    """Re-check hashes, lineage and certificates; or prove anew."""
    from .verify import verify as check

    passed = check(path, "full" if full else "short" if short else "standard", out, as_json)
    if not passed:
        raise typer.Exit(1)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="A run that named a bad step.")],
    step: Annotated[int | None, typer.Option(min=1, help="Which one (default: the last).")] = None,
    as_json: Json = False,
) -> None:
    """Compute a run's bad step again: which rows, and is it bad still?"""
    from dataclasses import asdict

    from ..training.replay import replay as compute
    from ..training.replay import report

    found = compute(run, step)
    typer.echo(json.dumps({**asdict(found), "bad": found.bad}) if as_json else "\n".join(report(found)))
    if found.bad:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine can run, what clashes, what mends it."""
    from .doctor import examine, print_report
    from .tables import spinner

    with spinner("importing what is installed", quiet=as_json):
        report = examine()
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        print_report(report)
    if not report.healthy:
        raise typer.Exit(1)


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[asset:NAME]...", help="Without names: list them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch small models, tokenizers and data, by SHA-256."""
    from .assets import PREFIX, catalogue, resolve

    if names:
        paths = {name: str(resolve(name if name.startswith(PREFIX) else PREFIX + name)) for name in names}
        typer.echo(json.dumps(paths, indent=1) if as_json else "\n".join(paths.values()))
        return
    if as_json:
        typer.echo(json.dumps([asset.source for asset in catalogue().values()], indent=1))
        return
    for asset in catalogue().values():
        typer.echo(f"asset:{asset.name:24} {asset.licence:28} {asset.registry}: {asset.package} {asset.version}")


@app.command()
def demo() -> None:
    """Everything, on a real 135M Llama: make demo runs it."""
    from .demo import demo_recipes, run

    run(demo_recipes(), Path("runs"))


@data_app.command("inspect")
def inspect(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 3,
    as_json: Json = False,
) -> None:
    """Show rows as the model will see them: ids, what is supervised, where documents meet."""
    from ..training.recipe import load_recipe
    from .preview import inspect as show

    show(load_recipe(recipe, overrides or ()), rows, as_json)


@data_app.command("build")
def build(
    recipe: RecipePath,
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 takes a process a core.")] = 0,
    on: Annotated[Literal["local", "ray"], typer.Option(help="This machine, or a Ray cluster.")] = "local",
) -> None:
    """Turn text into token shards: cleaned, split, hashed. Killed? The same command goes on."""
    from ..training.preparation import build as write
    from ..training.recipe import load_recipe
    from .workers import runner

    write(load_recipe(recipe, overrides or ()), runner(on, workers), typer.echo)


@data_app.command("tokenizer")
def tokenizer(
    recipe: RecipePath,
    overrides: Overrides = None,
    size: Annotated[int, typer.Option(help="How many tokens.")] = 4096,
) -> None:
    """Learn a tokenizer from the recipe's documents, into model.tokenizer."""
    from ..training.recipe import load_recipe
    from ..training.tokenizer import train_tokenizer

    typer.echo(train_tokenizer(load_recipe(recipe, overrides or ()), size))


def _model_dir(model: str) -> Path:
    """A run stands for the model it trained, asset:NAME for its cached directory. Raises ValueError if not there."""
    from .assets import resolve

    path = resolve(model)
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if path.is_dir() or path.is_file():
        return path
    raise ValueError(f"model: {model} does not exist; give a run, a model directory or asset:NAME")


def main() -> None:
    """The console script."""
    from ..training.exit_code import told

    with told():
        sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; mistakes become one line on stderr."""
    _quiet_libraries()
    try:
        code = app(args=list(arguments), prog_name="shipyard", standalone_mode=False)
    except typer.Abort:
        return 130
    except typer.TyperException as error:
        return mistake(usage(error))
    except KeyboardInterrupt:
        return mistake("interrupted", 130)
    except (ModuleNotFoundError, ValueError, OSError) as error:
        line = line_of(error)
        if line is None:
            raise
        return mistake(line)
    return code if isinstance(code, int) else 0


def _quiet_libraries() -> None:
    """Switch off telemetry and the notices that say nothing about the user's job. What the user set stays."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # for a Ray that `data build` starts
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    if not sys.stderr.isatty():  # bars are for people
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


if __name__ == "__main__":
    main()
