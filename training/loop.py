"""The one loop: every method, every engine, one process or many.

A step is: the global batch, this rank's micro-batches of it, each one's part of the loss divided by the global
denominator, one update, one line. What a step computes does not depend on how it is cut.
"""

import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import xxhash

from ..kernels.huggingface import plug
from . import checkpoint, experts, finish
from .batches import steps_per_epoch
from .claim import claimed
from .dataset import Dataset, Pair, Sample, load_dataset
from .dpo import PreferenceTuning
from .ending import leave
from .engine import Engine
from .exit_code import EXIT_BAD_STEP, EXIT_PREEMPTED
from .grpo import GroupRelativeTuning
from .health import BadStep, Norms
from .heartbeat import watch
from .log import StepLog, flops_per_token, memory_gib, peak_flops, progress
from .lora import add_adapters
from .manifest import Manifest
from .method import Method
from .models import (
    SCRATCH,
    committed_digest,
    compute_dtype,
    has_bf16_units,
    load_model,
    load_tokenizer,
    prepare,
    require_apart,
    require_room,
    take_special_tokens,
)
from .optim import build_optimizer
from .parallel import build_engine, computes_whole
from .pretrain import Pretraining, open_shards
from .ranks import Ranks, start
from .recipe import Recipe, dump_recipe
from .reference import Reference
from .sft import SupervisedTuning
from .step import run_step

CUT_KNOBS = ("run_dir", "resume", "parallel", "checkpoints", "health", "log")
"""Sections that say how and where a run is computed, not what: they may change between a run and its resumption."""


def train(recipe: Recipe) -> Path:
    """Run a recipe to its end, resuming what is there; return the run directory.

    `run_dir/model` then holds the whole trained model, merged, in the Hugging Face layout, committed. A run that is
    already finished is verified and returned. Raises ValueError, one line, for what the user can mend.
    """
    ranks = start(recipe)
    run_dir = Path(recipe.run_dir)
    if recipe.resume == "auto" and (done := finish.finished(run_dir, identity(recipe))) is not None:
        if ranks.first:
            print(f"{run_dir}: finished before, verified ({done.digest[:12]})")
        return run_dir
    found, complaints = checkpoint.newest_for_all(ranks, run_dir) if recipe.resume == "auto" else (None, [])
    if found is not None:
        _refuse_other_run(found, recipe)
    tokenizer, data, engine, method = assemble(recipe, ranks, run_dir)
    if found is not None:
        _refuse_other_rows(found, recipe, method)
        _refuse_other_base(found, recipe, method)
    with claimed(run_dir, ranks) as waited:
        if waited and recipe.resume == "auto":  # the other job has written since
            found, complaints = checkpoint.newest_for_all(ranks, run_dir)
        _begin(recipe, run_dir, ranks)
        steps = recipe.steps or steps_per_epoch(method.rows, recipe.batch.size) * (recipe.epochs or 1)
        log = StepLog(recipe, run_dir, steps, ranks.first)
        _introduce(recipe, engine, data, steps, log)
        for line in method.introduction():
            log.say(line)
        for complaint in complaints:
            log.say(f"resume: {complaint}")
        norms = Norms(recipe.health.spike_factor, found.about.get("norms", ()) if found is not None else ())
        first_step = _resume(engine, method, found, log)
        _steps(recipe, engine, method, run_dir, log, range(first_step, steps), norms)
        finish.finish(recipe, engine, tokenizer, run_dir, identity(recipe), log)
        log.close()
    return run_dir


def assemble(recipe: Recipe, ranks: Ranks, run_dir: Path) -> tuple[Any, Dataset | None, Engine, Method]:
    """Load and join a run's parts: tokenizer, data (None where a task generates it), engine with model, method."""
    tokenizer = load_tokenizer(recipe.model)
    made_by_method = recipe.method == "grpo" or recipe.data.tokens is not None
    data = None if made_by_method else load_dataset(recipe, tokenizer, run_dir)
    model = load_model(recipe.model, trains_all=recipe.lora.rank == 0, seed=recipe.seed)
    require_room(model, *_demands(recipe, tokenizer, data))
    if recipe.model.name == SCRATCH:
        take_special_tokens(model, tokenizer)
    knobs, kernels = recipe.parallel, recipe.model.kernels
    whole = computes_whole(knobs.engine, knobs.tensor, knobs.context, recipe.model.compile)
    plugged = plug(model, kernels, whole, ranks.device, compute_dtype(recipe))
    if recipe.batch.packing and not plugged.parts:  # a family that nobody has looked at
        require_apart(model)
    if plugged.fault:
        print(f"model.kernels: auto takes PyTorch's code on {ranks.device}: Triton's {plugged.fault}", file=sys.stderr)
    if recipe.lora.rank:
        model = add_adapters(model, recipe.lora, recipe.seed)
    prepare(model, recipe.model, ranks.device)
    needs_reference = recipe.method == "dpo" or (recipe.method == "grpo" and recipe.grpo.beta > 0)
    reference = Reference(model) if needs_reference else None
    optimizer = build_optimizer(recipe, model)
    engine = build_engine(ranks, model, optimizer, recipe)
    method = _method(recipe, ranks, engine, tokenizer, data, reference)
    if recipe.lora.rank or reference is not None:
        method.base = committed_digest(recipe.model.name)
    return tokenizer, data, engine, method


def _demands(recipe: Recipe, tokenizer: Any, data: Dataset | None) -> tuple[int, int]:
    """The largest id and the tokens of the longest document, as far as they are known before the first step."""
    if recipe.data.tokens is not None:  # shards know their tokenizer, and say which it was
        return 0, recipe.data.max_tokens
    if data is None:
        known = (tokenizer.vocab_size - 1, tokenizer.bos_token_id or 0, tokenizer.eos_token_id or 0)
        return max(known), recipe.grpo.max_new_tokens
    items = [*data.train, *data.validation]
    samples = [one for item in items for one in ((item.chosen, item.rejected) if isinstance(item, Pair) else (item,))]
    return max(int(one.ids.max()) for one in samples), max(len(one.ids) for one in samples)


def _steps(
    recipe: Recipe, engine: Engine, method: Method, run_dir: Path, log: StepLog, todo: range, norms: Norms
) -> None:
    ranks, every = engine.ranks, recipe.checkpoints.every_steps
    saver = checkpoint.Saver(ranks, run_dir, recipe.checkpoints, recipe.parallel.timeout_s)
    peak = peak_flops(ranks.device, compute_dtype(recipe)) * ranks.world_size
    flops = flops_per_token(engine.module)
    with (
        _sigterm() as asked_to_stop,
        watch(ranks, recipe.health.heartbeat_s) as beat,
        progress(recipe.method, len(todo), log.console, ranks.first) as advance,
    ):
        for step in todo:
            began = time.perf_counter()
            beat(step)
            try:
                values = run_step(
                    recipe, engine, method, step, todo.stop, bool(asked_to_stop), norms.largest(), saver.settle
                )
                norms.known.append(values["grad_norm"])
                seconds = time.perf_counter() - began
                mfu = values.pop("computed") / seconds * flops / peak
                speed = {"tokens_per_s": values["tokens"] / seconds, "mfu": mfu, "memory_gib": memory_gib(ranks.device)}
                values |= {**speed, "seconds": seconds}
            except BadStep as bad:
                values = _after_bad_step(recipe, engine, method, saver, norms, log, step, str(bad))
            stop = values.pop("asked_to_stop", 0.0) > 0
            log.step(step + 1, values)
            advance()
            last = step + 1 == todo.stop
            if last or stop or (every and (step + 1) % every == 0):
                _save(saver, recipe, engine, method, step + 1, norms)
            if stop and not last:
                saver.finish()
                log.say(f"SIGTERM: step {step + 1} is saved in {run_dir}; the same command goes on from there")
                raise SystemExit(EXIT_PREEMPTED)
        saver.finish()


def _after_bad_step(
    recipe: Recipe, engine: Engine, method: Method, saver: checkpoint.Saver, norms: Norms, log: StepLog, step: int,
    bad: str,
) -> dict[str, float]:  # fmt: skip
    """Stop with what came before `step` saved, or leave the step out, or go back to a checkpoint too. Collective."""
    saver.finish()
    every, choice = recipe.checkpoints.every_steps, recipe.health.on_bad_step
    if choice == "stop":
        if step:
            _save(saver, recipe, engine, method, step, norms)
            saver.finish()
        said = f"{bad}; health.on_bad_step=skip or rewind goes on without it"
        log.say(said)
        leave(saver.run_dir, EXIT_BAD_STEP, said)
        raise SystemExit(EXIT_BAD_STEP)
    # Not the newest one: a SIGTERM may have left that, and a run decides alike with and without.
    found = checkpoint.at_for_all(engine.ranks, saver.run_dir, step // every * every) if every else None
    if choice == "rewind" and found is not None:
        restore(engine, method, found)
        norms.known.clear()
        norms.known.extend(found.about["norms"])
        log.say(f"{bad}; back to the weights of step {found.about['step']}, without the steps from there to this one")
    else:
        none = "; there is no checkpoint to rewind to" if choice == "rewind" else ""
        log.say(f"{bad}; it is left out{none}")
    return {"left_out": 1.0}


def _save(saver: checkpoint.Saver, recipe: Recipe, engine: Engine, method: Method, step: int, norms: Norms) -> None:
    """Begin to write the checkpoint after `step` finished steps. Collective."""
    about = {"identity": identity(recipe), "world_size": engine.ranks.world_size, "engine": recipe.parallel.engine}
    extra = {**method.state(), **experts.state(engine.module)}
    saver.save(engine, step, extra, {**about, "norms": list(norms.known), "rows": method.digest, "base": method.base})


def restore(engine: Engine, method: Method, found: Manifest) -> int:
    """Take up a checkpoint, experts' balance and the method's own state too; return the number of finished steps."""
    return checkpoint.restore(
        engine, found, lambda stored: method.load_state(experts.load_state(engine.module, stored))
    )


def _resume(engine: Engine, method: Method, found: Manifest | None, log: StepLog) -> int:
    if found is None:
        log.forget_from(0)
        return 0
    step = restore(engine, method, found)
    log.forget_from(step)
    log.say(f"resume: going on after step {step} from {found.path}")
    return step


def _refuse_other_run(found: Manifest, recipe: Recipe) -> None:
    if found.about["identity"] not in (None, identity(recipe)):  # None: imported, and nobody's yet
        raise ValueError(
            f"run_dir: {found.path.parent} holds a run of another recipe (compare its recipe.yaml); "
            "set another run_dir, or resume=never to start over in this one"
        )


def _refuse_other_rows(found: Manifest, recipe: Recipe, method: Method) -> None:
    """Batches are drawn by row numbers: among other rows some would come twice in an epoch, and some never."""
    if found.about.get("rows") not in (None, "", method.digest):  # none: imported, or the method looks itself
        raise ValueError(
            f"data.train: {recipe.data.train} no longer gives the rows that the run in {found.path.parent} began with; "
            "put the old ones back, set another run_dir, or resume=never to start over in this one"
        )


def _refuse_other_base(found: Manifest, recipe: Recipe, method: Method) -> None:
    """An earlier stage that was trained anew in its place has other weights under the same name."""
    if method.base and found.about.get("base") not in (None, "", method.base):
        raise ValueError(
            f"model.name: {recipe.model.name} is another model than when the run in {found.path.parent} began; put the "
            "old one back, set another run_dir, or resume=never to start over in this one"
        )


def identity(recipe: Recipe) -> str:
    """Hash of every knob that decides what is computed. Runs of equal identity may continue each other."""
    tree = recipe.model_dump(mode="json", exclude=set(CUT_KNOBS))
    if recipe.deterministic == "off":  # else they decide the last bit
        tree["batch"].pop("micro")
        tree["model"].pop("kernels")
    for how in ("activation_checkpointing", "compile"):
        tree["model"].pop(how)
    return xxhash.xxh3_128_hexdigest(repr(sorted(_flat(tree, ""))).encode())


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value)


def _begin(recipe: Recipe, run_dir: Path, ranks: Ranks) -> None:
    """Write the first file of a run, once everything that can be wrong with the recipe has been looked at."""
    if ranks.first:
        if recipe.resume == "never":
            for old in [*run_dir.glob("step-*"), run_dir / "model", run_dir / "adapter"]:
                shutil.rmtree(old, ignore_errors=True)
        (run_dir / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    ranks.wait()


def _method(
    recipe: Recipe, ranks: Ranks, engine: Engine, tokenizer: Any, data: Dataset | None, reference: Reference | None
) -> Method:
    if recipe.method == "grpo":
        return GroupRelativeTuning(recipe, ranks, engine.module, tokenizer, reference)
    if recipe.data.tokens is not None:
        return Pretraining(recipe, open_shards(recipe, tokenizer))
    assert data is not None
    if recipe.method == "dpo":
        assert reference is not None
        return PreferenceTuning(recipe, cast(list[Pair], data.train), reference, data.digest)
    return SupervisedTuning(recipe, cast(list[Sample], data.train), data.digest)


def _introduce(recipe: Recipe, engine: Engine, data: Dataset | None, steps: int, log: StepLog) -> None:
    trained = sum(getattr(p, "ds_numel", p.numel()) for _, p in engine.named_trainable())
    ranks = f"{engine.ranks.world_size} rank{'s' if engine.ranks.world_size > 1 else ''} ({engine.ranks.device.type})"
    log.say(
        f"{recipe.method}: {recipe.model.name}, {trained / 1e6:.2f}M weights train, {recipe.parallel.engine} on "
        f"{ranks}, {steps} steps of {recipe.batch.size}"
    )
    if recipe.model.dtype == "bfloat16" and not has_bf16_units():
        remedy = (
            "frozen weights multiply in float32" if recipe.lora.rank else "set model.dtype=float32, it is far faster"
        )
        log.say(f"model.dtype: this processor has no bfloat16 units; {remedy}")
    if data is not None:
        left_out = f", {data.quarantined} quarantined in {data.quarantine_path}" if data.quarantined else ""
        outside = f", {data.outside} outside data.where" if data.outside else ""
        log.say(f"data: {len(data.train)} rows to train on, {len(data.validation)} held out{outside}{left_out}")


@contextmanager
def _sigterm() -> Iterator[list[int]]:
    """Yield a list that SIGTERM makes non-empty, so that a step in flight is finished and saved."""
    received: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:  # not in the main thread: somebody else handles signals
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
