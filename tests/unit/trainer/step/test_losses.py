"""FVU, L0, the loss, AuxK and Multi-TopK against the formulas written out, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from winnow.sae import metrics
from winnow.sae.model import PARAMETERS, Sae
from winnow.schemas.training import TrainSpec
from winnow.trainer.step import Recipe, Run, losses, spec
from winnow.trainer.step.context import StepContext

B, D, N, K = 40, 10, 30, 3


def make(seed=0) -> Sae:
    draw = torch.Generator().manual_seed(seed)
    sae = Sae(D, N, K, "none", dtype=torch.float64)
    with torch.no_grad():
        for name in PARAMETERS:
            tensor = getattr(sae, name)
            tensor.copy_(torch.randn(tensor.shape, generator=draw, dtype=torch.float64))
        sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
    return sae


def rows(seed=1, count=B) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(sae, loss):
    found = torch.autograd.grad(loss, [getattr(sae, name) for name in PARAMETERS], allow_unused=True)
    return dict(zip(PARAMETERS, found, strict=True))


def context(sae, weights, dead=(), constant=1.0, **fields) -> StepContext:
    """Of a step in which these latents are dead."""
    base = {"out": "x", "hook": "h.1", "latents": N, "k": K, "batch_rows": 64, "normalize": "none"}
    run = Run(sae, Recipe.resolve(TrainSpec.model_validate(base | fields), D, 5), constant)
    run.dead.since[list(dead)] = 10**9
    return StepContext.of(run, weights)


# ---- definitions


def test_fvu_is_the_formula_however_the_rows_are_cut():
    x, x_hat = 3 * rows(1) + 100, 3 * rows(1) + 100 + 0.1 * rows(2)
    expected = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    for cut in (B, 7, 1):
        fvu = metrics.Fvu(D)
        for a, b in zip(x.split(cut), x_hat.split(cut), strict=True):
            fvu.add(a, b)
        assert fvu.value == pytest.approx(expected.item(), rel=1e-12)
        assert fvu.rows == B


def test_predicting_the_mean_has_fvu_1_and_loss_1():
    x, w = rows(), torch.ones(B, dtype=torch.float64)
    fvu = metrics.Fvu(D)
    fvu.add(x, x.mean(0).expand_as(x))
    assert fvu.value == pytest.approx(1)
    constant = metrics.variance_per_row(x, w).item()
    assert losses.reconstruction_loss(x, x.mean(0), w, constant).item() == pytest.approx(1)


def test_fractional_weights_count_as_that_many_rows():
    x, x_hat = rows(1), rows(2)
    weights = torch.arange(B, dtype=torch.float64) % 3
    repeated = torch.repeat_interleave(torch.arange(B), weights.long())
    weighted, plain = metrics.Fvu(D), metrics.Fvu(D)
    weighted.add(x, x_hat, weights)
    plain.add(x[repeated], x_hat[repeated])
    assert weighted.value == pytest.approx(plain.value, rel=1e-12)


@pytest.mark.parametrize("garbage", [1e30, math.nan, math.inf])
def test_rows_of_weight_0_do_not_reach_the_figures(garbage):
    x, x_hat, values = rows(1), rows(2), rows(3).relu()
    weights = torch.ones(B)
    weights[::4] = 0
    clean, dirty, l0, l0_dirty = metrics.Fvu(D), metrics.Fvu(D), metrics.L0(), metrics.L0()
    clean.add(x[weights > 0], x_hat[weights > 0])
    l0.add(values[weights > 0])
    for tensor in (x, x_hat, values):
        tensor[::4] = garbage
    dirty.add(x, x_hat, weights)
    l0_dirty.add(values, weights)
    assert dirty.value == clean.value
    assert l0_dirty.value == l0.value


def test_figures_without_rows_are_nan():
    fvu = metrics.Fvu(D)
    fvu.add(rows(), rows(), torch.zeros(B))
    assert math.isnan(fvu.value)
    assert math.isnan(metrics.L0().value)


def test_l0_counts_positive_values():
    l0 = metrics.L0()
    l0.add(torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]]))
    l0.add(torch.tensor([[1.0, 1.0, 1.0]]))
    assert l0.value == pytest.approx(5 / 3)


# ---- AuxK


def naive_auxk(sae, x, e, weights, dead, k_aux):
    """Gao et al., A.2, over all N latents with the living ones masked out; e taken as given."""
    pre = (x - sae.b_pre) @ sae.W_enc.T + sae.b_enc
    masked = pre.masked_fill(~torch.isin(torch.arange(N), dead), -math.inf)
    top = masked.topk(min(k_aux, len(dead)), dim=1)
    z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    e_hat = z @ sae.W_dec
    mean = (weights[:, None] * e).sum(0) / weights.sum()
    return (weights[:, None] * (e - e_hat) ** 2).sum() / (weights[:, None] * (e - mean) ** 2).sum()


@pytest.mark.parametrize("k_aux", [2, 8, 30])
def test_auxk_and_its_gradients_are_the_formula(k_aux):
    sae, x = make(), rows()
    weights = torch.rand(B, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.5
    dead = torch.tensor([1, 4, 5, 9, 16, 17, 20, 29])
    error = x - sae.reconstruct(*sae.select(x))
    ctx = context(sae, weights, dead.tolist(), auxk_k=k_aux)
    found = spec.auxk_loss(ctx, x, error, weights, sae.b_pre)
    expected = naive_auxk(sae, x, error.detach(), weights, dead, k_aux)
    assert found.finite
    assert found.value == found.loss.item()
    torch.testing.assert_close(found.loss, expected)
    ours, naive = gradients(sae, found.loss), gradients(sae, expected)
    for name in PARAMETERS:
        torch.testing.assert_close(ours[name], naive[name], msg=name)
    alive = torch.ones(N, dtype=torch.bool).index_fill(0, dead, False)
    assert not ours["W_dec"][alive].any()
    assert not ours["W_enc"][alive].any()


def test_auxk_that_is_not_finite_counts_as_0():
    sae, x, w = make(), rows(), torch.ones(B, dtype=torch.float64)
    ctx = context(sae, w, [0], auxk_k=4)
    found = spec.auxk_loss(ctx, x, torch.ones(B, D, dtype=torch.float64), w, sae.b_pre)
    assert not found.finite  # the error does not vary: 0 in the denominator
    assert found.loss.item() == 0
    assert not found.loss.requires_grad


# ---- Multi-TopK


def test_multi_topk_is_the_loss_at_k_plus_an_eighth_of_that_at_4k():
    sae, x, w = make(), rows(), torch.ones(B, dtype=torch.float64)
    ctx = context(sae, w, constant=2.0, multi_topk=True)
    found, x_hat, codes = spec.multi_topk_loss(ctx, losses.Rows(x, x, w, (B,)), sae.b_pre)
    assert torch.equal(codes.values, sae.select(x)[0])
    narrow, wide = sae.reconstruct(*sae.select(x)), sae.reconstruct(*sae.select(x, 4 * K))
    torch.testing.assert_close(x_hat, narrow)
    expected = ((x - narrow).square().sum() + (x - wide).square().sum() / 8) / B / 2.0
    torch.testing.assert_close(found, expected)
    ours, naive = gradients(sae, found), gradients(sae, expected)
    for name in PARAMETERS:
        torch.testing.assert_close(ours[name], naive[name], msg=name)
