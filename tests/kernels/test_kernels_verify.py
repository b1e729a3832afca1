"""`shipyard verify kernels` as its user sees it."""

import json

import pytest
from shipyard.launch.cli import run_command
from shipyard.launch.verify import verify_kernels


def test_one_kernel_as_lines_and_json(capsys):
    assert verify_kernels(as_json=False, kernels=["swiglu"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[2:]] == [["ok", "swiglu", t] for t in ("bfloat16", "float16", "float32")]
    assert all("3 of 3" in line and line.rstrip().endswith("clean") for line in lines[2:])
    assert not verify_kernels(as_json=True, kernels=["no such kernel"])
    assert json.loads(capsys.readouterr().out) == {"passed": False, "bars": {"rms": 1.0, "max": 2.0}, "kernels": []}


@pytest.mark.kernels_full
def test_every_kernel_holds(capsys):
    assert run_command(["verify", "kernels", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert len(tree["kernels"]) == 27
    assert all(row["holds"] and row["rms"] <= 1.0 and row["largest"] <= 2.0
               for row in tree["kernels"])  # fmt: skip
