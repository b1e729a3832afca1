"""One global batch, every cut of it: the same loss, gradient norm and weights, through the command line.

`shipyard verify invariance --cells short` runs as a user runs it: every method under every engine that takes it, on two
ranks. Beside it one job through `shipyard train`: 22 rows in batches of 8, micro-batches of 3: accumulation, a ragged
last window (6 rows), ranks with an empty micro-batch, and rows of very different lengths.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from shipyard.evals import invariance, lattice, lattice_ranks
from shipyard.evals.lattice_inputs import write_inputs
from shipyard.evals.lattice_ranks import train_all
from shipyard.launch.cli import run_command
from shipyard.training.shard import StoredFragments

TOLERANCE = 1e-6


def recipe_file(path: Path, tiny_model: Path, rows: Path, **sections: object) -> Path:
    tree = {
        "method": "sft",
        "epochs": 1,
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "data": {"train": str(rows)},
        "batch": {"size": 8, "micro": 3},
        "optim": {"lr": 1e-3, "eps": 1e-6, "weight_decay": 0.1},  # below epsilon, Adam makes steps of rounding errors
    }
    path.write_text(yaml.safe_dump({**tree, **sections}))
    return path


def outcome(run: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Logged steps, and the weights of the last checkpoint."""
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return steps, StoredFragments(max(run.glob("step-*"))).whole()


def assert_same(run: Path, reference: Path, tolerance: float = TOLERANCE) -> None:
    (steps, weights), (wanted_steps, wanted) = outcome(run), outcome(reference)
    assert len(steps) == len(wanted_steps) > 0
    for step, want in zip(steps, wanted_steps, strict=True):
        assert step["loss"] == pytest.approx(want["loss"], rel=tolerance, abs=tolerance)
        assert step["grad_norm"] == pytest.approx(want["grad_norm"], rel=tolerance, abs=tolerance)
    assert weights.keys() == wanted.keys()
    worst = max(float((weights[name] - wanted[name]).abs().max()) for name in wanted)
    assert worst <= tolerance, f"weights differ by {worst:.1e}"


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, tiny_model, chat_rows, shipyard) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("invariance")
    recipe = recipe_file(folder / "sft.yaml", tiny_model, chat_rows)
    shipyard("train", recipe, f"run_dir={folder / 'one'}")
    return recipe, folder / "one"


@pytest.fixture(scope="module")
def short(tmp_path_factory, shipyard) -> Path:
    """Where the short lattice left its certificate and its page."""
    folder = tmp_path_factory.mktemp("lattice")
    done = shipyard("verify", "invariance", "--short", "--out", folder, timeout_s=1800, check=False)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return folder


def test_two_ranks_equal_one(one_rank: tuple[Path, Path], shipyard, tmp_path: Path) -> None:
    recipe, reference = one_rank
    engine = "zero3"
    done = shipyard("train", recipe, f"run_dir={tmp_path / 'two'}", f"parallel.engine={engine}", ranks=2)
    assert f"{engine} on 2 ranks" in done.stdout
    assert_same(tmp_path / "two", reference)


def test_micro_batches_padding_and_checkpointing_do_not_matter(one_rank, tmp_path: Path) -> None:
    """In this process: the cut knobs change the work, not the result."""
    from shipyard.training.loop import train
    from shipyard.training.recipe import load_recipe

    recipe, reference = one_rank
    for number, cut in enumerate((["batch.micro=8"], ["batch.packing=false", "model.activation_checkpointing=full"])):
        run = tmp_path / str(number)
        train(load_recipe(recipe, [f"run_dir={run}", *cut]))
        assert_same(run, reference)


def test_recomputing_keeps_the_bits_of_elastic_runs_with_adapters(one_rank, tmp_path: Path) -> None:
    from shipyard.training.loop import train
    from shipyard.training.recipe import load_recipe

    runs = []
    for kind in ("none", "selective", "full"):
        knobs = ["deterministic=elastic", "lora.rank=4", f"model.activation_checkpointing={kind}", "optim.lr=1e-2"]
        runs.append(outcome(train(load_recipe(one_rank[0], [f"run_dir={tmp_path / kind}", *knobs])))[1])
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], weight) for name, weight in other.items())


def test_a_loss_averaged_in_micro_batches_would_fail_here(one_rank, tmp_path: Path, monkeypatch) -> None:
    """The comparison can see the field's usual mistake: averages of averages."""
    from shipyard.training import sft
    from shipyard.training.loop import train
    from shipyard.training.loss import nll_sum
    from shipyard.training.recipe import load_recipe

    recipe, reference = one_rank
    rounds = 3
    wrong = lambda logp, weights: nll_sum(logp, weights) / max(1.0, float(weights.sum())) * 300 / rounds
    monkeypatch.setattr(sft, "nll_sum", wrong)
    train(load_recipe(recipe, [f"run_dir={tmp_path / 'wrong'}"]))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "wrong", reference, tolerance=1e-2)


def test_the_short_lattice_holds(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certificate = json.loads((short / "invariance-certificate.json").read_text())
    cells = certificate["cells"]
    assert certificate["passed"], certificate["failures"]
    ran = {(cell["method"], cell["engine"]) for cell in cells if cell["world"] == 2 and cell["dtype"] == "float32"}
    assert ran >= {(method, engine) for method in lattice.METHODS for engine in ("ddp", "zero2", "elastic")}
    assert ran >= {("sft", engine) for engine in lattice.ENGINES}
    assert {cell["engine"] for cell in cells if cell["dtype"] == "bfloat16"} >= {"ddp", "fsdp2", "zero2", "zero3"}
    differ = [max(cell["loss"], cell["grad_norm"], cell["weights"]) for cell in cells if cell["dtype"] == "float32"]
    assert 0 < max(differ) <= TOLERANCE
    assert min(cell["beyond_bf16"] for cell in cells) > 0.9
    assert [group["worlds"] for group in certificate["elastic"]["hashes"]] == [[1, 2]] * 4
    assert all("; " in entry["reason"] or "use" in entry["reason"] for entry in certificate["refused"])
    assert "| fsdp2+tensor |" in (short / "invariance.md").read_text()
    assert "| fsdp2+context |" in (short / "invariance.md").read_text()
    assert run_command(["verify", str(short)]) == 0
    assert "invariance lattice, short" in capsys.readouterr().out


def test_a_certificate_that_its_own_numbers_refute_is_refused(short: Path, tmp_path: Path) -> None:
    tree = json.loads((short / "invariance-certificate.json").read_text())
    spoilt = [
        {**tree, "cells": [{**tree["cells"][0], "weights": 1e-5}]},
        {**tree, "cells": []},
        {**tree, "elastic": {**tree["elastic"], "hashes": [{"name": "x", "sha256": ["a", "b"]}]}},
        {**tree, "passed": False},
    ]
    for wrong in spoilt:
        (tmp_path / "invariance-certificate.json").write_text(json.dumps(wrong))
        assert run_command(["verify", str(tmp_path)]) == 1


def test_a_few_cells_hold_every_pair_of_values(tmp_path: Path) -> None:
    allowed = [cell for cell in lattice.product() if lattice.refusal(cell, tmp_path) is None]
    chosen = lattice.pairwise(allowed)
    pairs = [{pair for cell in cells for pair in lattice.pairs(cell)} for cells in (allowed, chosen)]
    assert pairs[0] == pairs[1]
    assert len(chosen) < len(allowed) / 50


@pytest.mark.parametrize("most", [1, 64])
def test_ranks_that_die_cost_one_cell(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left goes on in new processes, as it does after enough cells, and the failed cell says why."""
    monkeypatch.setattr(lattice_ranks, "CELLS_OF_A_PROCESS", most)
    write_inputs(tmp_path)
    cells = [lattice.Cell("sft", "ddp", 1, micro, True, "none", False) for micro in (8, 3, 1)]
    trees = [lattice.recipe_tree(cell, tmp_path, tmp_path / cell.name) for cell in cells]
    (tmp_path / "broken.jsonl").write_text("{")
    trees[0]["data"] = {"train": str(tmp_path / "broken.jsonl")}
    broken, *whole = train_all(trees, 1, tmp_path)
    assert "broken.jsonl" in broken.error
    assert [(each.error, each.run_dir.name) for each in whole] == [("", cell.name) for cell in cells[1:]]
    assert len((tmp_path / "recipes-1.jsonl").read_text().splitlines()) == min(most, 2)


def test_an_interrupted_lattice_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had measured stands, what a kill left of the next cell and of a line is done again."""
    cells = [
        lattice.Cell("sft", "ddp", 1, micro, packing, "none", False) for micro, packing in ((64, False), (3, True))
    ]
    monkeypatch.setattr(invariance, "choose", lambda *names: (cells, Counter()))
    work, said = tmp_path / "work", []

    def say(where: str, item: invariance.Compared) -> None:
        said.append((where, item))
        if len(said) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(invariance, "_say", say)
    with pytest.raises(KeyboardInterrupt):
        invariance.certify("short", work)
    (work / "runs" / cells[1].name).mkdir(exist_ok=True)
    (work / "runs" / cells[1].name / "log.jsonl").write_text("{")
    with (work / "measured.jsonl").open("a") as file:
        file.write('{"name": "hal')
    certificate = invariance.certify("short", work)
    assert certificate["passed"], certificate["failures"]
    assert [(where, item.cell) for where, item in said] == list(zip(("1/2", "2/2"), cells, strict=True))
    assert certificate["cells"] == [item.as_dict() for _, item in said]
    assert [path.name for path in (work / "runs").iterdir()] == [cells[0].name]
    about, *lines = (work / "measured.jsonl").read_text().splitlines()
    (work / "measured.jsonl").write_text("\n".join([about.replace('"sources": "', '"sources": "0'), *lines]) + "\n")
    with pytest.raises(ValueError, match=r"^verify: .*work holds an unfinished lattice of another version"):
        invariance.certify("short", work)


@pytest.mark.slow
def test_the_standard_lattice_and_the_chain_hold(shipyard, tmp_path: Path) -> None:
    shipyard("verify", "invariance", "--out", tmp_path, timeout_s=7200)
    chain = json.loads((tmp_path / "invariance-certificate.json").read_text())["elastic"]["chain"]
    assert [link["ranks"] for link in chain["links"]] == [2, 4, 1]
    assert chain["passed"]
