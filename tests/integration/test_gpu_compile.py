"""The Triton kernels compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_compile
from winnow.trainer.kernels.cost import COSTS
from winnow.trainer.kernels.examples import Shape

ROOT = Path(__file__).parents[2]


@pytest.fixture
def absent(monkeypatch):
    """Triton's driver is left as it was."""
    monkeypatch.setattr(gpu_compile.driver, "_active", None)


def names(launches: list[gpu_compile.Launch]) -> set[str]:
    return {launch.kernel.fn.__name__ for launch in launches}


def test_every_kernel_has_an_example():
    modules = gpu_compile.modules()
    assert {module.__name__.rpartition(".")[2] for module in modules} >= {
        "encode_topk_triton",
        "decode_triton",
    }
    for module in modules:
        assert names(gpu_compile.examples_of(module, Shape())) == gpu_compile.entries(module), module.__name__


def test_the_encoders_kernels_have_an_account():
    (module,) = [module for module in gpu_compile.modules() if module.__name__.endswith("encode_topk_triton")]
    sizes = Shape(rows=8192)
    costs = {}
    for launch in gpu_compile.examples_of(module, sizes):
        given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constants
        costs[launch.kernel.fn.__name__] = COSTS[launch.kernel.fn.__name__](given)
    assert costs["_sweep"].flops == 2 * sizes.rows * sizes.width * sizes.latents
    # both matrices once, the bias, and 8 bytes for each 16 columns of a row
    matrices = 2 * sizes.width * (sizes.rows + sizes.latents) + 4 * sizes.latents
    assert costs["_sweep"].streamed == matrices + sizes.rows * sizes.latents // 2
    # the maxima once, and value and place of what is chosen
    assert costs["_select"].streamed == sizes.rows * (sizes.latents // 4 + 8 * sizes.k)
    assert costs["_order"].streamed == sizes.rows * sizes.k * (8 + 8 + 4)
    assert costs["_finish"].gathered < costs["_sweep"].streamed / 10


@pytest.mark.usefixtures("absent")
def test_dead_latents_that_come_and_go_compile_few_kernels_anew():
    """A run with AuxK on codes: the encoder's kernels at N, and at any number of dead latents."""
    (module,) = [module for module in gpu_compile.modules() if module.__name__.endswith("encode_topk_triton")]
    dead = torch.randint(1, 131_072, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    shapes = [Shape(), *(Shape(latents=count, k=min(256, count)) for count in [*dead, 1, 16, 256, 300, 4096])]
    launches = [launch for shape in shapes for launch in gpu_compile.examples_of(module, shape)]
    found = gpu_compile.specialised(launches, "sm_90")
    assert {name for name, _ in found} == {"_sweep", "_select", "_finish", "_order"}
    assert len(found) <= 12


@pytest.mark.slow
@pytest.mark.parametrize(("targets", "dtype"), [("sm_80,sm_90,gfx942", "bfloat16"), ("sm_90", "float32")])
def test_they_fit_and_do_not_spill(targets, dtype, tmp_path):
    """In a process of its own, because Triton decides on import whether it interprets."""
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.gpu_compile", "--targets", targets, "--dtypes", dtype]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--json", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())
    assert {row["target"] for row in rows} == set(targets.split(","))
    (sweep,) = [row for row in rows if (row["kernel"], row["target"]) == ("_sweep", "sm_90")]
    assert sweep["spilled"] == 0
    assert sweep["blocks"] >= (2 if dtype == "bfloat16" else 1)
