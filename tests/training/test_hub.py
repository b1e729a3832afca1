"""Hub names give what the files behind them give; what the hub does not have is one clear line."""

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_for_tests import hub_of
from shipyard.launch.workers import runner
from shipyard.training import preparation
from shipyard.training.recipe import load_recipe


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the data set harbour/logs, which a hub on this machine serves to processes that start now."""
    folder = tmp_path / "logs"
    folder.mkdir()
    rows = [{"text": f"Day {day}: " + "wind and tide, " * (day % 5) + f"{day} ships."} for day in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    server = hub_of(folder, "harbour/logs")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield folder
    server.shutdown()
    server.server_close()


def recipe(folder: Path, tiny_model: Path, train: str, split: str = "train") -> Path:
    tree = {
        "method": "pretrain", "steps": 2, "run_dir": str(folder / "run"),
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "data": {"train": train, "split": split, "tokens": str(folder / "tokens"), "max_tokens": 32},
        "batch": {"size": 4, "micro": 2},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


def test_eval_text_is_looked_for_in_every_split_of_the_hub(hub: Path, tiny_model, tmp_path: Path, shipyard) -> None:
    words = "the harbour master wrote down each ship that came in before noon on that day"
    (hub / "test.jsonl").write_text(json.dumps({"text": words}) + "\n", encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in (f"So {words}.", "Other words.")))
    exam = ["data.decontaminate=[harbour/logs]"]
    said = shipyard("data", "build", recipe(tmp_path / "far", tiny_model, str(rows)), *exam).stdout
    assert "1 with eval text" in said


def test_a_hub_name_makes_the_shards_that_its_file_makes(hub: Path, tiny_model, tmp_path: Path, shipyard) -> None:
    near = load_recipe(recipe(tmp_path / "near", tiny_model, str(hub / "train.jsonl")))
    preparation.build(near, runner("local", 1), [].append)
    assert "40 documents" in shipyard("data", "build", recipe(tmp_path / "far", tiny_model, "harbour/logs")).stdout
    ours, theirs = (
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (tmp_path / place / "tokens").glob("*.tokens")
        }
        for place in ("near", "far")
    )
    assert ours == theirs
    assert ours


def test_what_the_hub_does_not_have_is_one_line(hub: Path, tiny_model, tmp_path: Path, shipyard) -> None:
    done = shipyard("data", "build", recipe(tmp_path / "no", tiny_model, "harbour/logs", "tides"), check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("shipyard: error: ")]
    assert "'harbour/logs' is no file here, and the hub does not give its split 'tides'" in line
    assert not (tmp_path / "no" / "tokens").exists()
