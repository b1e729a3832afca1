"""Checkpoints pass between engines and numbers of ranks, and a damaged one is named."""

import errno
import itertools
import json
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from reshard_on_ranks import LateSaver
from runs_for_tests import forget_after, recipe_and_run
from shipyard.launch.mistakes import line_of
from shipyard.training import checkpoint
from shipyard.training.checkpoint import Saver, committed
from shipyard.training.engine import Fragment
from shipyard.training.manifest import BLOCK_BYTES, commit, verify
from shipyard.training.ranks import Ranks
from shipyard.training.recipe import Checkpoints
from shipyard.training.shard import ShardImage, StoredFragments, key_of, write_shard

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
PARTS = ("value", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_model: Path, chat_rows: Path, shipyard) -> tuple[Path, Path]:
    """A recipe of six steps, and the run of one rank that nothing disturbed."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tree = {
        "method": "sft",
        "steps": 6,
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "data": {"train": str(chat_rows)},
        "batch": {"size": 8, "micro": 3},
        "optim": {"lr": 1e-3, "weight_decay": 0.1},
        "checkpoints": {"every_steps": 1, "keep_last": 10},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(tree))
    shipyard("train", folder / "sft.yaml", f"run_dir={folder / 'straight'}")
    return folder / "sft.yaml", folder / "straight"


def difference(run: Path, other: Path, part: str) -> float:
    ours, theirs = (StoredFragments(path).whole(part) for path in (run, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def reshard(on_ranks, ranks: int, recipe: Path, hops: list[tuple[str, Path, Path]]) -> None:
    """Start real ranks once; for each (engine, source, out) they load, save, take a step and save again."""
    words = json.dumps([[engine, str(a), str(b)] for engine, a, b in hops])
    on_ranks(ranks, Path(__file__).with_name("reshard_on_ranks.py"), recipe, words)


def assert_resharded(source: Path, out: Path, reference: Path) -> Path:
    """Loaded and saved, every bit is as it was; a step on, it is the undisturbed run's. Return that checkpoint."""
    loaded, stepped = (path for _, path in sorted(committed(out).items()))
    for part in PARTS:
        assert difference(loaded, source, part) == 0, (loaded, part)
        assert difference(stepped, reference / stepped.name, part) <= 1e-6, (stepped, part)
    assert verify(loaded).about["updates"] == verify(source).about["updates"]
    return stepped


def test_engines_and_ranks_change_between_steps(straight, shipyard, on_ranks, tmp_path: Path) -> None:
    """DDP on one rank, then on two ranks FSDP2, ZeRO-2, ZeRO-3, ZeRO-1, then one rank again: the same steps."""
    recipe, reference = straight
    source = reference / "step-000001"
    hops: list[tuple[str, Path, Path]] = []
    for step, engine in enumerate(("fsdp2", "zero2", "zero3", "zero1"), 2):
        hops.append((engine, source, tmp_path / engine))
        source = tmp_path / engine / f"step-{step:06d}"
    reshard(on_ranks, 2, recipe, hops)
    for engine, before, out in hops:
        assert_resharded(before, out, reference)
        assert all(verify(path).about["engine"] == engine for path in committed(out).values())
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    forget_after(run, 4)
    shutil.copytree(source, run / "step-000005")
    shipyard("train", recipe, f"run_dir={run}")
    for part in PARTS:
        assert difference(run / "step-000006", reference / "step-000006", part) <= 1e-6, part
    losses, wanted = ([json.loads(line)["loss"] for line in (path / "log.jsonl").open()] for path in (run, reference))
    assert losses == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(1, 2), (2, 4), (4, 1)])
def test_every_engine_takes_up_every_other(counts: tuple[int, int], straight, on_ranks, tmp_path: Path) -> None:
    """All engines on one number of ranks to all engines on the same and on the other."""
    recipe, reference = straight
    sources: list[Path] = []
    for ranks in counts:
        hops = [(engine, reference / "step-000001", tmp_path / f"{engine}-{ranks}") for engine in ENGINES]
        reshard(on_ranks, ranks, recipe, hops)
        sources += [assert_resharded(source, out, reference) for _, source, out in hops]
    for ranks in counts:
        hops = [
            (engine, source, tmp_path / f"{source.parent.name}-{engine}-{ranks}")
            for source in sources
            for engine in ENGINES
        ]
        reshard(on_ranks, ranks, recipe, hops)
        for _, source, out in hops:
            assert_resharded(source, out, reference)


def test_ranges_are_read_across_files(tmp_path: Path) -> None:
    values = torch.randn(1000)
    cuts = (0, 313, 314, 1000)
    ranges = []
    for number, (low, high) in enumerate(itertools.pairwise(cuts)):
        write_shard(tmp_path / f"{number}.safetensors", {key_of("w", "value", low): values[low:high].clone()})
        ranges.append((f"{number}.safetensors", low, high - low))
    (tmp_path / "index.json").write_text(json.dumps({"shapes": {"w": [10, 100]}, "ranges": {"w": {"value": ranges}}}))
    stored = StoredFragments(tmp_path)
    for start, length in ((0, 1000), (300, 20), (313, 1), (999, 1), (5, 0)):
        assert stored.read("w", "value", start, length).equal(values[start : start + length])
    assert stored.whole()["w"].equal(values.view(10, 100))
    assert stored.read("w", "exp_avg", 0, 10) is None


def test_what_was_written_is_hashed_on_the_way(tmp_path: Path) -> None:
    """The hash that the writer gives is the file's, and safetensors reads the file."""
    from safetensors.torch import load_file

    tensors = {"a": torch.randn(7), "empty": torch.empty(0), "b": torch.randn(BLOCK_BYTES // 4 + 5)}
    entry = write_shard(tmp_path / "x.safetensors", tensors)
    read = load_file(tmp_path / "x.safetensors")
    assert all(read[key].equal(tensors[key]) for key in tensors)
    commit(tmp_path, {}, {"x.safetensors": entry})
    verify(tmp_path)
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.seek(BLOCK_BYTES + 3)
        byte = file.read(1)[0]
        file.seek(BLOCK_BYTES + 3)
        file.write(bytes([byte ^ 3]))
    with pytest.raises(ValueError, match=f"hash differs in bytes {BLOCK_BYTES}-{entry['bytes'] - 1}"):
        verify(tmp_path)


def test_which_checkpoints_are_kept(straight, tmp_path: Path) -> None:
    from shipyard.training.loop import train
    from shipyard.training.recipe import load_recipe

    recipe, _ = straight
    run = tmp_path / "run"
    train(load_recipe(recipe, [f"run_dir={run}", "checkpoints.keep_last=1", "checkpoints.keep_every=2"]))
    assert sorted(committed(run)) == [2, 4, 6]


def test_dropping_takes_nothing_that_is_needed(tmp_path: Path, monkeypatch) -> None:
    """Neither what was just saved, because a damaged one that was passed over bears a later number, nor the last of the
    schedule. And what is being dropped is no checkpoint any more, though a kill leave half of it."""
    engine: Any = SimpleNamespace(updates=1, fragments=lambda: [Fragment("w", (3,), 0, {"value": torch.ones(3)})])
    ranks = Ranks(0, 1, torch.device("cpu"))
    saver = Saver(ranks, tmp_path, Checkpoints(keep_last=1, every_steps=4), 10.0)
    saver.save(engine, 30, {}, {})
    saver.finish()
    monkeypatch.setattr(
        checkpoint.shutil, "rmtree", lambda path, **named: (Path(path) / "index.json").unlink(missing_ok=True)
    )
    for step in (24, 25, 26):
        saver.save(engine, step, {}, {})
        saver.finish()
    monkeypatch.undo()
    assert sorted(committed(tmp_path)) == [24, 26, 30]
    assert all(verify(path) for path in committed(tmp_path).values())
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-000024", "step-000026", "step-000030"}
    Saver(ranks, tmp_path, Checkpoints(), 10.0)
    assert not list(tmp_path.glob(".step-*"))


def test_a_save_holds_its_step_though_training_goes_on(straight, tmp_path: Path, monkeypatch) -> None:
    """Each checkpoint is the very files of one that training stood still for, however late its copy is made."""
    from shipyard.training.loop import train
    from shipyard.training.recipe import load_recipe

    recipe, _ = straight
    train(load_recipe(recipe, [f"run_dir={tmp_path / 'still'}", "checkpoints.background=false"]))
    monkeypatch.setattr(checkpoint, "Saver", LateSaver)
    train(load_recipe(recipe, [f"run_dir={tmp_path / 'beside'}"]))
    still, beside = (committed(tmp_path / name) for name in ("still", "beside"))
    assert sorted(beside) == [1, 2, 3, 4, 5, 6]
    for step, path in beside.items():
        assert verify(path).files == verify(still[step]).files, step


def test_a_copy_that_fails_is_a_save_that_failed(straight, tmp_path: Path, monkeypatch) -> None:
    from shipyard.training.loop import train
    from shipyard.training.recipe import load_recipe

    copy = Saver._copy

    def third_fails(saver: Saver, *args) -> ShardImage:
        if 2 in committed(saver.run_dir):
            raise RuntimeError("no memory for a copy")
        return copy(saver, *args)

    monkeypatch.setattr(Saver, "_copy", third_fails)
    with pytest.raises(ValueError, match="no memory for a copy"):
        train(load_recipe(straight[0], [f"run_dir={tmp_path}"]))
    assert sorted(committed(tmp_path)) == [1, 2]
    assert not list(tmp_path.glob(".step-*"))


def test_a_slow_save_makes_haste_when_it_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    """At 1 MB/s a save of 400 MB takes seven minutes: it is on its way until somebody asks how it went."""
    weights = torch.randn(100_000_000)
    fragment = Fragment("w", (len(weights),), 0, {"value": weights})
    engine: Any = SimpleNamespace(updates=1, fragments=lambda: [fragment])
    saver = Saver(Ranks(0, 1, torch.device("cpu")), tmp_path, Checkpoints(max_mb_per_s=1), 10.0)
    saver.save(engine, 1, {}, {})
    saver.settle()
    time.sleep(2.0)
    assert saver.on_its_way
    assert not committed(tmp_path)
    asked = threading.Thread(target=saver.finish, daemon=True)
    asked.start()
    asked.join(300)
    assert not asked.is_alive()
    assert torch.equal(StoredFragments(tmp_path / "step-000001").whole()["w"], weights)


def test_a_slow_rank_is_waited_for_while_its_file_grows(tmp_path: Path) -> None:
    """At a low `max_mb_per_s` ranks that hold more may write for longer than the time limit after the first is done."""
    file, note, timeout_s = tmp_path / checkpoint._file_of(1), tmp_path / "1.note", 1.0

    def write_slowly() -> None:
        for _ in range(15):
            with file.open("ab") as growing:
                growing.write(b"x")
            time.sleep(timeout_s / 5)
        note.write_text('{"file": "late"}')

    writer = threading.Thread(target=write_slowly)
    writer.start()
    assert checkpoint._await_note(tmp_path, 1, timeout_s) == {"file": "late"}
    writer.join()
    note.unlink()
    with pytest.raises(ValueError, match="rank 1 wrote nothing"):
        checkpoint._await_note(tmp_path, 1, timeout_s)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, OSError), (errno.ESTALE, OSError), (errno.ENOSPC, ValueError)]
)
def test_a_storage_that_fails_for_a_moment_is_no_mistake(number: int, kind: type, tmp_path: Path, monkeypatch) -> None:
    """A mistake is final; a job whose file system was away for a moment has to be started again."""

    def fails(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ShardImage, "write", fails)
    engine: Any = SimpleNamespace(updates=1, fragments=lambda: [Fragment("w", (3,), 0, {"value": torch.ones(3)})])
    saver = Saver(Ranks(0, 1, torch.device("cpu")), tmp_path, Checkpoints(), 10.0)
    saver.save(engine, 1, {}, {})
    with pytest.raises((OSError, ValueError)) as raised:
        saver.finish()
    assert type(raised.value) is kind
    assert (line_of(raised.value) is None) == (kind is OSError)
    saver.finish()
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_leaves_what_had_its_name(straight, tmp_path: Path) -> None:
    """Nothing is written under a checkpoint's name before all of it is there, also where it replaces one."""
    run = tmp_path / "run"
    shutil.copytree(straight[1], run)
    before = verify(run / "step-000006")
    engine: Any = SimpleNamespace(updates=6, fragments=lambda: [Fragment("w", (3,), 0, {"value": torch.ones(3)})])
    saver = Saver(Ranks(0, 1, torch.device("cpu")), run, Checkpoints(), 10.0)
    saver.save(engine, 6, {"not for safetensors": torch.eye(2).to_sparse()}, {})
    with pytest.raises(ValueError, match="sparse"):
        saver.finish()
    assert verify(run / "step-000006") == before
    assert not list(run.glob(".step-*"))


def test_a_run_does_not_go_on_with_other_rows(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> None:
    """Its batches are row numbers, which other rows would take."""
    from shipyard.training.loop import train
    from shipyard.training.recipe import load_recipe

    rows = tmp_path / "rows.jsonl"
    kept = chat_rows.read_text()
    rows.write_text(kept)
    tree = {
        "method": "sft", "steps": 2, "checkpoints": {"every_steps": 1, "keep_last": 10}, "data": {"train": str(rows)},
        "model": {"name": str(tiny_model), "dtype": "float32"}, "batch": {"size": 2, "micro": 2},
    }  # fmt: skip
    recipe, run = recipe_and_run(tmp_path, tree)
    forget_after(run, 1)
    for other in (kept + kept.splitlines()[0], kept.replace("Count to 7", "Count to 8")):
        rows.write_text(other)
        with pytest.raises(ValueError, match=r"no longer gives the rows that the run in .* began with"):
            train(load_recipe(recipe, [f"run_dir={run}"]))
    rows.write_text(kept)
    train(load_recipe(recipe, [f"run_dir={run}"]))
