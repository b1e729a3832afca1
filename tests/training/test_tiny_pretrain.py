"""From raw text to a model: launch/recipes/tiny-pretrain.yaml, made small enough for every run of the tests."""

import json
import re
from pathlib import Path

import pytest
from shipyard.evals.tasks import evaluate
from shipyard.launch.assets import resolve
from shipyard.launch.workers import runner
from shipyard.training import preparation
from shipyard.training.manifest import new_directory
from shipyard.training.models import load_model, load_tokenizer
from shipyard.training.recipe import Model, load_recipe
from shipyard.training.rollout import generate
from shipyard.training.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "launch/recipes/tiny-pretrain.yaml"


def test_tokenizer_shards_two_ranks_bits_per_byte_and_text(tmp_path: Path, shipyard) -> None:
    addresses = tmp_path / "addresses"
    addresses.mkdir()
    for path in sorted(resolve("asset:sotu").glob("*.txt"))[:40]:
        (addresses / path.name).write_text(path.read_text(encoding="utf-8")[:12_000], encoding="utf-8")
    shape = json.loads((ROOT / "launch/shapes/tiny-llama.json").read_text())
    shape |= {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "head_dim": 32}
    shape |= {"num_attention_heads": 2, "vocab_size": 512}
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    overrides = [
        f"run_dir={tmp_path / 'run'}", f"model.tokenizer={tmp_path / 'tokenizer'}", f"data.train={addresses}",
        f"model.shape={tmp_path / 'shape.json'}", f"data.tokens={tmp_path / 'tokens'}", "data.validation_fraction=0.1",
        "data.max_tokens=96", "batch.size=8", "batch.micro=4", "steps=60", "optim.lr=6e-3", "optim.warmup_steps=5",
        "checkpoints.every_steps=0",
    ]  # fmt: skip
    recipe = load_recipe(RECIPE, overrides)
    train_tokenizer(recipe, 512)
    preparation.build(recipe, runner("local", 1), lambda text: None)
    done = shipyard("train", RECIPE, *overrides, ranks=2, timeout_s=600)
    assert "zero2 on 2 ranks" in done.stdout
    result = evaluate(tmp_path / "run", recipe)
    grams = [float(number) for number in re.findall(r"5-gram over \w+ ([\d.]+)", result.note)]
    assert len(grams) == 2
    assert all(1 < bits < 4 for bits in grams)
    untrained = 9 / 2.2  # log2(512) bits a token, and at least that many bytes in one
    assert 1 < result.value < 0.85 * untrained
    assert result.low < result.value < result.high
    named = Model(name=str(tmp_path / "run"))
    tokenizer = load_tokenizer(named)
    prompt = tokenizer("The people of the United States")["input_ids"]
    ((reply,),) = generate(load_model(named, trains_all=False), [prompt], 12, frozenset({tokenizer.eos_token_id}))
    assert len(reply.ids) > 0
    assert isinstance(tokenizer.decode(reply.ids), str)


def test_the_tokenizer_is_learned_from_what_is_trained_on(tmp_path: Path, tiny_model: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"number{n} " * 20}) + "\n" for n in range(60)))
    base = [f"model.tokenizer={tmp_path / 'a'}", f"data.train={rows}", f"data.tokens={tmp_path / 'tokens'}"]
    path = train_tokenizer(load_recipe(RECIPE, [*base, "data.validation_fraction=0.5"]), 300)
    again = train_tokenizer(load_recipe(RECIPE, [*base, f"model.tokenizer={tmp_path / 'b'}"]), 300)
    assert (path / "tokenizer.json").read_bytes() != (again / "tokenizer.json").read_bytes()
    third = [*base, f"model.tokenizer={tmp_path / 'c'}"]
    train_tokenizer(load_recipe(RECIPE, third), 300)
    assert (again / "tokenizer.json").read_bytes() == (tmp_path / "c" / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="size: 100"):
        train_tokenizer(load_recipe(RECIPE, third), 100)
    with new_directory(tmp_path / "trained", {"kind": "model"}) as scratch:
        (scratch / "model.safetensors").write_bytes(b"a week of training")
    for mine in (tiny_model, tmp_path / "trained"):
        with pytest.raises(ValueError, match="not of this command's making"):
            train_tokenizer(load_recipe(RECIPE, [*base, f"model.tokenizer={mine}"]), 300)
