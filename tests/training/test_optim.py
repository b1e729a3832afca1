"""Schedules against closed forms, Muon against its definition and torch's own, and its state through a checkpoint."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from runs_for_tests import forget_after, recipe_and_run
from shipyard.training.init import kinds
from shipyard.training.loop import train
from shipyard.training.muon import UPDATE_RMS, Muon, newton_schulz
from shipyard.training.optim import build_optimizer, learning_rate, set_learning_rate
from shipyard.training.recipe import Optim, Recipe, load_recipe, parse_recipe
from shipyard.training.shard import StoredFragments
from torch import nn

STEPS, WARMUP, LR, FLOOR = 200, 20, 0.5, 0.1


@pytest.mark.parametrize(
    ("schedule", "closed_form"),
    [
        ("constant", lambda x: 1.0),
        ("linear", lambda x: 1 - (1 - FLOOR) * x),
        ("cosine", lambda x: FLOOR + (1 - FLOOR) * math.cos(math.pi * x / 2) ** 2),
        ("wsd", lambda x: min(1.0, 1 - (1 - FLOOR) * (x * 180 - 130) / 50)),  # the last quarter of 200 steps
    ],
)
def test_schedules_are_their_closed_forms(schedule: str, closed_form) -> None:
    optim = Optim(lr=LR, schedule=schedule, warmup_steps=WARMUP, decay_fraction=0.25, final_lr_fraction=FLOOR)  # type: ignore[arg-type]
    assert [learning_rate(optim, step, STEPS) for step in range(WARMUP)] == pytest.approx(
        [LR * (step + 1) / WARMUP for step in range(WARMUP)]
    )
    for step in range(WARMUP, STEPS + 1):
        wanted = LR * closed_form((step - WARMUP) / (STEPS - WARMUP))
        assert learning_rate(optim, step, STEPS) == pytest.approx(wanted), step


def test_wsd_never_decays_before_it_is_warm() -> None:
    optim = Optim(lr=1.0, schedule="wsd", warmup_steps=8, decay_fraction=1.0, final_lr_fraction=0.0)
    assert [learning_rate(optim, step, 10) for step in (7, 8, 9)] == pytest.approx([1.0, 1.0, 0.5])


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 16, 32)])
def test_newton_schulz_nears_the_orthogonal_factor(shape: tuple[int, ...]) -> None:
    """For a matrix U S V^T: singular values near one, and the singular vectors kept. Stacked matrices, each alone."""
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    found = newton_schulz(matrix, torch.float64)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.25
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    core = u.mT @ found @ vh.mT  # diagonal where the singular vectors are the same
    assert (core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-8
    if len(shape) == 3:
        assert found[1].allclose(newton_schulz(matrix[1], torch.float64))


def test_a_step_is_torchs_own_muon_and_adamw() -> None:
    """The peer: torch.optim.Muon with `match_rms_adamw`, which rounds to bf16 inside, and torch.optim.AdamW."""
    torch.manual_seed(0)
    ours = nn.ParameterList([nn.Parameter(torch.randn(32, 48)), nn.Parameter(torch.randn(48))])
    theirs = nn.ParameterList([nn.Parameter(parameter.detach().clone()) for parameter in ours])
    groups = [
        {"params": [ours[1]], "weight_decay": 0.0},
        {"params": [ours[0]], "weight_decay": 0.1, "muon": True},
    ]
    optimizer = Muon(groups, torch.bfloat16, lr=0.02)
    peers = (
        torch.optim.Muon([theirs[0]], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([theirs[1]], lr=0.02, weight_decay=0.0),
    )
    for step in range(5):
        for number in range(2):
            gradient = torch.randn_like(ours[number], requires_grad=False) * (step + 1)
            ours[number].grad, theirs[number].grad = gradient, gradient.clone()
        optimizer.step()
        for peer in peers:
            peer.step()
    assert ours[1].equal(theirs[1])
    moved = float((theirs[0] - ours[0]).detach().norm() / ours[0].detach().norm())
    assert moved < 2e-3, moved


def tiny(name: str, tmp_path: Path, **model: object) -> tuple[Recipe, nn.Module]:
    from shipyard.training.models import load_model

    shape = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    sections = {"name": "scratch", "shape": str(tmp_path / "shape.json"), "dtype": "float32", **model}
    tree = {"method": "sft", "steps": 1, "data": {"train": "x"}, "model": sections, "optim": {"name": name, "lr": 0.1}}
    recipe = parse_recipe(tree)
    return recipe, load_model(recipe.model, trains_all=True)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(tmp_path: Path) -> None:
    recipe, model = tiny("muon", tmp_path)
    optimizer = build_optimizer(recipe, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = {names[id(p)] for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    assert taken == {name for name, kind in kinds(model).items() if kind == "hidden"}
    assert len(taken) == 14
    assert not any("embed" in name or "lm_head" in name or "norm" in name for name in taken)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    for name in taken:  # the elements of an update are as large as AdamW's, whatever the matrix's shape
        moved = (model.get_parameter(name) - before[name]).square().mean().sqrt()
        assert float(moved.detach()) == pytest.approx(0.1 * UPDATE_RMS, rel=0.25), name


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"optim": {"name": "muon"}, "parallel": {"engine": "zero3"}}, ["optim.name", "zero3", "zero2"]),
        ({"optim": {"name": "muon"}, "lora": {"rank": 4}}, ["optim.name", "adapters", "adamw"]),
        ({"optim": {"z_loss": 0.1}, "method": "dpo"}, ["optim.z_loss", "dpo"]),
        ({"model": {"name": "m", "init": "mup"}, "lora": {"rank": 4}}, ["model.init", "adapters"]),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(tree: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        parse_recipe({"method": "sft", "steps": 1, "model": {"name": "m"}, "data": {"train": "x"}} | tree)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, tiny_model: Path, chat_rows: Path) -> tuple[Path, Path]:
    """A recipe with Muon, WSD and z-loss, and its run on one rank."""
    folder = tmp_path_factory.mktemp("muon")
    tree = {
        "method": "sft", "steps": 4, "model": {"name": str(tiny_model), "dtype": "float32"},
        "data": {"train": str(chat_rows)}, "batch": {"size": 8, "micro": 3}, "checkpoints": {"every_steps": 2},
        "optim": {"name": "muon", "lr": 1e-3, "weight_decay": 0.1, "z_loss": 1e-2, "schedule": "wsd"},
    }  # fmt: skip
    return recipe_and_run(folder, tree)


PARTS = ("value", "momentum_buffer", "exp_avg", "exp_avg_sq")


@pytest.mark.parametrize(
    ("engine", "ranks"),
    [("fsdp2", 2), ("zero2", 3), *(pytest.param(engine, 2, marks=pytest.mark.slow) for engine in ("ddp", "zero1"))],
)
def test_muon_and_z_loss_on_ranks(
    engine: str, ranks: int, one_rank: tuple[Path, Path], shipyard, tmp_path: Path
) -> None:
    """Loss, both its terms, weights and momentum equal one rank's, whose micro-batches were others. Three ranks of
    ZeRO cut through matrices."""
    recipe, one = one_rank
    two = tmp_path / "two"
    shipyard("train", recipe, f"run_dir={two}", "batch.micro=2", f"parallel.engine={engine}", ranks=ranks)
    logs = [[json.loads(line) for line in (run / "log.jsonl").open()] for run in (one, two)]
    for step, other in zip(*logs, strict=True):
        for key in ("loss", "z_loss", "grad_norm"):
            assert step[key] == pytest.approx(other[key], rel=1e-6), key
    assert logs[0][0]["z_loss"] > 1e-3
    stored = [StoredFragments(run / "step-000004") for run in (one, two)]
    assert set(stored[1].ranges["model.layers.0.mlp.up_proj.weight"]) == {"value", "momentum_buffer"}
    for part in PARTS:
        ours, theirs = (fragments.whole(part) for fragments in stored)
        assert ours.keys() == theirs.keys()
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-6, part


def test_muon_resumes_to_the_same_bits(one_rank: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, one = one_rank
    again = tmp_path / "again"
    shutil.copytree(one, again)
    forget_after(again, 2)
    train(load_recipe(recipe, [f"run_dir={again}"]))
    straight, resumed = (StoredFragments(run / "step-000004") for run in (one, again))
    for part in PARTS:
        ours, theirs = straight.whole(part), resumed.whole(part)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours), part


@pytest.mark.slow
def test_muon_under_zero_goes_on_from_pieces_of_another_number_of_ranks(
    one_rank: tuple[Path, Path], shipyard, tmp_path: Path
) -> None:
    recipe, two = one_rank[0], tmp_path / "two"
    shipyard("train", recipe, f"run_dir={two}", "batch.micro=2", "parallel.engine=zero2", ranks=3)
    for engine, ranks in (("zero1", 2), ("zero2", 3)):
        other = tmp_path / engine
        shutil.copytree(two, other)
        forget_after(other, 2)
        done = shipyard("train", recipe, f"run_dir={other}", "batch.micro=2", f"parallel.engine={engine}", ranks=ranks)
        assert "going on after step 2" in done.stdout
        before, after = (StoredFragments(run / "step-000004") for run in (two, other))
        for part in PARTS:
            whole, again = before.whole(part), after.whole(part)
            worst = max(float((whole[name] - again[name]).abs().max()) for name in whole)
            assert worst < (1e-6 if ranks == 2 else 1e-12), part
