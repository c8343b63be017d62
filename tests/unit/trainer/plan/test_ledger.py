"""The ledger of a step: what it counts, what it refuses to guess, that it needs neither a GPU nor Triton."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from winnow.schemas.training import TrainSpec
from winnow.trainer.kernels.cost import COSTS, Cost, cost_of, heard
from winnow.trainer.plan.answers import Answers
from winnow.trainer.plan.ledger import Ledger
from winnow.trainer.plan.paper import Paper, step_on_paper
from winnow.trainer.plan.rates import GPUS, Rates, parts_of

CUDA = torch.device("cuda", 0)
SIZE = {"latents": 4096, "k": 8, "batch_rows": 2048, "compute_dtype": "bfloat16"}


def spec_of(**fields) -> TrainSpec:
    return TrainSpec(**{"out": "x", "hook": "h.1", "auxk_coefficient": 0.0, **SIZE} | fields)


def ledger_of(**fields) -> Ledger:
    usual = {"dead": 0, "k": 8, "shards": 1, "batched": False, "clip_norm": 1.0}
    return Ledger(Answers(**usual | fields), CUDA)


def told(paper: Paper) -> dict[str, int]:
    """Calls by kernel or operation."""
    found: dict[str, int] = {}
    for site, entry in paper.entries.items():
        found[site.what] = found.get(site.what, 0) + entry.operations
    return found


def test_an_operation_is_entered_with_its_bytes_and_products():
    ledger = ledger_of()
    with ledger.kept():
        a, b = (torch.empty(size, 64, dtype=torch.bfloat16, device=CUDA) for size in (32, 128))
        made = torch.mm(a, b.T)
        ledger.mark("one")
        made.add_(1)
        torch.ones(5).sum().item()  # of the host
        ledger.end()
    (product,) = (entry for site, entry in ledger.entries.items() if site.what == "mm")
    assert product.flops == {("bfloat16", False): 2 * 32 * 64 * 128}
    assert product.streamed == 2 * (32 * 64 + 128 * 64 + 32 * 128)
    assert {(site.part, site.what) for site in ledger.entries} == {
        *(("one", what) for what in ("empty", "mm")),
        ("count", "add"),
    }
    assert ledger.peak == ledger.live == product.streamed
    assert not any(entry.syncs for entry in ledger.entries.values())


def test_a_product_into_a_tensor_that_is_there_costs_the_same():
    ledger = ledger_of()
    with ledger.kept():
        a, b = (torch.empty(size, 64, dtype=torch.bfloat16, device=CUDA) for size in (32, 128))
        torch.mm(a, b.T, out=torch.empty(32, 128, dtype=torch.bfloat16, device=CUDA))
        ledger.end()
    (product,) = (entry for site, entry in ledger.entries.items() if site.what == "mm")
    assert product.flops == {("bfloat16", False): 2 * 32 * 64 * 128}
    assert product.streamed == 2 * (32 * 64 + 128 * 64 + 32 * 128)


def test_what_is_freed_leaves_the_peak():
    ledger = ledger_of()
    with ledger.kept():
        kept = torch.empty(100, device=CUDA)
        torch.empty(1000, device=CUDA)
        view = kept[:10]
        assert (ledger.live, ledger.peak) == (400, 4400)
        del kept
        assert ledger.live == 400, "a view holds it"
        del view
    assert ledger.live == 0


def test_the_device_answers_what_is_usual_and_each_answer_is_a_wait():
    ledger = ledger_of(dead=3)
    with ledger.kept():
        rows = torch.empty(10, device=CUDA)
        assert int((rows > 0).sum()) == 10
        assert not bool((rows == 1).any())
        assert bool((rows > 0).all())
        assert rows.norm().item() == 2.0, "which is clipped"
        assert torch.tensor([4, 6], device=CUDA).tolist() == [4, 6]
        assert torch.stack([rows.norm(), (rows > 0).sum().to(rows)]).tolist() == [2.0, 10.0]
        assert len(rows[rows > 0]) == 10
        assert len((rows > 1).nonzero()) == 0, "what is looked for is rare"
    assert sum(entry.syncs for entry in ledger.entries.values()) == 8


def test_nothing_is_guessed():
    ledger = ledger_of()
    with ledger.kept(), pytest.raises(NotImplementedError, match=r"no usual answer.*int64"):
        int(torch.empty(3, dtype=torch.int64, device=CUDA).max())
    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="_of_nobody"), arg_names=["x"])
    with ledger.kept(), pytest.raises(NotImplementedError, match="_of_nobody has no account"):
        heard(kernel, (1,), (torch.empty(3, device=CUDA),), {})
    assert not heard(kernel, (1,), (), {}), "a launch is only told of while a ledger is kept"


def test_a_launch_is_priced_by_the_account_of_its_kernel(monkeypatch):
    monkeypatch.delitem(COSTS, "_ours", raising=False)
    cost_of("_ours")(lambda given: Cost(given["N"] * 2.0, 5, 7))
    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="_ours"), arg_names=["x", "N"])
    ledger = ledger_of()
    with ledger.kept():
        x = torch.empty(3, device=CUDA)
        assert heard(kernel, (1,), (x, 4), {"PRECISION": "tf32x3"})
        ledger.end()
    COSTS.pop("_ours")
    (entry,) = (entry for site, entry in ledger.entries.items() if site.what == "_ours")
    assert (entry.flops, entry.streamed, entry.gathered) == ({("tf32x3", True): 8.0}, 5, 7)
    rates = Rates.of(GPUS["h100"], fused=0.5)
    assert rates.multiply("tf32x3", True, 6.0) == pytest.approx(2 * 6 * 6.0 / rates.product)


def test_a_step_multiplies_the_encoder_once_and_sums_both_gradients():
    paper = step_on_paper(spec_of(), 64)
    found = told(paper)
    assert set(COSTS) >= {
        what for what in found if what.startswith("_") and what not in ("_to_copy", "_fused_adam")
    }
    rates = Rates.of(GPUS["h100"])
    parts = parts_of(((site.part, entry) for site, entry in paper.entries.items()), rates)
    assert list(parts) == ["encode", "decode", "backward", "update"]
    product = 2 * SIZE["batch_rows"] * 64 * SIZE["latents"]
    assert product <= parts["encode"].flops <= 2 * product, "a pilot at most beside it"
    entries = SIZE["batch_rows"] * SIZE["k"]
    assert parts["backward"].gathered >= 2 * entries * 64 * 2
    # nothing of the step is counted twice: a step of twice the rows has twice the products
    twice = step_on_paper(spec_of(batch_rows=2 * SIZE["batch_rows"]), 64)
    assert sum(sum(e.flops.values()) for e in twice.entries.values()) == pytest.approx(
        2 * sum(sum(e.flops.values()) for e in paper.entries.values()), rel=0.01
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"activation": "batchtopk"},
        {"multi_topk": True},
        {"accumulate": 2, "moments": "int8"},
        {"matryoshka": (256, 4096)},
        {"activation": "relu", "compute_dtype": "float32"},
        {"activation": "jumprelu", "compute_dtype": "float32"},
    ],
)
def test_every_variant_is_taken(fields):
    paper = step_on_paper(spec_of(**fields), 64)
    assert paper.peak > sum(paper.held.values())
    assert sum(entry.operations for entry in paper.entries.values()) > 50


@pytest.mark.parametrize(
    ("activation", "data", "latent"), [("topk", 2, 1), ("topk", 1, 2), ("batchtopk", 2, 2)]
)
def test_a_mesh_holds_its_share_and_sends(activation, data, latent):
    paper = step_on_paper(spec_of(activation=activation), 64, data=data, latent=latent)
    assert paper.held["counts"] == 8 * SIZE["latents"] // latent
    assert (paper.sent["data"] > 1000) == (data > 1)
    assert (paper.sent["latent"] > 1000) == (latent > 1)


def test_dead_latents_cost_and_are_held():
    spec = spec_of(auxk_coefficient=1 / 32, auxk_k=16)
    alive, dead = step_on_paper(spec, 64), step_on_paper(spec, 64, dead_share=0.1)
    assert dead.peak > alive.peak
    assert sum(e.operations for e in dead.entries.values()) > sum(
        e.operations for e in alive.entries.values()
    )


def test_triton_need_not_be_installed():
    code = """
import sys, json
sys.modules["triton"] = None
from winnow.schemas.training import TrainSpec
from winnow.trainer.plan.paper import step_on_paper
found = step_on_paper(TrainSpec.model_validate_json(sys.argv[1]), 64)
assert sys.modules["triton"] is None
assert not [name for name in sys.modules if name.startswith("winnow.trainer.kernels.") and "_triton" in name]
print(json.dumps([found.peak, sum(e.streamed + e.gathered for e in found.entries.values())]))
"""
    spec = spec_of()
    run = [sys.executable, "-c", code, spec.model_dump_json()]
    without = json.loads(subprocess.run(run, stdout=subprocess.PIPE, check=True, timeout=120).stdout)
    here = step_on_paper(spec, 64)
    assert without == [here.peak, sum(e.streamed + e.gathered for e in here.entries.values())]
