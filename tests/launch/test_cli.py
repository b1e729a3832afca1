"""The command line: quick to start, one line for a mistake, the right exit code."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from shipyard.launch import cli
from shipyard.launch.cli import run_command

ROOT = Path(__file__).parents[2]
SFT = str(ROOT / "launch/recipes/smollm2-135m-sft.yaml")
LIGHT = {"annotated_doc", "attr", "click", "markdown_it", "mdurl", "pygments", "rich", "shellingham", "typer"}
"""What `shipyard --help` is drawn with. The heavy rest is imported by the commands that need it."""
INSTALLED = """
import sys
files = {name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}
names = {name.partition(".")[0] for name, file in files.items() if "site-packages" in file}
print("IMPORTED", *sorted(name for name in names if not name.startswith("_")))
"""


def _imported(code: str) -> set[str]:
    """The installed packages that a process has imported after some code."""
    done = subprocess.run([sys.executable, "-c", code + INSTALLED], check=True, capture_output=True, text=True)
    return set(done.stdout.rpartition("IMPORTED")[2].split())


def test_import_and_help_load_nothing_heavy() -> None:
    """Packages, not seconds: a busy machine must not turn this red."""
    assert _imported("import shipyard") == set()
    helped = _imported("from shipyard.launch.cli import run_command\nassert run_command(['--help']) == 0")
    assert "typer" in helped
    assert helped <= LIGHT


MISTAKES = [
    (["trian", SFT], "Did you mean 'train'"),
    (["train"], "Missing argument 'RECIPE'"),
    (["train", SFT, "--dryrun"], "--dryrun"),
    (["train", "smollm2-135m-stf.yaml"], "did you mean launch/recipes/smollm2-135m-sft.yaml"),
    (["train", SFT, "optim.lrr=1"], "did you mean 'optim.lr'"),
    (["train", SFT, "optim.lr=fast"], "optim.lr: 'fast' is refused"),
    (["train", SFT, "lora.rank=0"], "model.quantize: nf4 weights are frozen"),
    (["fetch", "smollm"], "did you mean asset:smollm2"),
    (["verify", "nowhere"], "nowhere does not exist"),
    (["verify", SFT], "smollm2-135m-sft.yaml is in no committed directory"),
    (["train", "n" * 300], "cannot be read or written (File name too long); give another path"),
    (["serve", "nowhere"], "nowhere does not exist"),
    (["export", "asset:smollm2-135m-instruct", "--to", "onnx"], "--to"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES, ids=[" ".join(words)[-40:] for words, _ in MISTAKES])
def test_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("shipyard: error: ")
    assert errors.count("\n") == 1
    assert said in errors
    assert not list(tmp_path.iterdir())


def test_bad_row_is_named_by_file_and_line(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comple\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: sft\nsteps: 1\nmodel: {{name: {tiny_model}}}\ndata: {{train: {rows}}}\n")
    assert run_command(["train", str(recipe)]) == 2
    assert "rows.jsonl:2" in capsys.readouterr().err
    assert run_command(["train", str(recipe), "data.train=gone.jsonl"]) == 2
    assert "gone.jsonl" in capsys.readouterr().err


ERRORS = [
    (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "disk: no space left while writing runs/x"),
    (FileNotFoundError(errno.ENOENT, "No such file", "a.csv"), 2, "a.csv does not exist"),
    (PermissionError(errno.EACCES, "Permission denied", "a.csv"), 2, "a.csv may not be opened"),
    (ModuleNotFoundError("No module named 'xllamacpp'", name="xllamacpp"), 2, "shipyard-llm[llamacpp]"),
    (
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "a.csv/x"),
        2,
        "a.csv/x cannot be read or written (Not a",
    ),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "runs"), 2, "runs cannot be read or written (Is a directory)"),
    (KeyboardInterrupt(), 130, ""),
]


@pytest.mark.parametrize(("error", "code", "said"), ERRORS, ids=[type(error).__name__ for error, _, _ in ERRORS])
def test_errors_from_below(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("shipyard.training.recipe.load_recipe", fail)
    assert run_command(["train", SFT]) == code
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") <= 1


def test_help_says_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    """rich takes words in brackets for a style, and drops them."""
    for command, said in (("launch", "RUN_DIR/launch"), ("export", "exports/MODEL-FORMAT"), ("replay", "the last")):
        assert run_command([command, "--help"]) == 0
        assert said in " ".join(capsys.readouterr().out.replace("│", "").split()), command


def test_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("shipyard.training.recipe.load_recipe", fail)
    with pytest.raises(KeyError, match="ours"):
        run_command(["train", SFT])


def test_only_the_first_rank_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_command(["train", "gone.yaml"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["qlora", "dpo", "grpo", "pretrain"])
def test_big_recipes_resolve_offline(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert run_command(["train", str(ROOT / f"launch/recipes/llama3-8b-{name}.yaml"), "--dry-run", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["recipe"]["model"]["shape"] == "llama3-8b"
    assert 10e9 < sum(tree["memory_bytes"].values()) < 200e9
    assert any("tokenizer" in note and "not on this machine" in note for note in tree["notes"])
    assert not list(tmp_path.iterdir())


DRY = "method: sft\nsteps: 1\nmodel: {name: NAME}\ndata: {train: DATA}\n"


def test_dry_run_says_what_is_missing_and_refuses_what_nothing_brings(
    tmp_path: Path, chat_rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    recipe, rows = tmp_path / "recipe.yaml", str(chat_rows)
    recipe.write_text(DRY.replace("NAME", "owner/model").replace("DATA", rows))
    assert run_command(["train", str(recipe), "--dry-run"]) == 0
    assert "note: tokenizer: owner/model is not on this machine" in " ".join(capsys.readouterr().out.split())
    recipe.write_text(DRY.replace("NAME", "'bad/[/x]'").replace("DATA", rows))
    assert run_command(["train", str(recipe), "--dry-run"]) == 0
    assert "note: tokenizer: bad/[/x] is not on this machine" in " ".join(capsys.readouterr().out.split())
    for name, data, said in (
        (rows, rows, f"model.tokenizer: {rows} cannot be loaded"),
        ("asset:unheard", rows, "asset: 'unheard' is not in assets.yaml"),
        ("owner/model", "gone.jsonl", "data: gone.jsonl is not a file"),
    ):
        recipe.write_text(DRY.replace("NAME", name).replace("DATA", data))
        assert run_command(["train", str(recipe), "--dry-run"]) == 2
        assert said in capsys.readouterr().err


def test_dry_run_shows_rows_as_the_model_sees_them(
    tmp_path: Path,
    tiny_model: Path,
    chat_rows: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: sft\nsteps: 1\nmodel: {{name: {tiny_model}}}\ndata: {{train: {chat_rows}}}\n")
    assert run_command(["train", str(recipe), "--dry-run", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    first = tree["rows"][0]
    assert tree["train_rows"] == 22
    assert first["source"].startswith(f"{chat_rows}:")
    assert len(first["ids"]) == len(first["supervised"]) == len(first["text"])
    reply = "".join(piece for piece, flag in zip(first["text"], first["supervised"], strict=True) if flag)
    assert reply.startswith("1")
    assert reply.endswith("<|im_end|>")
    assert tree["boundaries"][1] == len(first["ids"])
    assert tree["memory_bytes"]["weights"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert run_command(["train", str(recipe), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "these documents meet at" in shown
    assert "memory of one rank" in shown


def test_fetch_lists_assets(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["fetch"]) == 0
    assert "asset:smollm2-135m-instruct" in capsys.readouterr().out
    assert cli.app.info.name == "shipyard"


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "shipyard.launch.cli", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("shipyard: error: No such command")
