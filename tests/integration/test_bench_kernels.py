"""The benchmarks of the kernels and the step, at tiny size: they run, and their results have the keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(name: str, out: Path, *arguments: str) -> dict:
    subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--json", str(out), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        timeout=300,
        check=True,
    )
    return json.loads(out.read_text())


def test_train_step(tmp_path):
    result = run(
        *("train_step", tmp_path / "result.json", "--rounds", "2", "--no-peers"),
        *("--sizes", "tiny", "quickstart-tiny"),
    )
    assert result["benchmark"] == "train_step"
    for part in (result, result["quickstart-tiny"]):
        for key in ("step", "eager"):
            assert part[f"{key}_over_product"] > 0
            assert part[f"{key}_over_product_dead10"] > 0
    assert result["kernels"] in ("cpu", "triton")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak RSS is reset on Linux only")
def test_memory(tmp_path):
    result = run("memory", tmp_path / "result.json", "--tiny", "--rounds", "1")
    assert result["benchmark"] == "memory"
    assert result["encode_topk_extra_mib"] < 64
    assert result["encode_topk_over_dense"] > 0
    assert result["million"]["seconds"] > 0
