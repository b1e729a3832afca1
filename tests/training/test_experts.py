"""Mixture of experts: loads become even, from the counts of the global batch alone, whatever the cut."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs_for_tests import forget_after, recipe_and_run
from safetensors.torch import load_file
from shipyard.training import experts
from shipyard.training.deepspeed_files import export_deepspeed
from shipyard.training.loop import train
from shipyard.training.models import load_model
from shipyard.training.ranks import Ranks
from shipyard.training.recipe import Model, load_recipe
from shipyard.training.shard import StoredFragments

SHAPE = {
    "model_type": "deepseek_v3", "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64,
    "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("experts") / "deepseek.json"
    path.write_text(json.dumps(SHAPE))
    return path


def loads(shape: Path, learn: bool) -> list[float]:
    """The busiest expert's load over the mean, in eighty steps from a router that favours two of eight experts."""
    model = load_model(Model(name="scratch", shape=str(shape), dtype="float32"), trains_all=True)
    ((_, router),) = experts.routers(model)
    router.e_score_correction_bias[:2] = 0.06  # the spread of this router's scores
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for step in range(80):
        generator = torch.Generator().manual_seed(step)
        ids_T = [torch.randint(0, 384, (8,), generator=generator)]
        for _ in range(31):  # a language: each word is followed by one of three
            ids_T.append((ids_T[-1] * 7 + torch.randint(0, 3, (8,), generator=generator)) % 384)
        ids_BT = torch.stack(ids_T, 1)
        with experts.counting(torch.ones_like(ids_BT, dtype=torch.bool)):
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(experts.balance(model, ONE, learn)["busiest_expert"])
    return found


def test_loads_become_even(shape: Path) -> None:
    balanced, left_alone = (loads(shape, learn) for learn in (True, False))
    assert balanced[0] == left_alone[0] > 2.0
    assert sum(balanced[-10:]) / 10 < 1.35, balanced
    assert sum(left_alone[-10:]) / 10 > 2.0, left_alone


def test_an_update_is_the_sign_of_the_error_and_a_step_not_taken_is_none(shape: Path) -> None:
    model = load_model(Model(name="scratch", shape=str(shape), dtype="float32"), trains_all=True)
    ((_, router),) = experts.routers(model)
    counts = torch.tensor([5, 0, 2, 2, 2, 3, 1, 1])
    router.tokens_of_experts = counts.clone()
    assert experts.balance(model, ONE, learn=True) == {"busiest_expert": 2.5}
    assert router.e_score_correction_bias.tolist() == pytest.approx([-1e-3, 1e-3, 0, 0, 0, -1e-3, 1e-3, 1e-3])
    router.tokens_of_experts = counts.clone()
    before = router.e_score_correction_bias.clone()
    experts.balance(model, ONE, learn=False)
    assert router.e_score_correction_bias.equal(before)
    assert experts.balance(model, ONE, learn=True) == {}  # nothing was counted since


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, shape: Path, tiny_model: Path, chat_rows: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("moe")
    tree = {
        "method": "sft", "steps": 4, "data": {"train": str(chat_rows)}, "batch": {"size": 8, "micro": 3},
        "model": {"name": "scratch", "shape": str(shape), "tokenizer": str(tiny_model), "dtype": "float32"},
        "optim": {"lr": 1e-3, "weight_decay": 0.1}, "checkpoints": {"every_steps": 2},
    }  # fmt: skip
    return recipe_and_run(folder, tree)


def biases(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "step-000004" / "method.safetensors")


def assert_same(run: Path, reference: Path) -> None:
    ours, wanted = biases(run), biases(reference)
    assert list(ours) == list(wanted) == ["router/model.layers.1.mlp.gate"]
    assert all(bias.count_nonzero() > 2 for bias in wanted.values())
    assert all(ours[name].equal(wanted[name]) for name in wanted), (ours, wanted)
    weights, others = (StoredFragments(path / "step-000004").whole() for path in (run, reference))
    assert max(float((weights[name] - others[name]).abs().max()) for name in others) < 2e-6


@pytest.mark.parametrize(
    "cut",
    [
        ["batch.micro=8"],
        ["batch.micro=5", "batch.packing=false"],  # padding is not counted
        ["model.activation_checkpointing=full"],  # nor what is computed twice
    ],
)
def test_biases_do_not_depend_on_the_cut(cut: list[str], one_rank: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, reference = one_rank
    train(load_recipe(recipe, [f"run_dir={tmp_path / 'run'}", *cut]))
    assert_same(tmp_path / "run", reference)


@pytest.mark.parametrize(
    "engine",
    ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2", "zero1", "zero2", "zero3"))],
)
def test_nor_on_the_number_of_ranks(engine: str, one_rank: tuple[Path, Path], shipyard, tmp_path: Path) -> None:
    recipe, reference = one_rank
    shipyard("train", recipe, f"run_dir={tmp_path / 'two'}", f"parallel.engine={engine}", ranks=2)
    assert_same(tmp_path / "two", reference)
    exported = load_file(tmp_path / "two" / "model" / "model.safetensors")
    assert exported["model.layers.1.mlp.gate.e_score_correction_bias"].equal(*biases(reference).values())


def test_biases_are_saved_restored_and_exported_in_fp32(one_rank: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, reference = one_rank
    again = tmp_path / "again"
    shutil.copytree(reference, again)
    forget_after(again, 2)
    train(load_recipe(recipe, [f"run_dir={again}"]))
    ours, wanted = (StoredFragments(run / "step-000004").whole() for run in (again, reference))
    assert all(ours[name].equal(wanted[name]) for name in wanted)
    assert_same(again, reference)

    narrow = tmp_path / "bf16"
    train(load_recipe(recipe, [f"run_dir={narrow}", "model.dtype=bfloat16"]))
    exported = load_file(narrow / "model" / "model.safetensors")
    assert exported["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    assert exported["model.layers.1.mlp.gate.e_score_correction_bias"].equal(*biases(narrow).values())


def test_deepspeed_gets_the_biases_by_the_names_that_a_model_has(one_rank: tuple[Path, Path], tmp_path: Path) -> None:
    """And with them alone nothing else that a run keeps beside its weights."""
    _, reference = one_rank
    (file,) = export_deepspeed(reference, tmp_path / "out").glob("*/mp_rank_00_model_states.pt")
    states, exported = torch.load(file, weights_only=True), load_file(reference / "model" / "model.safetensors")
    assert states["buffer_names"] == ["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert all(exported[name].equal(states["module"][name]) for name in states["buffer_names"])
    assert experts.state_of_buffers(experts.buffers_of_state(biases(reference))).keys() == biases(reference).keys()
