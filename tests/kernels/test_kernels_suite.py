"""Runs `interpreted/` in a process of its own: Triton must see TRITON_INTERPRET=1 before its first import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


def run(marker: str) -> None:
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-m", marker, "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_kernels_under_the_interpreter():
    run("not kernels_full")


@pytest.mark.kernels_full
def test_every_kernel_under_the_interpreter():
    run("kernels_full")


def test_kernels_import_and_answer_without_triton():
    """On a machine without triton every module still imports and takes its PyTorch path; asking for it is one line."""
    code = """
import sys, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
sys.modules["triton"] = None
import torch
from shipyard.kernels import jit
assert not jit.HAS_TRITON and not jit.use_triton(torch.ones(1))
keys = torch.ones(3, 2, 128)
assert jit.box_of(keys, 16) is keys
try:
    jit.need_triton(torch.device("cpu"))
except ValueError as error:
    assert "is not installed" in str(error) and "\\n" not in str(error), error
for name in NAMES:
    importlib.import_module(f"shipyard.kernels.{name}")
"""
    names = sorted(path.stem for path in (Path(__file__).parents[2] / "kernels").glob("*.py"))
    about_triton = ("proof", "interpreter", "machine_code", "datasheet", "datasheet_page", "traffic")
    names = [name for name in names if name not in about_triton]
    code = f"import importlib\nNAMES = {names}\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
