"""A step in micro-batches is the step of the whole batch."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from tests.unit.trainer.step.test_fused import B, K, N, make, rows, target_of
from winnow.schemas.errors import ConfigError
from winnow.schemas.training import MeshSpec, TrainSpec
from winnow.trainer.mesh.fit import check_mesh
from winnow.trainer.run.checkpoint import pack
from winnow.trainer.step import Run, auxk, train_step

RECIPES = {
    "topk": {},
    "without AuxK": {"auxk_coefficient": 0, "clip_norm": 1e-3},
    "multi": {"multi_topk": True},
    "K falls": {"k_start": 20, "multi_topk": True},
    "dataset": {"normalize": "dataset"},
    "batchtopk": {"activation": "batchtopk"},
    "matryoshka": {"matryoshka": [7, 20, 50]},
    "transcoder, skip": {"target_hook": "h.2", "skip": True},
}


def train(run: Run, steps: int, count: int = B) -> list:
    reports = []
    for step in range(steps):
        x, weights = rows(step, count), torch.ones(count, dtype=torch.float64)
        weights[step::9] = 0
        weights[1::5] *= 0.5
        x[step::9] = math.nan
        if step == 3:
            weights[: count // 4] = 0  # whole micro-batches without a row
        reports.append(train_step(run, x, weights, target_of(run.recipe.spec, x)))
    return reports


@pytest.mark.parametrize("dense", [0, 10**9], ids=["AuxK on codes", "AuxK dense"])
@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES)
def test_it_is_the_step_of_the_whole_batch(monkeypatch, fields, dense):
    monkeypatch.setattr(auxk, "DENSE_AUX", dense)
    runs = [make("cpu", **fields, accumulate=parts) for parts in (1, 8)]
    whole, parts = (train(run, 12) for run in runs)
    for one, other in zip(whole, parts, strict=True):
        for field in ("loss", "auxk", "grad_norm", "fvu", "l0"):
            assert getattr(other, field) == pytest.approx(getattr(one, field), rel=1e-12), field
        assert (other.dead, other.rows, other.lr) == (one.dead, one.rows, one.lr)
    assert runs[0].counts == runs[1].counts
    if "auxk_coefficient" not in fields:
        assert runs[0].counts.auxk_steps > 5
    one, other = (pack(run) for run in runs)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("fields", [{}, {"auxk_k": 64}], ids=["few", "all"])
def test_auxk_that_is_not_finite_counts_as_0_and_is_counted(fields):
    run = make("cpu", normalize="none", accumulate=4, **fields)
    run.dead.since[:] = 10**6
    with torch.no_grad():
        run.sae.W_dec.zero_()
        run.sae.b_pre.copy_(rows(4)[0])
    report = train_step(run, rows(4)[:1].expand(B, -1), torch.ones(B, dtype=torch.float64))
    assert report is not None
    assert report.auxk == 0
    assert run.counts.auxk_nonfinite == run.counts.auxk_steps == 1


def test_a_batch_of_weight_0_moves_only_the_step_number():
    run = make("cpu", accumulate=4)
    before = pack(run)
    assert train_step(run, rows(0), torch.zeros(B, dtype=torch.float64)) is None
    changed = {name for name, tensor in pack(run).items() if not torch.equal(tensor, before[name])}
    assert changed == {"count.step"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"accumulate": 7}, "accumulate must divide batch_rows: batch_rows=64, accumulate=7"),
        ({"accumulate": 16, "activation": "batchtopk"}, "whole groups: selection_groups=8, accumulate=16"),
        ({"accumulate": 2, "kernels": "eager"}, "accumulate: 2 needs the fused step"),
        ({"accumulate": 2, "activation": "jumprelu"}, "accumulate: 2 needs the fused step"),
        ({"compute_dtype": "bfloat16", "kernels": "eager"}, "compute_dtype: bfloat16 needs the fused step"),
    ],
)
def test_what_cannot_be_right_is_refused(fields, words):
    base = {"out": "x", "hook": "h.1", "latents": N, "k": K, "batch_rows": 64}
    with pytest.raises(ValidationError, match=words):
        TrainSpec.model_validate(base | fields)


def test_a_mesh_whose_parts_would_cut_a_group_is_refused():
    spec = make("cpu", accumulate=8, activation="batchtopk").recipe.spec
    with pytest.raises(ConfigError, match=r"selection_groups: 8.*data x accumulate \(2 x 8\)"):
        check_mesh(spec.model_copy(update={"mesh": MeshSpec(data=2)}), 2)
