"""State bytes, to the byte, against tensors that real engines on real ranks hold."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from shipyard.launch.state import REDUCE_BUCKET, WIDTH, state_of
from shipyard.launch.workload import Workload

CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 520,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1001,  # odd, so that every partition has to be padded
    "tie_word_embeddings": False,
}
CASES = [{"engine": engine, "dtype": "bfloat16", "rounds": 2} for engine in ("zero1", "zero2", "zero3", "fsdp2", "ddp")]
MORE = [
    {"engine": "zero1", "dtype": "bfloat16", "rounds": 1},
    {"engine": "fsdp2", "dtype": "bfloat16", "rounds": 1},
    {"engine": "zero2", "dtype": "float32", "rounds": 2},
    {"engine": "zero3", "dtype": "float32", "rounds": 1},
    {"engine": "zero2", "dtype": "bfloat16", "rounds": 1, "lora": 4},
    {"engine": "zero3", "dtype": "bfloat16", "rounds": 1, "lora": 4},
]


def _on_ranks(ranks: int, cases: list[dict[str, Any]], folder: Path) -> list[dict[str, int]]:
    config = folder / "config.json"
    config.write_text(json.dumps(CONFIG))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = str(Path(__file__).with_name("state_on_ranks.py"))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    done = subprocess.run(
        [*command, script, str(config), json.dumps(cases)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if "FOUND " in line)
    return json.loads(line.split("FOUND ", 1)[1])


def _planned(case: dict[str, Any], ranks: int) -> dict[str, int]:
    work = Workload(
        config=json.dumps(CONFIG),
        ranks=ranks,
        tokens=16,
        micro=2,
        rounds=case["rounds"],
        engine=case["engine"],
        dtype=case["dtype"],
        lora_rank=case.get("lora", 0),
    )
    state = state_of(work)
    bucket = WIDTH[case["dtype"]] * REDUCE_BUCKET if case["engine"] == "zero3" else 0  # held between steps, too
    held = {"between": state.weights + state.optimizer + bucket, "gradients": state.gradients}
    if case["engine"] == "zero1" and case["rounds"] > 1:  # its bucket is there as long as gradients add up
        held["gradients"] += WIDTH[case["dtype"]] * REDUCE_BUCKET
    if case["engine"] == "ddp":
        held["buckets"] = state_of(replace(work, dtype="float32")).buffers
    if case["engine"] == "zero3":
        held["gradients"] = 0  # a buffer that is held between steps
        held["between"] += state.gradients
    return held


def _compare(ranks: int, cases: list[dict[str, Any]], tmp_path: Path) -> None:
    found = _on_ranks(ranks, cases, tmp_path)
    real = {json.dumps(case): held for case, held in zip(cases, found, strict=True)}
    assert real == {json.dumps(case): _planned(case, ranks) for case in cases}


def test_state_is_exact_on_two_ranks(tmp_path: Path) -> None:
    _compare(2, CASES, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_more_states_are_exact(ranks: int, tmp_path: Path) -> None:
    _compare(ranks, [*CASES, *MORE], tmp_path)
