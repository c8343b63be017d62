"""The benchmarks of the kernels and the step, at tiny size: they run, and their results have the keys."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, set_step

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


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read on Linux only")
def test_set_step(tmp_path):
    result = run("set_step", tmp_path / "result.json", "--size", "tiny", "--rounds", "2", "--threads", "1")
    assert result["benchmark"] == "set_step"
    for name in ("clt_step_over_products", "plt_step_over_products", "dense_over_winnow"):
        low, middle, high = result["quartiles"][name]
        assert low <= middle <= high
        assert result[name] == middle > 0
    assert result["clt_peak_mib"] > 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak RSS is reset on Linux only")
def test_memory(tmp_path):
    result = run("memory", tmp_path / "result.json", "--tiny", "--rounds", "1")
    assert result["benchmark"] == "memory"
    assert result["encode_topk_extra_mib"] < 64
    assert result["encode_topk_over_dense"] > 0
    assert result["million"]["seconds"] > 0


ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(name, name=name.partition(".")[0])
sys.meta_path.insert(0, Absent())
"""
LACKING = {"ray", "zarr", "transformers", "obstore", "pyarrow", "numcodecs", "google_crc32c", "matplotlib"}
LACKING |= {"s3fs", "scipy", "typer", "rich", "pytest_timeout"}


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """The environment of a machine with little more than torch, Triton and pytest."""
    (tmp_path / "sitecustomize.py").write_text(ABSENT.format(names=LACKING))
    # pytest finds pytest-timeout by its metadata, which a module that cannot be imported still has
    bare = {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    return {**os.environ, **bare, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_such_a_machine_has_no_pytest_timeout(bare):
    """And so pytest does not start under pyproject.toml, which the next test therefore needs its own for."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu/test_triton.py", "--confcutdir=tests/gpu", "--co", "-q"],
        cwd=ROOT,
        env=bare,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert "Unknown config option: timeout" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_gpu_where_torch_triton_and_pytest_are_almost_all_there_is(bare, tmp_path):
    """Its tests (a few) and all that it measures, interpreted, at toy size on a CPU."""
    out = tmp_path / "gpu.json"
    arguments = ["--tiny", "--tests", "chosen or (exact and shape0)", "--json", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=ROOT,
        env={**bare, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    subprocess.run(
        [sys.executable, "-c", "import benchmarks.memory"], cwd=ROOT, env=bare, timeout=60, check=True
    )
    result = json.loads(out.read_text())
    assert result["tests"]["triton"]["passed"]
    assert "4 passed" in result["tests"]["triton"]["said"][0]
    for path in gpu.listing(gpu.TINY):
        found = result
        for name in path.split("."):
            found = found[name]
    hot = {kind: found.pop("hot_latents") for kind, found in result["exact"].items()}
    assert hot["float32"] == hot["bfloat16"] == 0
    assert min(hot["float32_skewed"], hot["bfloat16_skewed"]) > 0
    for kind, found in result["exact"].items():
        assert max(found.values()) < (1e-2 if "bfloat16" in kind else 1e-5), kind
    (size,) = result["sizes"].values()
    assert size["kernels"] == "triton"
    for name in gpu.RATIOS:
        assert 0 < size[name] < math.inf
    assert size["float32_step_over_float32_product"] > 0
    assert set(result["sets"]) == set(gpu.SETS)
    for one in result["sets"].values():
        assert one["step_over_products"] > 0
        assert one["peak_over_estimate"] is None
    # decoders of two targets in one layer of two, and dead latents' copies
    per_layer, cross, dead = (
        result["sets"][name]["estimate"] for name in ("per-layer", "cross-layer", "cross-layer, a tenth dead")
    )
    assert per_layer < cross < dead
    for part in size["items"].values():
        assert min(part.values()) > 0
    assert result["memory"]["million"]["estimate"] > result["memory"]["here"]["estimate"]
    assert result["memory"]["here"]["peak_over_estimate"] is None  # a CPU keeps no such account


def test_set_step_says_which_checkout_it_wants(tmp_path):
    with pytest.raises(SystemExit, match=r"--clt-forge .*: expected a checkout with src/clt_forge/clt.py"):
        set_step.Forge(tmp_path, set_step.SIZES["tiny"])
