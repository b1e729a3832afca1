import torch
from shipyard.evals.bench_kernels import bench_kernels


def test_without_a_gpu_it_says_so_in_one_sentence_and_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = bench_kernels(tmp_path / "table.md")
    assert "\n" not in said
    assert "this machine has no GPU" in said or "triton is not installed" in said
    assert not list(tmp_path.iterdir())
