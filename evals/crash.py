"""Crash drills: real trainers, real signals, real damage on disk, and whether the run still ends in the same bits.

Every drill works on one small recipe, in `deterministic: elastic` so that one and two ranks must give equal bits, with
a checkpoint after every step. The judge is the run that nothing disturbed: its weights, both moments and its losses.
`shipyard verify crash` runs all of them and writes docs/crash.md.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..training.checkpoint import committed, newest
from ..training.manifest import MANIFEST, verify
from ..training.shard import StoredFragments
from .trainers import Job, start, wait_until

STEPS = 24
LIMIT_S = 300.0
PARTS = ("value", "exp_avg", "exp_avg_sq")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SHAPE = {
    "model_type": "llama", "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": 2,
    "bos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Drill:
    """What was done, how often, how often it ended as promised, and what was seen."""

    fault: str
    times: int
    held: int
    promise: str
    seen: str

    @property
    def passed(self) -> bool:
        return self.held == self.times > 0


@dataclass(frozen=True)
class Ground:
    """A recipe, and the run of it that nothing disturbed."""

    folder: Path
    recipe: Path
    reference: Path

    def go(self, run: Path, ranks: int = 1, *overrides: str) -> Job:
        """Start the recipe in `run`; it goes on from what is there."""
        return start(self.recipe, [f"run_dir={run}", *overrides], ranks, self.folder / f"{run.name}.out")

    def finish(self, run: Path, ranks: int = 1, *overrides: str) -> str:
        """Let the run end undisturbed; return what it printed."""
        job = self.go(run, ranks, *overrides)
        codes = job.wait(LIMIT_S)
        assert set(codes) == {0}, f"{run} ended with {codes}: {job.said()[-2000:]}"
        return job.said()

    def same_bits(self, run: Path) -> bool:
        """Whether a finished run has the weights, moments and losses of the undisturbed one."""
        name = f"step-{STEPS:06d}"
        for part in PARTS:
            ours, theirs = (StoredFragments(folder / name).whole(part) for folder in (run, self.reference))
            if ours.keys() != theirs.keys() or not all(ours[key].equal(theirs[key]) for key in theirs):
                return False
        return losses(run) == losses(self.reference)


def prepare(folder: Path) -> Ground:
    """Write a tokenizer, rows and a recipe into a new folder, and train without disturbance."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder / "shape")
    (folder / "shape" / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    rows = [
        [{"role": "user", "content": f"Count to {n}."}, {"role": "assistant", "content": " ".join(map(str, range(n)))}]
        for n in range(1, 23)
    ]
    text = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    tree = {
        "method": "sft",
        "steps": STEPS,
        "deterministic": "elastic",
        "model": {
            "name": "scratch",
            "shape": str(folder / "shape" / "config.json"),
            "tokenizer": str(folder / "shape"),
            "dtype": "float32",
        },
        "data": {"train": str(folder / "rows.jsonl")},
        "batch": {"size": 4, "micro": 2},
        "optim": {"lr": 1e-3},
        "checkpoints": {"every_steps": 1, "keep_last": 3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    ground = Ground(folder, folder / "recipe.yaml", folder / "undisturbed")
    ground.finish(ground.reference)
    return ground


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials: list[str | AddedToken] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(Path(__file__).read_text(encoding="utf-8").splitlines(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)


def losses(run: Path) -> list[float | None]:
    """What the run logged; None for steps that were left out."""
    return [json.loads(line).get("loss") for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def logged(run: Path) -> int:
    """How many steps the run has logged."""
    return (run / "log.jsonl").read_bytes().count(b"\n") if (run / "log.jsonl").is_file() else 0


def half_written(run: Path) -> set[str]:
    """Checkpoints that are being written, or were when their writer died, by the names of their scratch directories."""
    try:
        names = (entry.name for entry in os.scandir(run))
        return {name for name in names if name.startswith(".step-") and name.endswith(".tmp")}
    except FileNotFoundError:
        return set()


def kill_anywhere(ground: Ground, kills: int, seed: int, kills_per_run: int = 20) -> Drill:
    """SIGKILL at random: in start-up, in steps, inside saves; at one rank and at two, one of them or both.

    Whatever the place, no committed checkpoint may be lost, and the run must end in the same bits.
    """
    rng, runs = random.Random(seed), 0
    places: Counter[str] = Counter()
    held = 0
    while sum(places.values()) < kills:
        run = ground.folder / f"killed-{seed}-{runs}"
        runs += 1
        here: Counter[str] = Counter()
        whole = True
        for _ in range(2 * kills_per_run):
            if sum(here.values()) >= min(kills_per_run, kills - sum(places.values())):
                break
            before = newest(run)[0]
            if (place := _kill_once(ground, run, rng)) is None:
                break  # it had ended by itself
            here[place] += 1
            after = newest(run)[0]
            whole &= before is None or (after is not None and after.about["step"] >= before.about["step"])
        ground.finish(run, rng.choice((1, 2)))
        if whole and ground.same_bits(run):
            held += sum(here.values())
            shutil.rmtree(run)
        places += here
    seen = ", ".join(f"{count} {place}" for place, count in places.most_common())
    promise = "goes on by itself to the same bits, and no committed checkpoint is lost"
    return Drill("SIGKILL at a random instant", sum(places.values()), held, promise, f"{seen}; over {runs} runs")


def _kill_once(ground: Ground, run: Path, rng: random.Random) -> str | None:
    """Start the run, kill it somewhere; return where that was, None if the run ended before."""
    ranks = rng.choice((1, 1, 2))
    done, torn = logged(run), half_written(run)
    job = ground.go(run, ranks)
    aim = rng.choice(("save", "save", "step", "start"))
    if aim == "start":
        time.sleep(rng.random() * 0.5)
    else:
        steps = done + rng.randint(0, 2)
        saving = lambda: aim == "step" or bool(half_written(run) - torn)
        wait_until(lambda: logged(run) >= steps and saving(), job.alive, LIMIT_S)
        time.sleep(rng.random() * (0.03 if aim == "step" else 0.004))
    victims = [rng.randrange(ranks)] if ranks > 1 and rng.random() < 0.5 else None
    job.signal(signal.SIGKILL, victims)
    if victims:  # the other sees the connection break; a launcher would not wait for it either
        job.wait(20.0)
    codes = job.wait(LIMIT_S)
    if -signal.SIGKILL not in codes:
        assert set(codes) == {0}, f"{run} ended with {codes}: {job.said()[-2000:]}"
        return None
    where = "inside a save" if half_written(run) - torn else "in start-up" if logged(run) <= done else "in a step"
    who = "of one rank" if ranks == 1 else "of two, one of them killed" if victims else "of two, both killed"
    return f"{where} {who}"


def sigterm(ground: Ground, times: int, seed: int) -> Drill:
    """SIGTERM: the step in flight is finished and saved, and the exit code says so."""
    rng, held, codes_seen = random.Random(seed), 0, Counter()
    for number in range(times):
        run = ground.folder / f"terminated-{seed}-{number}"
        job = ground.go(run, ranks := rng.choice((1, 2)))
        steps = rng.randint(1, STEPS // 2)
        wait_until(lambda run=run, steps=steps: logged(run) >= steps, job.alive, LIMIT_S)
        job.signal(signal.SIGTERM)
        codes = job.wait(LIMIT_S)
        codes_seen.update(codes)
        saved = newest(run)[0]
        stopped = set(codes) == {143} and saved is not None and saved.about["step"] == logged(run)
        ground.finish(run, 3 - ranks)
        held += stopped and ground.same_bits(run)
        shutil.rmtree(run)
    seen = ", ".join(f"{count} ranks ended with {code}" for code, count in codes_seen.items())
    return Drill("SIGTERM", times, held, "saves within a step, exit code 143; goes on to the same bits", seen)


def interrupted(ground: Ground, name: str, steps: int) -> Path:
    """A run of which `steps` steps or a few more are saved, then killed."""
    run = ground.folder / name
    job = ground.go(run)
    wait_until(lambda: len(committed(run)) >= 3 and logged(run) >= steps, job.alive, LIMIT_S)
    job.signal(signal.SIGKILL)
    job.wait(LIMIT_S)
    return run


def damage(ground: Ground, times: int, seed: int, torn: bool) -> Drill:
    """Flip a bit of the newest checkpoint, or tear it: the step before is used, and the run says why."""
    rng, held = random.Random(seed), 0
    origin = interrupted(ground, f"damaged-{seed}-{torn}", STEPS // 2)
    kinds: Counter[str] = Counter()
    for number in range(times):
        run = ground.folder / f"damaged-{seed}-{torn}-{number}"
        shutil.copytree(origin, run)
        steps = committed(run)
        victim = rng.choice(sorted(path for path in steps[max(steps)].iterdir() if path.stat().st_size))
        if torn:
            _tear(victim, rng)
        else:
            _flip(victim, rng)
        kinds[victim.name] += 1
        said = ground.finish(run)
        named = steps[max(steps)].name in said and f"going on after step {max(steps) - 1} " in said
        held += named and ground.same_bits(run)
        shutil.rmtree(run)
    shutil.rmtree(origin)
    seen = ", ".join(f"{name} {count}" for name, count in kinds.most_common())
    fault = "torn checkpoint (a file cut short or gone)" if torn else "one bit flipped in the newest checkpoint"
    return Drill(fault, times, held, "named, the step before is used; goes on to the same bits", f"hit {seen}")


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    while True:
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        data[at] ^= 1 << bit
        if path.name != MANIFEST or _matters(path, data):
            break
        data[at] ^= 1 << bit
    path.write_bytes(data)


def _matters(path: Path, data: bytearray) -> bool:
    """Whether JSON says something else with that bit flipped: a space may become another white one."""
    try:
        return json.loads(data) != json.loads(path.read_bytes())
    except ValueError:
        return True


def _tear(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.3:
        path.unlink()
    else:
        os.truncate(path, rng.randrange(path.stat().st_size))


def full_disk(ground: Ground, ranks: int) -> Drill | None:
    """A file system with room for three checkpoints (a tmpfs): the fourth fails in one line, and the three stay.

    None where this user may not mount one.
    """
    place = ground.folder / f"disk-{ranks}"
    place.mkdir()
    kept = sum(path.stat().st_size for path in (ground.reference / f"step-{STEPS:06d}").iterdir())
    size = ["-t", "tmpfs", "-o", f"size={int(3.6 * kept)}"]
    if subprocess.run(["mount", *size, "shipyard", str(place)], capture_output=True).returncode:
        return None
    run = place / f"full-{ranks}"
    try:
        job = ground.go(run, ranks)
        codes = job.wait(LIMIT_S)
        lines = [line for line in job.said().splitlines() if line.startswith("shipyard: error: ")]
        steps = committed(run)
        for path in steps.values():
            verify(path)
        stopped = set(codes) == {2} and len(lines) == 1 and "disk: no space left while writing" in lines[0]
        subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True, capture_output=True)
        said = ground.finish(run, ranks)
        held = stopped and len(steps) == 3 and f"after step {max(steps)} " in said and ground.same_bits(run)
    finally:
        subprocess.run(["umount", str(place)], check=True)
    said = lines[0].removeprefix("shipyard: error: ").replace(str(place), "DISK") if lines else "nothing"
    seen = f"{len(steps)} checkpoints were kept, whole; it said: {said}"
    promise = "one clear line, exit code 2, earlier checkpoints whole; with room, goes on to the same bits"
    return Drill(f"disk full during a save, {ranks} rank{'s' if ranks > 1 else ''}", 1, int(held), promise, seen)
