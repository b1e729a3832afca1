"""Drills of ranks that fall silent, of numbers that are none, of spikes, and of the launchers that start ranks again.

All jobs here have two ranks. Judges are a run on one rank, and checkpoints that must not differ across a step that did
not count.
"""

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from ..training.checkpoint import committed, newest
from ..training.ending import FILE
from ..training.exit_code import EXIT_BAD_STEP, EXIT_SILENT
from ..training.health import FEWEST, HISTORY, replay_path
from ..training.manifest import MANIFEST
from ..training.shard import StoredFragments
from .crash import LIMIT_S, PARTS, STEPS, Drill, Ground, logged
from .launched import Launcher, launch
from .trainers import wait_until

HEARTBEAT_S = 5
POISON = "~"
"""A token that one row holds, and whose embedding is infinite."""
ODD = "Zygomorphic quartz jinxes vex waltzing nymphs, kvetching about pyx, fjord, and glyph." * 2
"""A reply like no other row's: its gradient is a spike."""
TOLERANCE = 1e-6


def silent(ground: Ground, times: int, seed: int) -> Drill:
    """SIGSTOP to one rank: the other names it and ends with its own code; the same command goes on."""
    rng, held = random.Random(seed), 0
    for number in range(times):
        run, victim = ground.folder / f"silent-{seed}-{number}", number % 2
        job = ground.go(run, 2, f"health.heartbeat_s={HEARTBEAT_S}")
        steps = rng.randint(1, STEPS // 2)
        wait_until(lambda run=run, steps=steps: logged(run) >= steps, job.alive, LIMIT_S)
        job.signal(signal.SIGSTOP, [victim])
        job.ranks[1 - victim].join(LIMIT_S)
        job.signal(signal.SIGKILL, [victim])  # as the launcher does when a rank has ended
        codes, place = job.wait(LIMIT_S), f":{job.ranks[victim].pid})"
        named = re.search(rf"rank {victim} \(\S+{re.escape(place)} has been silent for {HEARTBEAT_S} s", job.said())
        ground.finish(run, 2)
        held += bool(named) and codes[1 - victim] == EXIT_SILENT and ground.same_bits(run)
        shutil.rmtree(run)
    promise = f"named by its heartbeat, exit code {EXIT_SILENT}; goes on to the same bits"
    return Drill("SIGSTOP to one rank of two", times, held, promise, f"heartbeat_s {HEARTBEAT_S}, each rank in turn")


def started_again(ground: Ground, launcher: Launcher, number: signal.Signals, times: int, seed: int) -> Drill:
    """A signal to one of two ranks under a launcher with restarts: nobody does anything, and the run ends."""
    rng, held, resumed = random.Random(seed), 0, 0
    for trial in range(times):
        run, victim = ground.folder / f"{launcher.split()[0]}-{number.name}-{trial}", (trial + 1) % 2
        job = launch(launcher, ground.recipe, run, [f"health.heartbeat_s={HEARTBEAT_S}"], restarts=2)
        steps = rng.randint(3, STEPS // 2)
        job.wait_until(lambda run=run, steps=steps: logged(run) >= steps, LIMIT_S)
        pid = job.rank(victim)
        os.kill(pid, number)
        code, said = job.wait(LIMIT_S), job.said()
        named = number != signal.SIGSTOP or f":{pid}) has been silent for {HEARTBEAT_S} s" in said
        resumed += said.count("resume: going on after step")
        held += code == 0 and named and "resume: going on" in said and ground.same_bits(run)
        shutil.rmtree(run)
    option = "--restarts 2" if launcher == "shipyard launch" else "--max-restarts 2"
    fault = f"{number.name} to one rank of two under `{launcher} {option}`"
    return Drill(fault, times, held, "goes on by itself to the same bits", f"went on {resumed} times, exit code 0")


def poisoned(ground: Ground, row: int) -> tuple[Ground, str]:
    """The same job from a model with an infinite embedding, which row `row` (from 1) alone reaches; the row's name."""
    folder = ground.folder / f"poisoned-{row}"
    model = folder / "model"
    shutil.copytree(ground.reference / "model", model, ignore=shutil.ignore_patterns(MANIFEST))
    tensors = load_file(model / "model.safetensors")
    token = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id(POISON)
    tensors["model.embed_tokens.weight"][token] = float("inf")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    job = _with_row(ground, folder, row, 0, POISON)
    tree = yaml.safe_load(job.recipe.read_text(encoding="utf-8"))
    tree["model"] = {"name": str(model), "dtype": "float32"}
    job.recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return job, f"rows.jsonl:{row}"


def _with_row(ground: Ground, folder: Path, row: int, message: int, text: str) -> Ground:
    """The job with `text` at the end of a message of one row, and with all checkpoints kept."""
    folder.mkdir(exist_ok=True)
    lines = (ground.folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    tree = json.loads(lines[row - 1])
    tree["messages"][message]["content"] += text
    lines[row - 1] = json.dumps(tree)
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = yaml.safe_load(ground.recipe.read_text(encoding="utf-8"))
    recipe["data"]["train"] = str(folder / "rows.jsonl")
    recipe["checkpoints"]["keep_last"] = STEPS
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return Ground(folder, folder / "recipe.yaml", folder / "undisturbed")


def bad_number(ground: Ground, choice: str, engine: str, rows: Sequence[int]) -> Drill:
    """A loss that is no number on one of two ranks; what follows is the recipe's choice."""
    held, steps = 0, 0
    for row in rows:
        job, name = poisoned(ground, row)
        bad, good = _bad_number(job, name, choice, engine)
        steps, held = steps + bad, held + good
        shutil.rmtree(job.folder)
    promise = {
        "stop": f"named with rank and row, replay file, exit code {EXIT_BAD_STEP}; `skip` then goes on",
        "skip": "named, no bit of weights or moments changes",
        "rewind": "named, back to the bits of the checkpoint before",
    }[choice]
    end = f"within {TOLERANCE:.0e} of one rank" if engine != "ddp" else "to the bits of one rank"
    fault = f"the loss is no number on one rank of two, {choice}, {engine}"
    return Drill(fault, len(rows), held, f"{promise}; {end}", f"{steps} steps went bad in {len(rows)} runs")


def _bad_number(job: Ground, name: str, choice: str, engine: str) -> tuple[int, bool]:
    """How many steps went bad, and whether everything was as promised."""
    every = 2 if choice == "rewind" else 1
    decided = "skip" if choice == "stop" else choice
    knobs = [f"checkpoints.every_steps={every}", f"health.on_bad_step={decided}"]
    job.finish(job.reference, 1, *knobs)
    cut = [] if engine == "ddp" else ["deterministic=off", f"parallel.engine={engine}"]
    run = job.folder / "run"
    ranks = job.go(run, 2, *knobs, f"health.on_bad_step={choice}", *cut)
    codes, said = set(ranks.wait(LIMIT_S)), ranks.said()
    found = re.findall(r"health: step (\d+): the loss is no number on rank (\d), .*?; rows ([^;]*);", said)
    held = bool(found) and all(re.search(rf"{name}\b", rows) for _, _, rows in found)
    held &= all(replay_path(run, int(step) - 1, int(rank)).is_file() for step, rank, _ in found)
    if choice == "stop":
        held &= codes == {EXIT_BAD_STEP} and len(found) == 1
        held &= (saved := newest(run)[0]) is not None and saved.about["step"] == int(found[0][0]) - 1
        job.finish(run, 2, *knobs, *cut)
    else:
        held &= codes == {0}
        pairs = [(int(step) - every, int(step)) for step, _, _ in found if int(step) % every == 0]
        pairs = [pair for pair in pairs if pair[0]]
        held &= bool(pairs) and all(distance(committed(run)[a], committed(run)[b]) == 0 for a, b in pairs)
    last = [folder / f"step-{STEPS:06d}" for folder in (run, job.reference)]
    held &= job.same_bits(run) if engine == "ddp" else distance(*last) <= TOLERANCE
    return len(found), held


def distance(ours: Path, theirs: Path) -> float:
    """The largest difference of two checkpoints, in weights and both moments."""
    worst = 0.0
    for part in PARTS:
        a, b = (StoredFragments(path).whole(part) for path in (ours, theirs))
        worst = max(worst, *(float((a[name] - b[name]).abs().max()) for name in b))
    return worst


def spike(ground: Ground) -> Drill:
    """A row like no other: its step's gradient norm is a spike by the norms before it, and is left out."""
    odd = _with_row(ground, ground.folder / "odd", 5, 1, ODD)
    odd.finish(odd.reference)
    norms = [json.loads(line)["grad_norm"] for line in (odd.reference / "log.jsonl").read_text().splitlines()]
    ratios = {step: norms[step] / median(norms[max(0, step - HISTORY) : step]) for step in range(FEWEST, STEPS)}
    step = max(ratios, key=lambda step: ratios[step])
    factor = (ratios[step] + max(1.0, *(ratio for other, ratio in ratios.items() if other < step), 0.0)) / 2
    knobs = [f"health.spike_factor={factor:.3f}", "health.on_bad_step=skip"]
    judge = replace(odd, reference=odd.folder / "one")
    judge.finish(judge.reference, 1, *knobs)
    run = odd.folder / "run"
    said = judge.finish(run, 2, *knobs)
    left_out = [line["step"] for line in map(json.loads, (run / "log.jsonl").open()) if "left_out" in line]
    held = bool(left_out) and left_out[0] == step + 1 and f"health: step {step + 1}: the gradient norm" in said
    held = held and all(distance(committed(run)[at - 1], committed(run)[at]) == 0 for at in left_out)
    held = held and judge.same_bits(run)
    shutil.rmtree(odd.folder)
    seen = f"step {step + 1} of {STEPS} at {ratios[step]:.2f} times the median, spike_factor {factor:.2f}"
    promise = "named, no bit of weights or moments changes; to the bits of one rank"
    return Drill("a spike of the gradient norm, two ranks", 1, int(held), promise, seen)


def not_started_again(ground: Ground, launcher: Launcher) -> Drill:
    """A bad step under a launcher with restarts: it would be bad again, so the job ends without computing it again.

    torchrun knows no final codes and starts ranks again, which end at once by what the first ones left in the run."""
    poison, _ = poisoned(ground, 5)
    run, knobs = poison.folder / "launched", ["checkpoints.every_steps=1", "health.on_bad_step=stop"]
    job = launch(launcher, poison.recipe, run, knobs, restarts=2)
    code, said = job.wait(LIMIT_S), job.said()
    ended, heard = (EXIT_BAD_STEP, 1) if launcher == "shipyard launch" else (1, 3)
    held = code == ended and said.count("the loss is no number") == heard and said.count(" steps of ") == 1
    held &= ("is not started again" in said) if ended == EXIT_BAD_STEP else said.count("is not computed again") == 2
    before = newest(run)[0]
    job = launch(launcher, poison.recipe, run, [*knobs[:1], "health.on_bad_step=skip"], restarts=2)
    held &= job.wait(LIMIT_S) == 0 and before is not None and "resume: going on" in job.said()
    held &= newest(run)[0] is not None and not (run / FILE).exists()
    shutil.rmtree(poison.folder)
    option = "--restarts 2" if launcher == "shipyard launch" else "--max-restarts 2"
    promise = f"one sentence, the ranks' own exit code {EXIT_BAD_STEP}, not started again"
    if launcher == "torchrun":
        promise = f"ranks started again end at once by exit code {EXIT_BAD_STEP} and the same sentence"
    fault = f"a bad step under `{launcher} {option}`"
    return Drill(fault, 1, int(held), f"{promise}; a new start with `skip` goes on", f"exit code {code}")
