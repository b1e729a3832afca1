"""State bytes, to the byte, against tensors that real engines on real ranks hold."""

import json
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


def _compare(on_ranks, ranks: int, cases: list[dict[str, Any]], folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(CONFIG))
    said = on_ranks(ranks, Path(__file__).with_name("state_on_ranks.py"), config, json.dumps(cases))
    found = json.loads(next(line for line in said.splitlines() if "FOUND " in line).split("FOUND ", 1)[1])
    real = {json.dumps(case): held for case, held in zip(cases, found, strict=True)}
    assert real == {json.dumps(case): _planned(case, ranks) for case in cases}


def test_state_is_exact_on_two_ranks(on_ranks, tmp_path: Path) -> None:
    _compare(on_ranks, 2, CASES, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_more_states_are_exact(ranks: int, on_ranks, tmp_path: Path) -> None:
    _compare(on_ranks, ranks, [*CASES, *MORE], tmp_path)
