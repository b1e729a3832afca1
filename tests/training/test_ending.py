"""A job that ended by a bad step or a mistake ends at once when it is started again, unless a person starts it anew."""

from pathlib import Path

import pytest
from shipyard.evals.launched import launch
from shipyard.training.ending import FILE, START, heed, leave


@pytest.fixture(autouse=True)
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (START, "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)


def test_the_same_start_hears_it_and_another_takes_it_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(START, "job-7")
    assert heed(tmp_path) is None
    leave(tmp_path / "run", 3, "health: step 2: no number")
    assert (tmp_path / "run" / FILE).read_text() == "3 job-7\nhealth: step 2: no number\n"  # a batch script reads it
    assert heed(tmp_path / "run") == (3, "health: step 2: no number")
    monkeypatch.setenv(START, "job-8")
    assert heed(tmp_path / "run") is None
    assert not list((tmp_path / "run").iterdir())


def test_ranks_that_torchrun_starts_again_know_it_by_their_count(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    leave(tmp_path, 2, "batch.size: 3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert heed(tmp_path) == (2, "batch.size: 3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert heed(tmp_path) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("restarts", [None, "0"])
def test_nothing_is_left_where_nobody_starts_ranks_again(restarts: str | None, tmp_path: Path, monkeypatch) -> None:
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    leave(tmp_path / "run", 2, "a mistake")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("torn", ["", "3", "3 \n", "143 job-7\nsaved\n", "x job-7\nwhat\n", "\xff"])
def test_what_is_no_final_word_is_taken_away(torn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(START, "job-7")
    (tmp_path / FILE).write_text(torn, encoding="latin-1")
    assert heed(tmp_path) is None
    assert not (tmp_path / FILE).exists()


def test_a_run_folder_that_cannot_be_written_hides_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(START, "job-7")
    (tmp_path / "file").touch()
    leave(tmp_path / "file" / "run", 2, "run_dir: is no folder")
    assert heed(tmp_path / "file" / "run") is None


def test_a_mistake_under_torchrun_is_computed_once(tiny_model: Path, chat_rows: Path, tmp_path: Path) -> None:
    """What only a rank can find: rows that are not there, on a machine that has the recipe."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: sft\nsteps: 1\nmodel: {{name: '{tiny_model}', dtype: float32}}\ndata: {{train: gone.jsonl}}\n"
    )
    run = tmp_path / "run"
    job = launch("torchrun", recipe, run, [], restarts=2)
    assert job.wait(200) == 1
    said = job.said()
    assert said.count("gone.jsonl") == 3, said
    assert said.count("is not computed again") == 2, said
    assert "exitcode  : 2 " in said
    assert [path.name for path in run.iterdir()] == [FILE]
    job = launch("torchrun", recipe, run, [f"data.train={chat_rows}"], restarts=2)
    assert job.wait(200) == 0, job.said()
    assert not (run / FILE).exists()
