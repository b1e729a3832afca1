"""The house: what a clone and a wheel hold, and the rules that every file keeps."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from shipyard.training.recipe import knobs

ROOT = Path(__file__).parents[1]
ROOMS = ("training", "kernels", "launch", "serving", "evals")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
LONG_FUNCTIONS = {("training/loop.py", "train"): 120, ("kernels/attention_tiles.py", "attention_kernel"): 64}
RESOURCES = ("launch/assets.yaml", "launch/recipes/*.yaml", "launch/shapes/*.json", "launch/accelerate/*.yaml")


def _ours() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def _tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return listed.stdout.splitlines()


def test_no_folder_is_a_regular_package() -> None:
    """kernels/ as a regular package would hide Hugging Face's `kernels` whenever the root is on sys.path."""
    found = [path for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("__init__.py")]
    assert found == []


def test_folders_are_one_level_deep() -> None:
    inner = {path.relative_to(ROOT).parts[:-1] for path in _ours()}
    assert {parts for parts in inner if len(parts) > 1} == set()


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_files_are_short() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in _ours()}
    assert {name: size for name, size in sizes.items() if size >= MAX_FILE_LINES} == {}
    assert "utils.py" not in {path.name for path in _ours()}


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each function with the lines of its body. A kernel's signature alone may take twenty, and a page or a batch
    script written out as one string is text, not code: both are left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            yield node.name, node.end_lineno - node.body[0].lineno + 1 - _lines_of_text(node)


def _lines_of_text(function: ast.AST) -> int:
    returned = (node.value for node in ast.walk(function) if isinstance(node, ast.Return))
    texts = (value for value in returned if isinstance(value, ast.JoinedStr | ast.Constant))
    return sum((text.end_lineno or text.lineno) - text.lineno for text in texts)


def test_functions_are_short() -> None:
    long = []
    for path in _ours():
        name = str(path.relative_to(ROOT))
        for function, lines in _functions(path):
            if lines > LONG_FUNCTIONS.get((name, function), MAX_FUNCTION_LINES):
                long.append(f"{name}:{function} has {lines} lines")
    assert long == []


def test_knobs_are_few() -> None:
    assert len(knobs()) < 120


def test_nothing_names_a_registry_or_this_machine() -> None:
    marks = re.compile(r"https?://[\w.-]*(pypi|npmjs|registry\.)[\w./-]*|index-url\s*=|" + "/wo" + "rk/")
    guilty = []
    for name in _tracked():
        path = ROOT / name
        if path.is_file() and path.suffix in {".py", ".md", ".yaml", ".toml", ".sh", ".json", ".go", ""}:
            guilty += [f"{name}: {found[0]}" for found in marks.finditer(path.read_text(errors="replace"))]
    assert guilty == []


def test_every_package_of_pyproject_is_in_a_clone() -> None:
    """git keeps no empty folder: a package that is one builds here and fails in every clone."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    tracked = _tracked()
    for package in packages:
        folder = "/".join(package.split(".")[1:])
        assert any(name.startswith(f"{folder}/" if folder else "") for name in tracked), package


def test_wheel_holds_the_recipes_and_runs_from_anywhere(tmp_path: Path) -> None:
    """Copied to a directory of another name, built, unpacked and run without the source tree."""
    source = tmp_path / "another name"
    for name in _tracked():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    code = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    for pattern in (*RESOURCES, *(f"{room}/*.py" for room in ROOMS)):
        expected = {f"shipyard/{path.relative_to(ROOT)}" for path in ROOT.glob(pattern)}
        tracked = {f"shipyard/{name}" for name in _tracked()}
        assert expected & tracked <= held, pattern
    code = (
        "import shipyard, pathlib; from shipyard.launch.cli import run_command; print(shipyard.__file__); "
        "from shipyard.training.recipe import load_recipe; folder = pathlib.Path(shipyard.__file__).parent; "
        "assert len([load_recipe(path) for path in (folder / 'launch/recipes').glob('*.yaml')]) >= 7; "
        "raise SystemExit(run_command(['fetch', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(str(tmp_path / "installed"))


def test_hugging_face_kernels_is_not_hidden(tmp_path: Path) -> None:
    """With the root first on sys.path, `import kernels` finds a regular package that comes later."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("name = 'theirs'")
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    code = "import kernels; print(kernels.name)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "theirs"
