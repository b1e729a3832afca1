"""Text to packed rows, timed beside its peers: `datasets.map` with TRL's packing, and LitGPT's preparation.

`shipyard bench data`. All get the same documents and tokenizer and as many processes as there are cores; each run is a
process of its own, and its clock starts when libraries and tokenizer are loaded. Peers take turns, round after round.
LitGPT wants an environment of its own: SHIPYARD_LITGPT names the Python in it; without, it is left out with a sentence.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..launch.assets import resolve

TOKENIZER = "asset:smollm2-135m-instruct"
WIDTH = 2048
MEGABYTES, ROUNDS = 40, 3
MEAN_LOG_BYTES, SPREAD = 8.0, 1.0  # of a document: 3 kB in the middle, 5 kB on average

OURS = """
import json, sys, time

def main(corpus, tokenizer, out, width, processes):
    from pathlib import Path
    from shipyard.launch.workers import runner
    from shipyard.training import preparation
    from shipyard.training.pretrain import packed_sources
    from shipyard.training.recipe import parse_recipe
    from shipyard.training.tokens import TokenShards
    import shipyard.training.models  # loading the tokenizer is timed, importing what loads it is not

    tree = {"method": "pretrain", "steps": 1, "model": {"name": "scratch", "tokenizer": tokenizer},
            "data": {"train": f"{corpus}/rows.jsonl", "tokens": out, "max_tokens": width}}
    recipe = parse_recipe(tree)
    start = time.perf_counter()
    preparation.build(recipe, runner("local", processes), lambda text: None)
    shards = TokenShards(Path(out))
    (source,) = packed_sources(recipe, shards, "train")
    tokens = sum(len(part) for row in range(source.rows) for part in source.row(0, row))
    return {"seconds": time.perf_counter() - start, "tokens": tokens, "rows": source.rows}
"""

TRL = """
import json, sys, time
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import pack_dataset

def main(corpus, tokenizer, out, width, processes):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    def encode(batch):
        return {"input_ids": [ids + [tokenizer.eos_token_id] for ids in tokenizer(batch["text"])["input_ids"]]}
    start = time.perf_counter()
    rows = load_dataset("json", data_files=f"{corpus}/rows.jsonl", split="train", cache_dir=out)
    rows = rows.map(encode, batched=True, num_proc=processes, remove_columns=["text"])
    packed = pack_dataset(rows, seq_length=width, strategy="bfd", map_kwargs={"num_proc": processes})
    return {"seconds": time.perf_counter() - start, "tokens": len(packed) * width, "rows": len(packed)}
"""

LITGPT = """
import json, sys, time
from functools import partial
from glob import glob
from litdata import TokensLoader, optimize
from litgpt.data.text_files import tokenize
from litgpt.tokenizer import Tokenizer

def main(corpus, tokenizer, out, width, processes):
    tokenizer = Tokenizer(tokenizer)
    start = time.perf_counter()
    optimize(fn=partial(tokenize, tokenizer=tokenizer), inputs=sorted(glob(f"{corpus}/texts/*.txt")), output_dir=out,
             num_workers=processes, chunk_bytes="50MB", item_loader=TokensLoader(block_size=width))
    return {"seconds": time.perf_counter() - start, "tokens": 0, "rows": 0}
"""

RUN = """
if __name__ == "__main__":
    corpus, tokenizer, out, width, processes, report = sys.argv[1:]
    result = main(corpus, tokenizer, out, int(width), int(processes))
    open(report, "w").write(json.dumps(result))
"""


@dataclass
class Arm:
    """One way of preparing data: its code, the Python that runs it, and what was measured."""

    name: str
    code: str
    python: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)


def bench_data(out: Path | None = None, megabytes: int = MEGABYTES, rounds: int = ROUNDS) -> str:
    """The table, also written to `out`. Raises RuntimeError with a peer's last words when one fails."""
    litgpt = os.environ.get("SHIPYARD_LITGPT", "")
    arms = [Arm("shipyard data build", OURS, sys.executable), Arm("datasets.map + TRL packing", TRL, sys.executable)]
    notes = []
    if litgpt:
        arms.append(Arm("LitGPT (litdata.optimize)", LITGPT, litgpt))
    else:
        notes.append("LitGPT is left out: SHIPYARD_LITGPT names no Python of its own environment.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = write_corpus(folder / "corpus", megabytes)
        for number in range(rounds):
            for arm in arms:
                _measure(arm, folder, number)
        table = markdown(arms, size, rounds, notes)
    if out is not None:
        out.write_text(table + "\n", encoding="utf-8")
    return table


def write_corpus(folder: Path, megabytes: int) -> int:
    """Distinct documents of very different lengths, cut out of the presidents' addresses; return their bytes."""
    addresses = [path.read_text(encoding="utf-8") for path in sorted(resolve("asset:sotu").glob("*.txt"))]
    sentences = [f"{part.strip()}." for text in addresses for part in text.split(".") if part.strip()]
    rng = np.random.default_rng(0)
    (folder / "texts").mkdir(parents=True)
    total = number = 0
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as rows:
        while total < megabytes * 1_000_000:
            wanted, start = rng.lognormal(MEAN_LOG_BYTES, SPREAD), int(rng.integers(len(sentences)))
            text = f"{number}. {sentences[start]}"
            while len(text) < wanted and (start := start + 1) < len(sentences):
                text = f"{text} {sentences[start]}"
            rows.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            (folder / "texts" / f"{number:06d}.txt").write_text(text, encoding="utf-8")
            total += len(text.encode())
            number += 1
    return total


def _measure(arm: Arm, folder: Path, number: int) -> None:
    """Run an arm once, in a process of its own, and watch the memory of it and its children."""
    stem = f"{arm.name.split()[0].lower()}-{number}"
    script, report, out = folder / f"{stem}.py", folder / f"{stem}.json", folder / f"{stem}-out"
    script.write_text(arm.code + RUN, encoding="utf-8")
    processes = len(os.sched_getaffinity(0))
    arguments = [str(folder / "corpus"), str(resolve(TOKENIZER)), str(out), str(WIDTH), str(processes), str(report)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    log = folder / f"{stem}.log"
    with log.open("w") as words:
        process = subprocess.Popen([arm.python, str(script), *arguments], stdout=words, stderr=words, env=environment)
        peak = [0]
        watcher = threading.Thread(target=_watch, args=(process, peak))
        watcher.start()
        process.wait()
        watcher.join()
    if process.returncode or not report.is_file():
        raise RuntimeError(f"{arm.name} failed: {' '.join(log.read_text().split())[-600:]}")
    arm.result = json.loads(report.read_text())
    arm.seconds.append(arm.result["seconds"])
    arm.peak_bytes.append(peak[0])
    print(f"round {number + 1}: {arm.name}: {arm.seconds[-1]:.1f} s", file=sys.stderr, flush=True)


def _watch(process: "subprocess.Popen[bytes]", peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(_proportional_bytes(pid) for pid in _family(process.pid)))
        threading.Event().wait(0.2)


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(member for child in children for member in _family(int(child)))]


def _proportional_bytes(pid: int) -> int:
    """A process's memory, what it shares counted in proportion."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def markdown(arms: list[Arm], size: int, rounds: int, notes: list[str]) -> str:
    """The table: medians, and ratios to the first arm's."""
    ours = arms[0]
    lines = [
        "# Text to packed rows",
        "",
        f"{size / 1e6:.1f} MB of text, SmolLM2's tokenizer, rows of {WIDTH}, {len(os.sched_getaffinity(0))} processes, "
        f"medians of {rounds} rounds in turn. Made by `shipyard bench data --out docs/bench-data.md`.",
        "",
        "| | MB/s | s | rows | ours is faster by | peak memory, GiB | of it ours takes |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        seconds, peak = statistics.median(arm.seconds), statistics.median(arm.peak_bytes)
        faster = statistics.median(arm.seconds) / statistics.median(ours.seconds)
        memory = statistics.median(ours.peak_bytes) / peak
        rows = arm.result["rows"] or "-"
        speed = f"{size / 1e6 / seconds:.2f} | {seconds:.1f} | {rows} | {faster:.1f}x"
        lines.append(f"| {arm.name} | {speed} | {peak / 2**30:.2f} | {memory:.2f} |")
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])
