"""Real ranks that train through the Triton kernels, under the interpreter, beside one rank on the PyTorch path.

Which rank holds what of a weight, and when, is the engines' doing; that the kernels find all of it is shown here.
"""

import pytest
from shipyard.evals import lattice
from shipyard.evals.invariance import read_run
from shipyard.evals.lattice import Cell
from shipyard.evals.lattice_inputs import write_inputs
from shipyard.evals.lattice_ranks import train_all

STEPS = 2
CELLS = (
    Cell("sft", "ddp", 2, 3, True, "none", False),
    Cell("sft", "fsdp2", 2, 3, True, "full", False),
    Cell("sft", "zero3", 2, 3, True, "selective", False),
    Cell("dpo", "zero2", 2, 3, True, "none", False),
    Cell("dpo", "fsdp2", 2, 3, True, "none", False),
)


@pytest.mark.kernels_full
def test_every_engine_trains_the_same_through_the_kernels(tmp_path, monkeypatch):
    """Losses, gradient norms and weights, within the invariance lattice's tolerance, in fp32."""
    inputs = tmp_path / "inputs"
    write_inputs(inputs)

    def runs(cells, kernels, world):
        trees = [lattice.recipe_tree(cell, inputs, tmp_path / f"{cell.name}-{kernels}") for cell in cells]
        for tree in trees:
            tree["steps"], tree["model"]["kernels"] = STEPS, kernels
        done = list(train_all(trees, world, tmp_path))
        assert [outcome.error for outcome in done] == [""] * len(cells)
        return [read_run(outcome.run_dir) for outcome in done]

    references = list(dict.fromkeys(map(lattice.reference, CELLS)))
    wanted = dict(zip(references, runs(references, "torch", 1), strict=True))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for cell, (steps, weights) in zip(CELLS, runs(CELLS, "triton", 2), strict=True):
        want_steps, want_weights = wanted[lattice.reference(cell)]
        for step, want in zip(steps, want_steps, strict=True):
            assert step["loss"] == pytest.approx(want["loss"], rel=1e-6), cell.name
            assert step["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-6), cell.name
        assert weights.keys() == want_weights.keys()
        worst = max(float((weights[name] - want_weights[name]).abs().max()) for name in weights)
        assert worst < 1e-6, cell.name
