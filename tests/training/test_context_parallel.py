"""Context parallel: ranks that share rows train as one does, documents that cross a cut stay whole and apart, and
checkpoints pass to and from other cuts."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from runs_for_tests import forget_after
from shipyard.evals import lattice
from shipyard.evals.invariance import Compared, compare, read_run
from shipyard.evals.lattice import Cell
from shipyard.evals.lattice_inputs import write_inputs
from shipyard.evals.lattice_ranks import Outcome, train_all
from shipyard.training import context_parallel
from shipyard.training.batches import MicroBatch, collate
from shipyard.training.context_parallel import Neighbours, Part, part_of
from shipyard.training.dataset import Sample
from shipyard.training.loop import train
from shipyard.training.mesh import device_mesh
from shipyard.training.packing import collate_rows
from shipyard.training.ranks import Ranks
from shipyard.training.recipe import Parallel, parse_recipe

KEPT = {"every_steps": 1, "keep_last": 10, "background": False}
WHOLE = {"engine": "ddp", "context": 1}


def tree(inputs: Path, run: str, method: str = "sft", model: str = "tiny", **parallel: object) -> dict:
    """Five steps, rows packed in micro-batches of three, of a global batch of eight."""
    cell = Cell(method, "ddp", 1, 3, True, "none", False)
    found = lattice.recipe_tree(cell, inputs, inputs / "runs" / run)
    found["model"]["name"] = str(inputs / model)
    return {**found, "checkpoints": KEPT, "parallel": {**found["parallel"], **parallel}}


def compared(outcome: Outcome, reference: Path) -> Compared:
    return compare(Cell("sft", "ddp", 2, 3, True, "none", False), outcome, read_run(reference))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("context")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def one_rank(inputs: Path) -> dict[str, Path]:
    """What one rank makes of each job."""
    return {method: train(parse_recipe(tree(inputs, f"{method}-one", method))) for method in ("sft", "pretrain")}


@pytest.fixture(scope="module")
def two_ranks(inputs: Path, one_rank: dict[str, Path]) -> dict[str, Outcome]:
    """Each job on two ranks that share its rows; "resumed" goes on from the second step of one rank."""
    resumed = tree(inputs, "resumed", engine="fsdp2", context=2) | {"resume": "auto"}
    shutil.copytree(one_rank["sft"], resumed["run_dir"])
    forget_after(Path(resumed["run_dir"]), 2)
    jobs = {
        "sft": tree(inputs, "sft-ddp", engine="ddp", context=2),
        "pretrain": tree(inputs, "pretrain-fsdp2", "pretrain", engine="fsdp2", context=2),
        "resumed": resumed,
    }
    return dict(zip(jobs, train_all(list(jobs.values()), 2, inputs), strict=True))


@pytest.mark.parametrize("method", ["sft", "pretrain"])
def test_two_ranks_that_share_rows_equal_one(method: str, one_rank, two_ranks) -> None:
    """Losses, gradient norms and weights, for ragged packed rows under DDP and rows of one width under FSDP2."""
    found = compared(two_ranks[method], one_rank[method])
    assert found.passed, found


def test_checkpoints_pass_to_ranks_that_share_rows_and_back(inputs: Path, one_rank, two_ranks) -> None:
    """Two steps on one rank, two on two ranks that share rows, the last on one."""
    run = two_ranks["resumed"].run_dir
    assert compared(two_ranks["resumed"], one_rank["sft"]).passed, two_ranks["resumed"].error
    forget_after(run, 4)
    train(parse_recipe(tree(inputs, run.name) | {"resume": "auto"}))
    assert compared(Outcome(run, 0.0), one_rank["sft"]).passed


def sample(first: int, length: int) -> Sample:
    mask = np.arange(length) >= 1 + first % 3
    return Sample(str(first), np.arange(first, first + length, dtype=np.int32), mask)


def layouts() -> Iterator[MicroBatch]:
    documents = [sample(100 * number, length) for number, length in enumerate((7, 2, 19, 3, 5))]
    yield collate(documents, packing=True)
    yield collate(documents, packing=False)
    yield collate([], packing=True)
    rows = [[item.ids for item in documents[:2]], [documents[2].ids]]
    yield collate_rows(rows, 21, micro=3)


def parts(whole: MicroBatch, size: int) -> list[Part]:
    found = []
    for place in range(size):
        with context_parallel.sharing(Neighbours(None, size, place)):
            part = part_of(whole)
            assert part is not None
            found.append(part)
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_parts_of_rows_hold_every_target_once_beside_its_own_token(size: int) -> None:
    """Where the token before a target lies on another rank, or the target does, nothing is lost or seen twice."""
    for whole in layouts():
        cut = parts(whole, size)
        together = torch.cat([part.mine_M for part in cut])
        assert sorted(together.tolist()) == list(range(len(whole.targets_N)))
        assert len({part.batch.ids_BT.shape for part in cut}) == 1, "all ranks have the same work"
        for part in cut:
            for field in ("ids_BT", "positions_BT"):
                here, there = predicting(part.batch, field), predicting(whole, field)[part.mine_M]
                assert here.tolist() == there.tolist()
            assert part.batch.targets_N.tolist() == whole.targets_N[part.mine_M].tolist()
            assert part.batch.weights_N.tolist() == whole.weights_N[part.mine_M].tolist()
        assert sum(int(part.batch.real_BT.sum()) for part in cut) == int(whole.real_BT.sum())


def predicting(batch: MicroBatch, field: str) -> torch.Tensor:
    """A field at the tokens that predict a target, (N,)."""
    kept = getattr(batch, field)[:, batch.keep_K].reshape(-1)
    return kept[batch.select_N]


def test_a_document_that_crosses_cuts_keeps_its_keys() -> None:
    """Seven tokens, then 21: of four chunks of seven, the first is a document, the others are parts of one."""
    whole = collate([sample(0, 7), sample(100, 21)], packing=True)
    outer, inner = parts(whole, 2)
    seen = [
        [(stretch.document, stretch.queries, stretch.keys) for stretch in p.attention.rows[0].stretches]
        for p in (outer, inner)
    ]
    assert seen == [[(0, 7, 7), (1, 7, 21)], [(1, 7, 7), (1, 7, 14)]]


def refusal(sections: dict) -> str:
    small = {"method": "sft", "steps": 1, "model": {"name": "m"}, "data": {"train": "x"}}
    with pytest.raises(ValueError) as caught:
        parse_recipe({**small, **sections})
    return str(caught.value)


def test_what_does_not_hold_is_refused_in_a_line(tiny_model: Path) -> None:
    assert "fsdp2" in refusal({"parallel": {"engine": "zero2", "context": 2}})
    assert "deterministic: off" in refusal({"parallel": {"context": 2}, "deterministic": "elastic"})
    words = refusal({"parallel": {"context": 2}, "model": {"name": "m", "kernels": "triton"}})
    assert "model.kernels: auto" in words
    three = Ranks(0, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"parallel\.context: 2 ranks share each row, but 3 are no multiple.*start 4"):
        device_mesh(three, Parallel(context=2))
    with pytest.raises(ValueError, match=r"parallel\.tensor 2: 4 together"):
        device_mesh(three, Parallel(engine="fsdp2", context=2, tensor=2))


OTHER_MODELS = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 24},
    "deepseek_v3": {
        "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
        "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    },
}  # fmt: skip


def write_other_models(inputs: Path) -> None:
    """Learned positions, a sliding window, latent attention with experts: each with the tiny model's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "pad_token_id": 0}
    for name, config in OTHER_MODELS.items():
        torch.manual_seed(0)
        common = {"bos_token_id": 0, "eos_token_id": 2, **({"vocab_size": 264} if name == "gpt2" else sizes)}
        AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **common, **config)).save_pretrained(inputs / name)
        for file in (*(inputs / "tiny").glob("tokenizer*"), *(inputs / "tiny").glob("chat_template*")):
            shutil.copy(file, inputs / name)


def run_all(jobs: Sequence[tuple[str, str, dict]], world: int, inputs: Path) -> None:
    """Each (method, model, parallel section) on `world` ranks must equal one rank."""
    wanted = {(method, model): tree(inputs, f"{method}-{model}-one", method, model) for method, model, _ in jobs}
    references = dict(zip(wanted, train_all(list(wanted.values()), 1, inputs), strict=True))
    trees = [
        tree(inputs, f"{world}-{number}", method, model, **how) for number, (method, model, how) in enumerate(jobs)
    ]
    for (method, model, how), outcome in zip(jobs, train_all(trees, world, inputs), strict=True):
        found = compared(outcome, references[method, model].run_dir)
        assert found.passed, (method, model, how, found)


@pytest.mark.slow
def test_every_method_and_kind_of_model_on_two_ranks(inputs: Path) -> None:
    write_other_models(inputs)
    ways = ({"engine": "ddp", "context": 2}, {"engine": "fsdp2", "context": 2})
    jobs = [(method, "tiny", way) for method in ("sft", "dpo", "pretrain") for way in ways]
    jobs += [("grpo", "tiny", ways[0]), *(("sft", model, way) for model in OTHER_MODELS for way in ways)]
    run_all(jobs, 2, inputs)


@pytest.mark.slow
def test_two_groups_of_two_and_one_of_four(inputs: Path) -> None:
    ways = (
        {"engine": "ddp", "context": 2},
        {"engine": "fsdp2", "context": 2},
        {"engine": "ddp", "context": 4},
        {"engine": "fsdp2", "context": 2, "tensor": 2},
    )
    run_all([(method, "tiny", way) for method in ("sft", "pretrain") for way in ways], 4, inputs)
