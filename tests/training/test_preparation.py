"""Shards: the same bytes from any number of processes and after any kill; what is dropped is counted."""

import hashlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from shipyard.launch.workers import runner
from shipyard.training import preparation
from shipyard.training.recipe import load_recipe
from shipyard.training.tokens import TokenShards
from transformers import AutoTokenizer

WORDS = Path(__file__).read_text(encoding="utf-8").split()


def document(seed: int, words: int = 60) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS, k=words))


def recipe_file(folder: Path, tiny_model: Path, **data: Any) -> Path:
    tree = {
        "method": "pretrain",
        "steps": 2,
        "run_dir": str(folder / "run"),
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "data": {"tokens": str(folder / "tokens"), "max_tokens": 32, **data},
        "batch": {"size": 4, "micro": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def build(path: Path, *overrides: str, workers: int = 1) -> tuple[list[str], TokenShards]:
    recipe = load_recipe(path, overrides)
    said: list[str] = []
    preparation.build(recipe, runner("local", workers), said.append)
    return said, TokenShards(Path(str(recipe.data.tokens)))


def texts(shards: TokenShards, tiny_model: Path, split: Any) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    reader = shards.reader(split)
    count = len(shards.lengths(split))
    return [tokenizer.decode(reader.read(number)[:-1]) for number in range(count)]


def sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A JSONL file of 300 documents, 20 of them twice, in pieces of some 8 kB."""
    monkeypatch.setattr("shipyard.training.corpus.MIN_PIECE_BYTES", 8192)
    rows = [{"text": document(number % 280)} for number in range(300)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_documents_come_back_and_duplicates_and_held_out_ones_are_counted(
    many_pieces: Path, tiny_model: Path, tmp_path: Path
) -> None:
    said, shards = build(recipe_file(tmp_path, tiny_model, train=str(many_pieces), validation_fraction=0.2))
    train, validation = (texts(shards, tiny_model, split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(document(number) for number in range(280))
    assert 30 < len(validation) < 85
    assert "20 exact duplicates" in said[-1]
    assert f"300 documents: {len(train)} to train on" in said[-1]
    assert len(shards.of("train")) > 10
    order = [document(number) for number in range(280)]
    assert train == [text for text in order if text in set(train)]
    again, _ = build(tmp_path / "recipe.yaml")
    assert "built before, verified" in again[0]


def test_the_split_is_the_documents_own(many_pieces: Path, tiny_model: Path, tmp_path: Path) -> None:
    """More data, another order, another file: a document stays on its side."""
    _, shards = build(recipe_file(tmp_path, tiny_model, train=str(many_pieces), validation_fraction=0.2))
    held = texts(shards, tiny_model, "validation")
    other = tmp_path / "other.jsonl"
    rows = [{"text": document(number)} for number in range(400, 150, -1)]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"data.train={other}", f"data.tokens={tmp_path / 'more'}"]
    _, more = build(tmp_path / "recipe.yaml", *overrides)
    both = {document(number) for number in range(151, 280)}
    assert set(held) & both == set(texts(more, tiny_model, "validation")) & both


def test_two_processes_make_the_same_bytes(many_pieces: Path, tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    recipe = recipe_file(tmp_path, tiny_model, train=str(many_pieces), validation_fraction=0.1)
    build(recipe)
    build(recipe, f"data.tokens={tmp_path / 'two'}", workers=2)
    assert sums(tmp_path / "tokens") == sums(tmp_path / "two")


def test_pieces_may_be_done_in_any_order(many_pieces: Path, tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, tiny_model, train=str(many_pieces), validation_fraction=0.1)
    build(recipe)
    backwards = lambda task, work, numbers: runner("local", 1)(task, work, list(numbers)[::-1])
    changed = load_recipe(recipe, [f"data.tokens={tmp_path / 'backwards'}"])
    preparation.build(changed, backwards, lambda text: None)
    assert sums(tmp_path / "tokens") == sums(tmp_path / "backwards")


BUILD = """
import sys
from pathlib import Path
from shipyard.launch.workers import runner
from shipyard.training import corpus, preparation
from shipyard.training.recipe import load_recipe
corpus.MIN_PIECE_BYTES = 8192
preparation.build(load_recipe(sys.argv[1], sys.argv[2:]), runner("local", 1), lambda text: print(text, flush=True))
"""


def test_a_killed_build_goes_on_to_the_same_bytes(many_pieces: Path, tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, tiny_model, train=str(many_pieces), validation_fraction=0.1)
    build(recipe)
    target, state = tmp_path / "killed", tmp_path / ".killed.build" / "state"
    command = [sys.executable, "-c", BUILD, str(recipe), f"data.tokens={target}"]
    for stage in ("survey", "encoded"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None and len(list(state.glob(f"{stage}-*.json"))) < 5:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
        assert not target.exists()
    before = {path.name: path.stat().st_mtime_ns for path in state.glob("encoded-*.json")}
    assert len(before) >= 5
    said, _ = build(recipe, f"data.tokens={target}")
    assert said[0].startswith("going on: ")
    assert sums(target) == sums(tmp_path / "tokens")
    assert not (tmp_path / ".killed.build").exists()
    written = {path.name: path.stat().st_mtime_ns for path in target.glob("train-*.tokens")}
    assert any(written[f"train-{name[8:13]}.tokens"] < stamp for name, stamp in before.items())


def test_text_files_parquet_csv_and_folders(tiny_model: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "books"
    (folder / "inner").mkdir(parents=True)
    for number in range(5):
        (folder / "inner" / f"{number}.txt").write_text(document(number))
    rows = tmp_path / "rows"
    rows.mkdir()
    table = pyarrow.table({"text": [document(number) for number in range(3, 40)]})
    pyarrow.parquet.write_table(table, rows / "a.parquet", row_group_size=7)
    (rows / "b.csv").write_text('text,other\n"only, here",1\n')
    (rows / "README.txt").write_text("beside the data")
    recipe = recipe_file(tmp_path, tiny_model, mixture={str(folder): 1.0, str(rows): 3.0})
    said, shards = build(recipe)
    assert [len(shards.lengths("train", source)) for source in (0, 1)] == [5, 36]
    assert "2 exact duplicates" in said[-1]
    assert "only, here" in texts(shards, tiny_model, "train")


def test_near_duplicates_and_eval_text_are_dropped_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    base = document(1, 200).split()
    changed = " ".join([*base[:100], "something", *base[101:]])
    question = document(2, 20)
    rows = [" ".join(base), changed, document(3), f"Asked was: {question}, they say", document(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    exam = [{"question": question, "choices": ["a", {"b": "short"}], "answer": 3}]
    (tmp_path / "exam.json").write_text(json.dumps(exam))
    recipe = recipe_file(tmp_path, tiny_model, train=str(tmp_path / "rows.jsonl"))
    plain, _ = build(recipe)
    assert "dropped: none" in plain[-1]
    knobs = ["data.near_duplicates=0.8", f"data.decontaminate=[{tmp_path / 'exam.json'}]"]
    said, shards = build(recipe, f"data.tokens={tmp_path / 'clean'}", *knobs)
    assert texts(shards, tiny_model, "train") == [" ".join(base), document(3), document(4)]
    assert "1 near-duplicates, 1 with eval text" in said[-1]
    assert "3 texts" in said[0]
    assert "2 shorter than 13 words cannot be looked for" in said[0]


def test_eval_text_is_looked_for_in_every_split(tiny_model: Path, tmp_path: Path) -> None:
    exam = tmp_path / "exam"
    exam.mkdir()
    for number, split in enumerate(("train", "test")):
        (exam / f"{split}.json").write_text(json.dumps([{"question": document(number, 20)}]))
    rows = [f"Asked was: {document(number, 20)}, they say" for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    recipe = recipe_file(tmp_path, tiny_model, train=str(tmp_path / "rows.jsonl"), decontaminate=[str(exam)])
    assert "2 with eval text" in build(recipe)[0][-1]
    (tmp_path / "notes.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"notes.txt: not UTF-8"):
        build(recipe, f"data.tokens={tmp_path / 'more'}", f"data.decontaminate=[{tmp_path / 'notes.txt'}]")


def test_bad_rows_stop_or_are_set_aside_under_their_line(many_pieces: Path, tiny_model: Path, tmp_path: Path) -> None:
    lines = many_pieces.read_text().splitlines()
    lines[250] = '{"text": "cut'
    lines[270] = '{"title": "no text"}'
    many_pieces.write_text("\n".join(lines) + "\n")
    recipe = recipe_file(tmp_path, tiny_model, train=str(many_pieces))
    with pytest.raises(ValueError, match=r"rows\.jsonl:251: not JSON"):
        build(recipe)
    assert not (tmp_path / "tokens").exists()
    said, _ = build(recipe, "data.on_bad_row=quarantine")
    assert "2 bad rows, in quarantine.jsonl" in said[-1]
    aside = [json.loads(line) for line in (tmp_path / "tokens/quarantine.jsonl").open()]
    assert [entry["source"].rpartition(":")[2] for entry in aside] == ["251", "271"]
    assert "format text needs a column text" in aside[1]["reason"]


def test_what_is_there_is_not_written_over(many_pieces: Path, tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, tiny_model, train=str(many_pieces))
    build(recipe)
    with pytest.raises(ValueError, match="another validation_fraction; remove it"):
        build(recipe, "data.validation_fraction=0.1")
    many_pieces.write_text(json.dumps({"text": "all new"}) + "\n")
    with pytest.raises(ValueError, match="the files of the sources"):
        build(recipe)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="holds no token shards"):
        build(recipe, f"data.tokens={tmp_path / 'mine'}")
    shards = tmp_path / "tokens"
    victim = next(shards.glob("train-*.tokens"))
    data = bytearray(victim.read_bytes())
    data[7] ^= 1
    victim.write_bytes(data)
    many_pieces.unlink()
    with pytest.raises(ValueError, match=r"rows\.jsonl is not a file"):
        build(recipe)


def test_ray_makes_the_same_bytes(
    many_pieces: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local Ray of two processes."""
    recipe = recipe_file(tmp_path, tiny_model, train=str(many_pieces), validation_fraction=0.1)
    build(recipe)
    changed = load_recipe(recipe, [f"data.tokens={tmp_path / 'ray'}"])
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # Ray's sockets take no longer path
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex())
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        try:
            preparation.build(changed, runner("ray", 2), lambda text: None)
        finally:
            ray.shutdown()
    assert sums(tmp_path / "tokens") == sums(tmp_path / "ray")
