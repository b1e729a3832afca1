"""The cost of a save is measured on a real state, and printed beside torch.save."""

from pathlib import Path

import pytest
from shipyard.evals.bench_checkpoint import bench_checkpoint


def test_saves_are_timed_beside_torch_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = bench_checkpoint("tiny-llama").splitlines()
    assert "GB of fp32 weights and moments" in lines[0]
    assert [line.partition(":")[0] for line in lines[1:5]] == ["save 1", "save 2", "save 3", "torch.save and fsync"]
    assert list(tmp_path.iterdir()) == []
