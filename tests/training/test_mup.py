"""The coordinate check of muP (Yang et al. 2022, appendix D.1): what a few steps change does not depend on width."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from shipyard.training.init import initialise, kinds
from shipyard.training.models import load_model
from shipyard.training.optim import build_optimizer, set_learning_rate
from shipyard.training.recipe import parse_recipe
from shipyard.training.shard import StoredFragments

BASE, WIDE, LR = 64, 256, 1e-2


def recipe_of(tmp_path: Path, width: int, init: str, optimizer: str = "adamw", family: str = "llama", tied=False):
    shape = {
        "model_type": family, "vocab_size": 128, "hidden_size": width, "num_hidden_layers": 2,
        "num_attention_heads": width // 16, "max_position_embeddings": 64, "tie_word_embeddings": tied,
    }  # fmt: skip
    if family == "llama":
        shape |= {"intermediate_size": 2 * width, "head_dim": 16, "num_key_value_heads": width // 16}
    path = tmp_path / f"{family}-{width}.json"
    path.write_text(json.dumps(shape))
    model = {"name": "scratch", "shape": str(path), "dtype": "float32", "init": init, "mup_base_width": BASE}
    optim = {"name": optimizer, "lr": LR, "weight_decay": 0.1}
    return parse_recipe({"method": "sft", "steps": 1, "data": {"train": "x"}, "model": model, "optim": optim})


def change_after_steps(recipe, steps: int = 4) -> tuple[float, float]:
    """Root mean square of what `steps` steps change in the last hidden state and in the logits."""
    model = load_model(recipe.model, trains_all=True, seed=1)
    optimizer = build_optimizer(recipe, model)
    ids_BT = torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(0))
    first, last = None, None
    for step in range(steps + 1):
        out = model(input_ids=ids_BT, output_hidden_states=True, use_cache=False)
        last = (out.hidden_states[-2].detach(), out.logits.detach())
        first = first or last
        if step < steps:
            optimizer.zero_grad()
            F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
            set_learning_rate(optimizer, LR)
            optimizer.step()
    assert first is not None
    assert last is not None
    hidden, logits = (float((b - a).square().mean().sqrt()) for a, b in zip(first, last, strict=True))
    return hidden, logits


@pytest.mark.parametrize(("optimizer", "family"), [("adamw", "llama"), ("adamw", "gpt2"), ("muon", "llama")])
def test_coordinates_keep_their_size_when_the_model_widens(optimizer: str, family: str, tmp_path: Path) -> None:
    growth = {}
    for init in ("mup", "scaled"):
        narrow, wide = (change_after_steps(recipe_of(tmp_path, w, init, optimizer, family)) for w in (BASE, WIDE))
        growth[init] = [after / before for before, after in zip(narrow, wide, strict=True)]
    assert all(0.5 < ratio < 1.5 for ratio in growth["mup"]), growth
    assert all(ratio > 1.8 for ratio in growth["scaled"]), growth  # else the check could not see a missing rule


def test_at_the_base_width_both_are_one(tmp_path: Path) -> None:
    plain, mup = (load_model(recipe_of(tmp_path, BASE, init).model, trains_all=True) for init in ("scaled", "mup"))
    assert all(a.equal(b) for a, b in zip(plain.parameters(), mup.parameters(), strict=True))
    groups = build_optimizer(recipe_of(tmp_path, BASE, "mup"), mup).param_groups
    assert {group["lr"] for group in groups} == {LR}


def test_factors_of_each_kind(tmp_path: Path) -> None:
    """Standard deviations and learning rates of table 3, at four times the base width; decay per step stays."""
    recipe = recipe_of(tmp_path, WIDE, "mup")
    model = load_model(recipe.model, trains_all=True)
    factors = {id(p): group for group in build_optimizer(recipe, model).param_groups for p in group["params"]}
    for name, kind in kinds(model).items():
        parameter = model.get_parameter(name)
        group = factors[id(parameter)]
        factor = {"input": 1.0, "vector": 1.0, "hidden": 0.25, "output": 0.25}[kind]
        assert group["lr"] == pytest.approx(LR * factor), name
        assert group["lr"] * group["weight_decay"] == pytest.approx(0.0 if kind == "vector" else LR * 0.1), name
        if kind != "vector":
            std = 0.02 * {"input": 1.0, "hidden": 0.5, "output": 0.25}[kind]
            std /= 2 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1  # sqrt(2 layers)
            assert float(parameter.std().detach()) == pytest.approx(std, rel=0.03), name


def test_values_depend_on_seed_and_name_alone(tmp_path: Path) -> None:
    model, other = (load_model(recipe_of(tmp_path, BASE, "scaled").model, trains_all=True, seed=s) for s in (1, 2))
    first = model.get_parameter("model.layers.0.mlp.up_proj.weight").detach().clone()
    assert not first.equal(other.get_parameter("model.layers.0.mlp.up_proj.weight"))
    assert not first.equal(model.get_parameter("model.layers.1.mlp.up_proj.weight"))
    torch.randn(10)
    initialise(other, recipe_of(tmp_path, BASE, "scaled").model, 1)
    assert first.equal(other.get_parameter("model.layers.0.mlp.up_proj.weight"))


def test_tied_heads_are_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.init: mup .* tie_word_embeddings: false, or use init: scaled"):
        load_model(recipe_of(tmp_path, BASE, "mup", tied=True).model, trains_all=True)


@pytest.mark.parametrize(
    "engine", ["zero2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2", "zero3"))]
)
def test_rates_survive_every_engine(engine: str, tiny_model: Path, chat_rows: Path, shipyard, tmp_path: Path) -> None:
    """Two ranks, whose engine makes groups of its own, against one: the same weights after three steps."""
    from shipyard.training.loop import train
    from shipyard.training.recipe import load_recipe

    shape = json.loads((tiny_model / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    model = {"name": "scratch", "shape": str(tmp_path / "shape.json"), "tokenizer": str(tiny_model)}
    tree = {
        "method": "sft", "steps": 3, "data": {"train": str(chat_rows)}, "batch": {"size": 8, "micro": 3},
        "model": {**model, "dtype": "float32", "init": "mup", "mup_base_width": 16}, "optim": {"lr": 1e-3},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    one, two = tmp_path / "one", tmp_path / "two"
    train(load_recipe(tmp_path / "r.yaml", [f"run_dir={one}"]))
    shipyard("train", tmp_path / "r.yaml", f"run_dir={two}", f"parallel.engine={engine}", ranks=2)
    ours, theirs = (StoredFragments(run / "step-000003").whole() for run in (one, two))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-6
    start = load_model(load_recipe(tmp_path / "r.yaml").model, trains_all=True, seed=17)
    moved = {name: float((ours[name] - start.get_parameter(name)).abs().max().detach()) for name in ours}
    hidden, embedding = moved["model.layers.0.mlp.up_proj.weight"], moved["model.embed_tokens.weight"]
    assert hidden == pytest.approx(embedding / 4, rel=0.3)  # four times the base width
