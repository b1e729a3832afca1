"""DeepSpeed's own checkpoints come in bit by bit, and its engines take what goes out."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from shipyard.serving.export import export
from shipyard.training.checkpoint import METHOD, committed
from shipyard.training.deepspeed_files import STAGES, _load, import_deepspeed
from shipyard.training.experts import buffers_of_state
from shipyard.training.manifest import verify
from shipyard.training.shard import StoredFragments

PARTS = ("value", "exp_avg", "exp_avg_sq")
SCRIPT = Path(__file__).with_name("deepspeed_on_ranks.py")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, on_ranks) -> Path:
    """What ZeRO-1, 2 and 3 on two ranks saved and held, what was made of it, and what other stages made of that."""
    out = tmp_path_factory.mktemp("deepspeed")
    on_ranks(2, SCRIPT, "stages", out)
    return out


def assert_as_held(step: Path, held: Path) -> None:
    manifest, told = verify(step), load_file(held)
    assert [manifest.about["updates"], manifest.about["step"]] == told.pop("steps").tolist()
    stored = StoredFragments(step)
    ours = {f"{part}/{name}": tensor for part in PARTS for name, tensor in stored.whole(part).items()}
    ours |= buffers_of_state(load_file(step / METHOD))
    assert ours.keys() == told.keys()
    for key, tensor in ours.items():
        assert tensor.equal(told[key]), key
        assert tensor.any(), key


def test_every_bit_comes_in(saved: Path) -> None:
    """Weights, both moments, a router's bias and both counts are what the engine held, from all three stages; paddings
    are left out."""
    for stage in (1, 2, 3):
        assert_as_held(saved / f"run{stage}" / "step-000003", saved / f"zero{stage}.safetensors")
        assert verify(saved / f"run{stage}" / "step-000003").about["engine"] == f"zero{stage}"


def test_an_engine_of_another_stage_takes_every_bit(saved: Path) -> None:
    """And its next step is the step that the first engine would have taken."""
    for stage in (1, 2, 3):
        for before, after in ((f"zero{stage}", f"loaded{stage}"), (f"next{stage}", f"loaded-next{stage}")):
            held, taken = load_file(saved / f"{before}.safetensors"), load_file(saved / f"{after}.safetensors")
            assert held.keys() == taken.keys()
            for key in held:
                tolerance = 0.0 if before.startswith("zero") else 1e-7
                assert torch.allclose(held[key], taken[key], rtol=0, atol=tolerance), (after, key)


class ByName:
    """Pickled as Python 3.11.0 to 3.11.3 or so pickle an enum's member."""

    def __init__(self, kind: type, name: str) -> None:
        self.asked = kind, name

    def __reduce__(self):
        return getattr, self.asked


def test_a_stage_pickled_by_name_comes_in_and_nothing_else_does(tmp_path: Path) -> None:
    """getattr could reach anything from a class; what stands for it knows the names of ZeRO's stages."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    for stage in ZeroStageEnum:
        if stage.name in STAGES:
            torch.save({"zero_stage": ByName(ZeroStageEnum, stage.name)}, tmp_path / "named.pt")
            assert int(_load(tmp_path / "named.pt")["zero_stage"]) == stage.value
    assert {name: int(ZeroStageEnum[name]) for name in STAGES} == STAGES
    for kind, name in ((ZeroStageEnum, "__class__"), (ZeroStageEnum, "__subclasses__")):
        torch.save({"zero_stage": ByName(kind, name)}, tmp_path / "named.pt")
        with pytest.raises(ValueError, match=rf"is damaged \(.*{name}"):
            _load(tmp_path / "named.pt")


class Stranger:
    """A class that DeepSpeed does not put into its files."""


def test_what_is_not_whole_is_refused_in_a_line(saved: Path, tmp_path: Path) -> None:
    def refused(reason: str) -> None:
        with pytest.raises(ValueError, match=reason) as caught:
            import_deepspeed(source, tmp_path / "run")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()

    def fresh(stage: int = 2) -> Path:
        shutil.rmtree(tmp_path / "ds", ignore_errors=True)
        shutil.copytree(saved / f"zero{stage}", tmp_path / "ds")
        return next((tmp_path / "ds" / "global_step3").glob("*pp_rank_1_*optim_states.pt"))

    source = tmp_path / "ds"
    second = fresh()
    second.unlink()
    refused(r"one of \[2, 2\] partitions, 1 are here")
    second = fresh()
    second.with_name(second.name.replace("pp_rank_1", "pp_rank_0")).unlink()
    refused("lacks the optimizer file of rank 0")
    second = fresh()
    os.truncate(second, second.stat().st_size // 2)
    refused("is damaged")
    for stage in (1, 3):
        second = fresh(stage)
        tree = torch.load(second, weights_only=False)
        torch.save({**tree, "client": Stranger()}, second)
        refused(r"names the class \S*Stranger, which DeepSpeed's own checkpoints do not")
    second = fresh()
    tree = torch.load(second, weights_only=False)
    for state in tree["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        state["step"] += 1
    torch.save(tree, second)
    refused(r"counts \[3, 4\] optimizer steps")
    tree["optimizer_state_dict"]["base_optimizer_state"]["state"][0].pop("exp_avg_sq")
    torch.save(tree, second)
    refused(r"optimizer state \['exp_avg'\] for group 0; only Adam's is read")
    second = fresh()
    tree = torch.load(second, weights_only=False)
    tree["optimizer_state_dict"]["param_slice_mappings"][0].popitem()
    torch.save(tree, second)
    refused(r"holds \d+ of 15 elements of second.weight")
    second = fresh()
    first = next(second.parent.glob("*mp_rank_00_model_states.pt"))
    tree = torch.load(first, weights_only=False)
    torch.save({**tree, "module": {**tree["module"], "norm.mean": torch.ones(1)}, "buffer_names": ["norm.mean"]}, first)
    refused("holds the buffer norm.mean, for which we have no place")
    source = saved
    refused("holds no .* of DeepSpeed ZeRO")
    with pytest.raises(ValueError, match="is not empty; name a new run directory"):
        import_deepspeed(saved / "zero1", saved / "run1")
    with pytest.raises(ValueError, match="has no checkpoint to export"):
        export(saved / "zero1", tmp_path / "out", "deepspeed")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_goes_through_deepspeed_and_on(
    ranks: int, tiny_model: Path, chat_rows: Path, shipyard, on_ranks, tmp_path: Path
) -> None:
    """Two steps, out to a ZeRO-3 engine, saved by it, in again, two steps more: the run that nobody interrupted."""
    tree = {
        "method": "sft",
        "steps": 4,
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "data": {"train": str(chat_rows)},
        "batch": {"size": 8, "micro": 3},
        "optim": {"lr": 1e-3, "weight_decay": 0.1},
        "checkpoints": {"every_steps": 2, "keep_last": 10},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(tree))
    straight, back = tmp_path / "straight", tmp_path / "back"
    shipyard("train", tmp_path / "sft.yaml", f"run_dir={straight}")
    shipyard("export", committed(straight)[2], "--to", "deepspeed", "--out", tmp_path / "universal")
    on_ranks(ranks, SCRIPT, "pass", tiny_model, tmp_path / "universal", tmp_path / "ds")
    shipyard("export", tmp_path / "ds", "--to", "checkpoint", "--out", back)
    before, after = StoredFragments(committed(straight)[2]), StoredFragments(committed(back)[2])
    for part in PARTS:
        ours, theirs = before.whole(part), after.whole(part)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours), part
    done = shipyard("train", tmp_path / "sft.yaml", f"run_dir={back}")
    assert "going on after step 2" in done.stdout + done.stderr
    for part in PARTS:
        ours, theirs = (StoredFragments(committed(run)[4]).whole(part) for run in (straight, back))
        assert all(ours[name].equal(theirs[name]) for name in ours), part
