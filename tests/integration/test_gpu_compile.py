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
from winnow.trainer.kernels.encode_topk import Wanted
from winnow.trainer.kernels.examples import Shape
from winnow.trainer.kernels.step_ops import aligned

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
        # a module may launch a kernel of another one beside its own
        assert names(gpu_compile.examples_of(module, Shape())) >= gpu_compile.entries(module), module.__name__


def test_the_encoders_kernels_have_an_account():
    (module,) = [module for module in gpu_compile.modules() if module.__name__.endswith("encode_topk_triton")]
    sizes = Shape(rows=8192)
    costs = {}
    for launch in gpu_compile.examples_of(module, sizes):
        if launch.use:
            continue
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
    """On codes the encoder's kernels at N and at any number of dead latents; if AuxK is dense, at N alone."""
    (module,) = [module for module in gpu_compile.modules() if module.__name__.endswith("encode_topk_triton")]
    dead = torch.randint(1, 131_072, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    dead += [1, 16, 256, 300, 4096]

    def on_codes() -> None:
        for shape in (Shape(), *(Shape(latents=count, k=min(256, count)) for count in dead)):
            x, W = shape.empty(16, shape.width), shape.empty(shape.latents, shape.width)
            module.encode_topk(x, W, shape.empty(shape.latents, dtype=torch.float32), shape.k)

    def dense() -> None:
        shape = Shape()
        x, W = shape.empty(16, shape.width), shape.empty(shape.latents, shape.width)
        b = shape.empty(shape.latents, dtype=torch.float32)
        for ids in (shape.empty(count, dtype=torch.int64) for count in dead):
            module.encode_topk(x, W, b, shape.k, Wanted(ids, aligned(16, len(ids), x)))

    found = gpu_compile.specialised(gpu_compile.caught(on_codes), "sm_90")
    assert {name for name, _ in found} == {"_sweep", "_select", "_finish", "_order"}
    assert len(found) <= 12
    assert len(gpu_compile.specialised(gpu_compile.caught(dense), "sm_90")) == 4


@pytest.mark.usefixtures("absent")
def test_a_dense_aux_k_of_any_number_of_dead_latents_is_compiled_once_for_each_width_of_rows():
    (module,) = [module for module in gpu_compile.modules() if module.__name__.endswith("auxk_triton")]

    def steps() -> None:
        for count in range(1, 16_384, 97):
            z = aligned(16, count, torch.empty(0, dtype=torch.bfloat16, device="meta"))
            module.keep_best(z, 256)
            rows, W = (z.new_empty(size, 768) for size in (16, count))
            module.grads_of_codes(rows, W, z)
            module.errors(rows, rows.float(), rows[:, 0].float(), z.dtype)

    found = gpu_compile.specialised(gpu_compile.caught(steps), "sm_90")
    forms = [sum(kernel == name for kernel, _ in found) for name in ("_grads", "_errors", "_keep_best")]
    # one of 16 numbers, and of 128 to 16,384
    assert forms == [1, 1, 9]


def test_the_table_names_what_a_kernel_is_launched_for_and_shows_what_takes_most():
    one = {"kernel": "_one", "use": "", "dtype": "bfloat16", "target": "sm_90", "spilled": 0, "shared": 2048}
    rows = [one | {"registers": count, "blocks": 2} for count in (20, 40, 30)]
    rows.append(one | {"use": "of bounds", "registers": 50, "blocks": 1})
    assert gpu_compile.markdown(rows).splitlines()[2:] == [
        "| `_one` | bfloat16 | 40 / 0 / 2 K / 2 |",
        "| `_one` of bounds | bfloat16 | 50 / 0 / 2 K / 1 |",
    ]


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
    sweeps = {row["use"]: row for row in rows if (row["kernel"], row["target"]) == ("_sweep", "sm_90")}
    assert set(sweeps) == {"", "with dead latents", "of bounds", "of 256 per row"}
    # what is written of dead latents takes no block away; products of bounds are always of bfloat16
    for use in ["of bounds", *(["", "with dead latents"] if dtype == "bfloat16" else [])]:
        assert sweeps[use]["blocks"] >= 2, use
