import torch
from shipyard.evals import bench_kernels


def test_without_a_gpu_it_says_so_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench_kernels.main()
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "this machine has no GPU" in said or "triton is not installed" in said
