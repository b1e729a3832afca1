"""A rank ends with its own code, whatever the threads of its group are at, and ranks that end are started again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from shipyard.training.exit_code import FOLDER, cause

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


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_ends_with_its_code_while_its_group_still_works(code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVES]
    codes = tmp_path / "codes"
    codes.mkdir()
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), str(code)], stdout=-1, stderr=-1, text=True,
            env={**os.environ, FOLDER: str(codes)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code, code], said
    assert said[0] == ("last words" if code else "", "")
    assert {path.name: path.read_text() for path in codes.iterdir()} == ({"0": "3", "1": "3"} if code else {})
    assert cause(codes) == (code or None)


# Rank 1 dies once both have met. Started again, it comes late, so that rank 0 finds what the dead left in the store.
DIES_ONCE = """
import os, pathlib, signal, time
from shipyard.training.exit_code import told
from shipyard.training.ranks import start
from shipyard.training.recipe import parse_recipe
rank, again = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
recipe = {"method": "sft", "steps": 1, "model": {"name": "m"}, "data": {"train": "x"}, "parallel": {"timeout_s": 30}}
with told():
    first_is_there = pathlib.Path(__file__ + ".there")
    if again and rank:
        while not first_is_there.exists():
            time.sleep(0.01)
        time.sleep(2)
    elif again:
        first_is_there.touch()
    ranks = start(parse_recipe(recipe))
    together = ranks.sum({"ranks": 1.0})["ranks"]
    if not again:
        if rank:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    pathlib.Path(f"{__file__}.{rank}").write_text(f"together {together}")
"""


def test_ranks_that_torchrun_starts_again_do_not_look_for_the_dead(on_ranks, tmp_path: Path) -> None:
    script = tmp_path / "dies_once.py"
    script.write_text(DIES_ONCE)
    on_ranks(2, script, restarts=1, timeout_s=200)
    assert [Path(f"{script}.{rank}").read_text() for rank in range(2)] == ["together 2.0"] * 2
