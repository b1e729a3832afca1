"""The Triton kernels in a plan: what they save and multiply against the interpreter, and when a plan has them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from saved_for_tests import CONFIG, PASSES, pass_of
from shipyard.kernels import linear_cross_entropy
from shipyard.launch import footprint
from shipyard.launch.cli import run_command
from shipyard.launch.footprint import extrapolate, measure
from shipyard.launch.workload import Workload

SCRIPT = Path(__file__).with_name("saved_by_kernels.py")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", PASSES)
def test_a_block_keeps_what_the_kernels_save(name: str, interpreted: dict[str, Any]) -> None:
    what = replace(pass_of("none", num_hidden_layers=2), path="triton", **PASSES[name])
    blocks, everything = interpreted["saved"][name]
    assert measure(what).block_bytes == blocks
    # with the head, of which logits would be 81 kB; a real batch has borders and positions that are read
    assert footprint._measure_layers(what, 2).retained == pytest.approx(everything, abs=2048)


@pytest.mark.parametrize("name", ["attention", "head", "rms_norm", "rope", "swiglu"])
def test_a_launch_costs_what_the_sanitizer_counts(name: str, interpreted: dict[str, Any]) -> None:
    """Forward and backward: launches, products of matrices, and each byte once."""
    launches, flops, moved, *planned = interpreted["launches"][name]
    assert planned[:2] == [launches, flops]
    assert planned[2] == pytest.approx(moved, rel=1e-3)  # all borders, and of some launches the first is not read


def test_dk_and_dv_in_a_launch_each_cost_what_the_sanitizer_counts(interpreted: dict[str, Any]) -> None:
    """fp32 at width 256; two heads of 128 tokens over documents of 64. Delta's sweep is not planned."""
    launches, flops, _, *planned = interpreted["launches"]["wide attention"]
    delta = 2 * (2 * 128 * 64) * (256 + 256)
    assert planned[:2] == [launches, flops - delta]


def test_a_plan_has_the_path_that_the_loop_would_take() -> None:
    """`auto` is Triton on a card that has run it, where ranks hold whole layers and rows and nothing is compiled."""
    config = {key: value for key, value in CONFIG.items() if key != "num_hidden_layers"}
    work = Workload(json.dumps(CONFIG), 8, 48, 2, engine="zero2", kernels="auto", proven=True)
    assert work.path == "triton"
    for change in ({"tensor": 2}, {"context": 2}, {"compile": True}, {"proven": False}, {"kernels": "torch"}):
        assert replace(work, **change).path == "torch", change
    engines = [replace(work, engine=engine) for engine in ("zero2", "zero3", "fsdp2")]
    assert {one.path for one in engines} == {"triton"}
    assert [one.one_pass().head_elsewhere for one in engines] == [False, True, True]
    unknown = json.dumps(config | {"model_type": "gemma", "num_hidden_layers": 2})
    assert replace(work, config=unknown).path == "stock"
    assert replace(work, kernels="stock").path == "stock"


def test_only_cards_that_ran_the_kernels_are_planned_with_them(capsys: pytest.CaptureFixture[str]) -> None:
    """On eight H100s the recipe's row has no mask and no logits; on eight A100s a call of attention per document."""
    arguments = ["model.shape=smollm2-135m", "model.quantize=none", "lora.rank=0", "--no-search", "--json"]
    recipe = str(Path(footprint.__file__).with_name("recipes") / "smollm2-135m-sft.yaml")
    found = []
    for cards in ("8xH100-80GB", "8xH200-141GB", "8xA100-80GB"):
        assert run_command(["plan", recipe, *arguments, "batch.size=256", "batch.micro=32", "--gpus", cards]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [one["path"] for one in found] == ["triton", "triton", "torch"]
    activations = [one["memory_bytes"]["activations"] for one in found]
    assert activations[0] == activations[1] < activations[2]


def test_ranks_that_share_the_head_make_logits() -> None:
    """Under FSDP2 and ZeRO-3 the head's weight is elsewhere."""
    here = replace(pass_of("none"), path="triton")
    held = [footprint._measure_layers(replace(here, head_elsewhere=there), 1).retained for there in (True, False)]
    assert held[0] - held[1] == pytest.approx(2 * 48 * CONFIG["vocab_size"] * 4, abs=2048)


def test_packed_documents_cost_what_they_cost_alone() -> None:
    """Both paths keep documents apart without a mask; the PyTorch path pads them to a power of two, as on a GPU."""
    for path, tokens, longer in (("torch", 64, 1.0), ("torch", 48, (64 / 48) ** 2), ("triton", 48, 1.0)):
        work = replace(pass_of("none", 16), path=path, tokens=tokens)
        apart, packed = (measure(replace(work, packed=packed)) for packed in (False, True))
        scores = [sum(op.flops for op in one.block_ops if op.kind == "attention") for one in (apart, packed)]
        assert scores[1] == pytest.approx(longer * scores[0]), path
        assert packed.block_bytes < 1.3 * apart.block_bytes, path  # padding, too


def test_many_samples_hold_one_piece_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's gradient is made in pieces of a size, so that memory is measured and not drawn from two samples."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_TOKENS", 64)
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_LOGITS", 128 * CONFIG["vocab_size"])
    what = replace(pass_of("none"), path="triton")
    assert extrapolate(what, 16) == measure(replace(what, samples=16))
