"""How a training process holds memory: what tensors free stays with it, in large pages, for the next step to use.

By default glibc gives blocks of megabytes back to the kernel, and a step that gets them again pays for each 4 KiB page:
a fifth of the time of a small model's step on a CPU.
"""

import ctypes
import os
import platform
from pathlib import Path

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of mallopt(3)
LARGEST_BYTES = 1 << 30


def keep_pages() -> None:
    """Set this process up so, before torch makes its first tensor, which is when it looks for the variable.

    Does nothing without glibc or large pages, or where the environment sets the variable to 0: kept blocks of small
    pages do not fit each other's places so well, and memory grows.
    """
    large = LARGE_PAGES.is_file() and "[never]" not in LARGE_PAGES.read_text(encoding="utf-8")
    if large and platform.libc_ver()[0] == "glibc" and os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1") == "1":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, LARGEST_BYTES)
        libc.mallopt(TRIM_THRESHOLD, LARGEST_BYTES)
