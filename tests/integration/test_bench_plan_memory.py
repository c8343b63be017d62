"""The benchmark of the planner, at tiny size: it runs, and its result has the keys."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_plan_memory(tmp_path):
    out = tmp_path / "result.json"
    sizes = ["--gigabytes", "0.004", "--small", "0.002", "--sample", "0.001", "--tokenizer", "bytes"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.plan_memory",
            *sizes,
            "--folder",
            str(tmp_path),
            "--json",
            str(out),
        ],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        timeout=300,
        check=True,
    )
    assert b"peak RSS" in done.stdout
    result = json.loads(out.read_text())
    assert result["benchmark"] == "plan_memory"
    assert result["runs"]["large"]["tokens"] > 1.9 * result["runs"]["small"]["tokens"]
    assert 0.5 < result["peak_rss_large_over_small"] < 2
    assert result["over_encode_batch"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
