"""A training process takes a page from the kernel once, not once a step."""

import os
import subprocess
import sys

import pytest
from shipyard.training.pages import LARGE_PAGES

STEPS = """
import resource, sys
from shipyard.training.pages import keep_pages
if sys.argv[1] == "kept":
    keep_pages()
import torch
resident = lambda: int(open("/proc/self/statm").read().split()[1]) // 256
before, rest = resource.getrusage(resource.RUSAGE_SELF), resident()
for _ in range(12):
    torch.ones(10_000_000)  # 40 MB, 9,766 pages
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_minflt - before.ru_minflt, (after.ru_maxrss - before.ru_maxrss) // 1024, resident() - rest)
"""


def steps(how: str, large: str) -> list[int]:
    """Pages that the kernel gave in twelve steps, and by how many MiB the process grew at most, and for good."""
    command, environment = [sys.executable, "-c", STEPS, how], {**os.environ, "THP_MEM_ALLOC_ENABLE": large}
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    return [int(number) for number in said.split()]


@pytest.mark.skipif(not LARGE_PAGES.is_file() or "[never]" in LARGE_PAGES.read_text(), reason="no large pages")
def test_steps_use_the_pages_of_earlier_ones_and_no_more() -> None:
    faults, most, kept = steps("kept", "1")
    assert faults < 4_000
    assert most < 80
    assert kept > 30
    assert steps("left alone", "0")[0] > 12 * 9_766
    assert steps("kept", "0")[0] > 12 * 9_766  # the user's choice
