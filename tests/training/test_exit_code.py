"""A rank ends with its own code, whatever the threads of its group are at."""

import subprocess
import sys
from pathlib import Path

import pytest

# Rank 0 keeps Python to itself while rank 1 completes a sum, so that gloo's thread waits for Python to drop the tensor,
# and then ends: it would die of SIGABRT, "terminate called without an active exception".
LEAVES = """
import os, sys, time
import torch, torch.distributed as dist
from shipyard.training.exit_code import told
rank, store, code = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ["RANK"] = str(rank)
with told():
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    if rank:
        time.sleep(0.2)
    else:
        sys.setswitchinterval(1000)
    dist.all_reduce(torch.ones(3), async_op=True)
    until = time.monotonic() + 1
    while not rank and time.monotonic() < until:
        pass
    if rank:
        time.sleep(1)
    if code != "0":
        print("last words", end="")
        raise SystemExit(int(code))
"""


@pytest.mark.parametrize("code", [0, 143])
def test_a_rank_ends_with_its_code_while_its_group_still_works(code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVES]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(code)], stdout=-1, stderr=-1, text=True)
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code, code], said
    assert said[0] == ("last words" if code else "", "")
