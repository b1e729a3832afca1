"""The crash drills, in their short version: twenty random kills, a full disk, damage. `-m slow` has two hundred."""

import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
from shipyard.evals.crash import Drill, Ground, damage, full_disk, kill_anywhere, prepare, sigterm
from shipyard.evals.crash_page import ended, page
from shipyard.evals.crash_ranks import bad_number, not_started_again, silent, spike, started_again
from shipyard.training import checkpoint


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    """A recipe, and the run of it that nothing disturbed."""
    return prepare(tmp_path_factory.mktemp("drills") / "ground")


def test_twenty_kills_anywhere(ground: Ground) -> None:
    drill = kill_anywhere(ground, 20, seed=1)
    assert drill.times == 20
    assert drill.passed, drill
    assert "inside a save" in drill.seen


def test_a_full_disk_stops_two_ranks_in_one_line_and_loses_nothing(ground: Ground) -> None:
    drill = full_disk(ground, ranks=2)
    if drill is None:
        pytest.skip("mounting a small tmpfs needs root")
    assert drill.passed, drill


@pytest.mark.parametrize("full_before", [False, True])
def test_a_rank_can_say_that_the_disk_is_full_on_a_full_disk(full_before: bool, tmp_path: Path) -> None:
    """Without its note the first rank waits for parallel.timeout_s: half an hour."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "shipyard", str(tmp_path)]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        if not full_before:
            checkpoint._reserve(tmp_path, rank=1)
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "data").write_bytes(bytes(1 << 17))
        if full_before:
            with pytest.raises(OSError, match="No space left"):
                checkpoint._reserve(tmp_path, rank=1)
        else:
            checkpoint._leave(tmp_path, 1, {"failure": "no space left"})
        assert "no space left" in checkpoint._await_note(tmp_path, 1, timeout_s=0)["failure"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("torn", [False, True])
def test_damage_is_named_and_passed_over(torn: bool, ground: Ground) -> None:
    drill = damage(ground, 2, seed=1, torn=torn)
    assert drill.passed, drill
    assert f"| 2 | 2 | {drill.promise} |" in page([drill], "standard")


def test_a_stopped_rank_is_named_by_the_other_also_if_it_holds_the_jobs_store(ground: Ground) -> None:
    drill = silent(ground, 1, seed=1)
    assert drill.passed, drill


def test_a_stopped_rank_is_named_and_the_job_goes_on_by_itself(ground: Ground) -> None:
    drill = started_again(ground, "shipyard launch", signal.SIGSTOP, 1, seed=1)
    assert drill.passed, drill


@pytest.mark.parametrize(
    ("choice", "engine"),
    [
        ("stop", "ddp"),
        ("rewind", "ddp"),
        pytest.param("skip", "ddp", marks=pytest.mark.slow),
        pytest.param("rewind", "zero2", marks=pytest.mark.slow),
    ],
)
def test_a_loss_that_is_no_number_on_one_rank(choice: str, engine: str, ground: Ground) -> None:
    drill = bad_number(ground, choice, engine, [5])
    assert drill.passed, drill


@pytest.mark.slow
def test_a_spike_is_left_out_by_two_ranks(ground: Ground) -> None:
    drill = spike(ground)
    assert drill.passed, drill


def test_torchrun_starts_a_bad_step_again_and_it_ends_at_once(ground: Ground) -> None:
    drill = not_started_again(ground, "torchrun")
    assert drill.passed, drill


@pytest.mark.slow
def test_a_bad_step_is_not_started_again(ground: Ground) -> None:
    drill = not_started_again(ground, "shipyard launch")
    assert drill.passed, drill


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_launcher_starts_again_whichever_rank_ends(number: signal.Signals, ground: Ground) -> None:
    drill = started_again(ground, "shipyard launch", number, 2, seed=2)
    assert drill.passed, drill


@pytest.mark.slow
def test_torchrun_starts_killed_ranks_again(ground: Ground) -> None:
    drill = started_again(ground, "torchrun", signal.SIGKILL, 1, seed=1)
    assert drill.passed, drill


@pytest.mark.slow
def test_two_hundred_kills_anywhere(ground: Ground) -> None:
    drill = kill_anywhere(ground, 200, seed=2)
    assert drill.times == 200
    assert drill.passed, drill


@pytest.mark.slow
def test_terminated_runs(ground: Ground) -> None:
    drill = sigterm(ground, 10, seed=1)
    assert drill.passed, drill


def test_a_drill_that_breaks_down_is_a_line_of_the_page() -> None:
    def broken(ground: str, times: int) -> Drill:
        raise OSError(f"no | {ground}")

    drill = ended(partial(broken, "ground", 3))
    assert drill is not None
    assert not drill.passed
    assert drill.fault == "drill broken(3,)"
    assert "| 1 | 0 | runs to its end | OSError: no / ground |" in page([drill], "short")
