"""The benchmark of the planner's cores, at tiny size: the plan is the same on one and on two."""

import json
import subprocess
import sys
from pathlib import Path


def test_plan(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    options = ["--megabytes", "2", "--rounds", "1", "--tokenizer", "bytes", "--folder", str(tmp_path)]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.plan", *options, "--json", str(out)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        timeout=300,
        check=True,
    )
    result = json.loads(out.read_text())
    assert result["benchmark"] == "plan"
    runs = [run for each in result["runs"].values() for run in each]
    assert len({run["fingerprint"] for run in runs}) == 1
    for figure in ("two_over_one", "plan_over_tokenizer", "peak_mib"):
        assert result[figure] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
