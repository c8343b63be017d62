"""The Triton kernels where there is no GPU, interpreted."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The others need a device beside the kernels.
KERNELS = [
    path
    for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    if path.stem not in ("test_harvest", "test_transfer")
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


def test_the_gpu_tests_pass_under_the_interpreter():
    """In a process of their own, because Triton decides on import whether it interprets."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *map(str, KERNELS),
            "--no-skips",
            "-q",
            "-p",
            "no:cacheprovider",
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
