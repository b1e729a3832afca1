"""The README's shell blocks, in order, in one directory. `bash long` blocks are not run but their commands are checked;
`bash exit=N` blocks must end with N."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shipyard.launch.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash ?(.*?)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LONG = [text for tag, text in BLOCKS if tag == "long"]
COMMANDS = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
COMMANDS |= {group.name for group in app.registered_groups}


def test_blocks_run_in_order(tmp_path: Path) -> None:
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    short = [(tag, text) for tag, text in BLOCKS if tag != "long"]
    assert len(short) >= 5
    for tag, text in short:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        wanted = int(tag.removeprefix("exit=") or 0)
        assert done.returncode == wanted, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert {path.name for path in tmp_path.iterdir()} == {"launch", "rows.jsonl", "mine.yaml"}


@pytest.mark.parametrize("text", LONG, ids=[text.split()[0] + text.split()[1] for text in LONG])
def test_long_blocks_name_what_exists(text: str) -> None:
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"^make (\S+)", text, re.MULTILINE):
        assert target in targets
    for command in re.findall(r"(?:^shipyard|shipyard\.launch\.cli) (\w+)", text, re.MULTILINE):
        assert command in COMMANDS
    for path in re.findall(r"launch/[\w/.-]+\.yaml", text):
        assert (ROOT / path).is_file()


def test_every_folder_has_its_line() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py")) and path.name[0] != "."}
    for folder in folders - {"build", "dist"}:
        assert re.search(rf"^{folder}/ ", README, re.MULTILINE), folder
