"""A node ends with the code of its ranks, passes SIGTERM on once, and counts crashes for schedulers that cannot."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shipyard.launch.node import TRY_AGAIN, counted

NODE = [sys.executable, "-m", "shipyard.launch.node"]


def node(shell: str, *options: str) -> int:
    return subprocess.run([*NODE, *options, "bash", "-c", shell], timeout=60).returncode


@pytest.mark.parametrize(
    ("tells", "ends", "code"), [("2", 1, 2), ("3", 1, 3), ("4", 1, 4), (None, 1, 1), (None, 0, 0), ("3", 0, 0)]
)
def test_a_node_ends_with_its_ranks_code(tells: str | None, ends: int, code: int) -> None:
    tell = f'echo -n {tells} >"$SHIPYARD_EXIT_CODES/5"; ' if tells else ""
    assert node(f"{tell}exit {ends}") == code


@pytest.mark.parametrize(("tells", "code"), [("143", 143), ("3", 3), ("4", 143)])
def test_sigterm_goes_on_once(tells: str, code: int, tmp_path: Path) -> None:
    """As an evicted pod: saved, 143. What comes out the same again is not hidden by it."""
    there, saved = tmp_path / "there", tmp_path / "saved"
    shell = f"""trap 'echo saving >>{saved}' TERM
        touch {there}; until [ -s {saved} ]; do sleep 0.05; done
        for ((i = 0; i < 12; i++)); do sleep 0.05; done; echo -n {tells} >"$SHIPYARD_EXIT_CODES/0"; exit 1"""
    process = subprocess.Popen([*NODE, "bash", "-c", shell])
    until = time.monotonic() + 60
    while not there.exists() and time.monotonic() < until:
        time.sleep(0.02)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.wait(60) == code
    assert saved.read_text() == "saving\n"


def test_crashes_are_counted_in_a_file_that_outlives_the_node(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    crashes = tmp_path / "launch" / "crashes"
    options = ("--crashes", str(crashes), "2")
    assert [node("exit 1", *options) for _ in range(4)] == [TRY_AGAIN, TRY_AGAIN, 1, 1]
    assert [counted(code, tmp_path / "other", 2) for code in (0, 2, 3, 143)] == [0, 2, 3, 143]
    assert not (tmp_path / "other").exists()
    assert counted(9, crashes / "below", 2) == 9  # what cannot be counted must not go on for ever
    assert "cannot count crashes" in capfd.readouterr().err


def test_ctrl_c_waits_for_the_ranks(tmp_path: Path) -> None:
    there, saved = tmp_path / "there", tmp_path / "saved"
    shell = f"trap 'sleep 0.5; touch {saved}; exit 1' INT; touch {there}; while :; do sleep 0.05; done"
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's jobs in the background ignore it
    process = subprocess.Popen([*NODE, "bash", "-c", shell], start_new_session=True, preexec_fn=heard)
    until = time.monotonic() + 60
    while not there.exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130, shlex.join(NODE)
    assert saved.exists()
