"""Tests in `interpreted/` need TRITON_INTERPRET=1 before triton is imported; `test_kernels_suite.py` sees to that."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore = ["interpreted"]
