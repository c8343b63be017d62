"""`benchmarks.storage_cost` at toy size: its figures are the store's, and its formats are what they say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.storage_cost import simulate, storage, training
from winnow.schemas.config import Config
from winnow.store.format import order as order_module
from winnow.store.objects import open_store
from winnow.store.testing import make_plan, write_dataset

HOOK = "resid_post.1"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("storage-cost"))
    write_dataset(open_store(root), make_plan(units=4, hooks={HOOK: 16}))
    return root


@pytest.fixture(autouse=True)
def any_mixing(monkeypatch):
    monkeypatch.setattr(order_module, "LARGEST_DESIGN_EFFECT", float("inf"))


def test_bytes_and_time(root):
    figures = storage(root, None, 2, 1)["bytes"]
    assert (figures["hook"], figures["units"], figures["source_dtype"]) == (HOOK, 2, "bfloat16")
    overhead = (64 * 4 + 64 * 16 + 4) / figures["rows_per_unit"]
    for dtype, width in (("bfloat16", 2), ("float16", 2), ("float32", 4), ("int8", 1.25)):
        assert figures["by_dtype"][dtype]["none"]["bytes_per_token"] == pytest.approx(16 * width + overhead)
    assert figures["by_dtype"]["float32"]["zstd"]["bytes_per_token"] < 16 * 4
    assert figures["by_dtype"]["bfloat16"]["none"]["read_cpu_over_raw"] == 1
    assert all(figures["by_dtype"][d]["zstd"]["write_cpu_over_raw"] > 0 for d in figures["by_dtype"])


@pytest.mark.parametrize(
    ("name", "steps", "error"),
    [("int8", 127, 0.5 / 127), ("fp8_e4m3", 448, 1 / 16), ("fp8_e5m2", 57344, 1 / 8)],
)
def test_simulated_formats(name, steps, error):
    rows = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * 100
    rows[3] = 0
    found, most = simulate(name, rows), rows.abs().amax(dim=1, keepdim=True)
    assert torch.allclose(found.abs().amax(dim=1, keepdim=True), most, rtol=1e-6)
    assert torch.equal(found[3], rows[3])
    bound = most if name == "int8" else rows.abs() + most / steps
    assert ((found - rows).abs() <= error * bound * (1 + 1e-5)).all()
    assert torch.equal(simulate(name, found).float(), found) or name != "int8"


def test_training_on_a_simulated_stream(root):
    spec = {"out": "unused", "hook": HOOK, "latents": 32, "k": 4, "batch_rows": 64, "epochs": 1.0}
    config = Config.model_validate({"root": root, "train": spec | {"sample_rows": 128, "threads": 1}})
    found = training(config, ["int8"], delta_ce=False)
    assert found["as_stored"]["steps"] == found["int8"]["steps"] == 3 * 512 // 64
    assert found["int8"]["fvu_cost"] == found["int8"]["fvu"] - found["as_stored"]["fvu"] != 0
