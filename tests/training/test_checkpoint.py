"""Checkpoints pass between engines and numbers of ranks, and a damaged one is named."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from shipyard.training.checkpoint import committed, weights_hash
from shipyard.training.manifest import BLOCK_BYTES, commit, verify
from shipyard.training.shard import StoredFragments, key_of, write_shard


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_model: Path, chat_rows: Path, shipyard) -> tuple[Path, Path]:
    """A recipe of four steps, and the run of one rank that nothing disturbed."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tree = {
        "method": "sft",
        "steps": 4,
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "data": {"train": str(chat_rows)},
        "batch": {"size": 8, "micro": 3},
        "optim": {"lr": 1e-3, "weight_decay": 0.1},
        "checkpoints": {"every_steps": 1, "keep_last": 10},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(tree))
    shipyard("train", folder / "sft.yaml", f"run_dir={folder / 'straight'}")
    return folder / "sft.yaml", folder / "straight"


def forget_after(run: Path, step: int) -> None:
    """Make a finished run one that was interrupted after `step`."""
    shutil.rmtree(run / "model")
    for later, path in committed(run).items():
        if later > step:
            shutil.rmtree(path)


def difference(run: Path, other: Path, part: str) -> float:
    ours, theirs = (StoredFragments(path).whole(part) for path in (run, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def test_engines_and_ranks_change_between_steps(straight, shipyard, tmp_path: Path) -> None:
    """One rank, then ZeRO-3 on two, then ZeRO-1 on two, then DDP on two: the same steps, losses and weights."""
    recipe, reference = straight
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    for done, engine in enumerate(("zero3", "zero1", "ddp"), 1):
        forget_after(run, done)
        before = weights_hash(run / f"step-{done:06d}")
        shipyard("train", recipe, f"run_dir={run}", f"parallel.engine={engine}", ranks=2)
        assert verify(run / f"step-{done + 1:06d}").about["engine"] == engine
        assert weights_hash(run / f"step-{done:06d}") == before
        for part, tolerance in (("value", 1e-6), ("exp_avg", 1e-6), ("exp_avg_sq", 1e-6)):
            assert difference(run / "step-000004", reference / "step-000004", part) <= tolerance, (engine, part)
    losses, wanted = ([json.loads(line)["loss"] for line in (path / "log.jsonl").open()] for path in (run, reference))
    assert losses == pytest.approx(wanted, rel=1e-6)


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
    assert sorted(committed(run)) == [2, 4]
