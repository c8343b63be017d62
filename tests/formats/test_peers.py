"""Most of `make test-formats` inside `make test`, where the peers' environment is there already."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers import environment, installed


@pytest.mark.skipif(importlib.util.find_spec("sparsify") is not None, reason="in the peers' environment")
def test_the_formats_agree_with_their_libraries():
    if not installed():
        pytest.skip("the peers are not installed: `make peers`")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/formats/test_libraries.py",
        "tests/formats/test_lens.py",
        "tests/formats/test_loaders.py",
        "tests/formats/test_figures.py",
        "-q",
    ]
    command += ["-k", "not quality_table"]
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=repository, env=environment(), capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
