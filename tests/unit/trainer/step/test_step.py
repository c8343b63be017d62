"""One step: its order, what weight 0 means, what happens to numbers that are not."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from winnow.sae.init import initialise
from winnow.sae.model import PARAMETERS, Sae
from winnow.schemas.errors import NonFiniteError
from winnow.schemas.training import TrainSpec
from winnow.trainer.step import Recipe, Run, dead_after_rows, train_step

B, D, N, K = 64, 8, 24, 3


def make(**fields) -> Run:
    spec = TrainSpec(
        **{"out": "x", "hook": "h.1", "latents": N, "k": K, "batch_rows": B, "epochs": 4} | fields
    )
    sae = Sae(D, N, K, spec.normalize)
    constant = initialise(sae, rows(99, 500), torch.ones(500), seed=0)
    return Run(sae, Recipe.resolve(spec, D, steps_per_epoch=5), constant)


def rows(seed: int, count: int = B) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: getattr(run.sae, name).detach().clone() for name in PARAMETERS}


def test_a_step_is_gradient_projection_clipping_adam_and_renormalisation():
    run = make(clip_norm=0.01, normalize="none", auxk_coefficient=0, lr=0.05)
    twin = copy.deepcopy(run.sae)
    x = rows(1)
    report = train_step(run, x, torch.ones(B))

    pre = (x - twin.b_pre) @ twin.W_enc.T + twin.b_enc
    mask = torch.zeros_like(pre).scatter(1, pre.topk(K, dim=1).indices, 1.0)
    loss = (x - (pre * mask).relu() @ twin.W_dec - twin.b_pre).square().sum(1).mean() / run.loss_constant
    loss.backward()
    with torch.no_grad():
        twin.W_dec.grad -= (twin.W_dec.grad * twin.W_dec).sum(1, keepdim=True) * twin.W_dec
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    torch.optim.Adam(twin.parameters(), lr=0.05, eps=6.25e-10).step()
    with torch.no_grad():
        twin.W_dec.copy_(F.normalize(twin.W_dec, dim=1))
    assert report is not None
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, tensor in weights_of(run).items():
        torch.testing.assert_close(tensor, getattr(twin, name).detach(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("multi_topk", [False, True])
@pytest.mark.parametrize("garbage", [1e30, math.nan, math.inf])
def test_rows_of_weight_0_take_part_in_nothing(garbage, multi_topk):
    runs = [make(dead_after_tokens=50, multi_topk=multi_topk) for _ in range(2)]
    for run in runs:
        with torch.no_grad():
            run.sae.b_enc[:4] = -9  # silent, so that AuxK has work
    for step in range(8):
        x, weights = rows(step), torch.ones(B)
        weights[step::7] = 0
        dirty = x.clone()
        dirty[step::7] = garbage
        train_step(runs[0], x[weights > 0], weights[weights > 0])
        train_step(runs[1], dirty, weights)
    assert runs[0].counts == runs[1].counts
    assert runs[0].counts.auxk_steps > 0
    assert torch.equal(runs[0].dead.since, runs[1].dead.since)
    for name, tensor in weights_of(runs[0]).items():
        assert torch.equal(tensor, weights_of(runs[1])[name])


def test_a_batch_of_weight_0_moves_only_the_step_number():
    run = make()
    before = weights_of(run)
    assert train_step(run, rows(0), torch.zeros(B)) is None
    assert run.counts.step == 1
    assert run.counts.tokens == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(run).items())


def test_a_loss_that_is_not_finite_leaves_the_weights_and_names_the_step():
    run = make(normalize="none")
    train_step(run, rows(0), torch.ones(B))
    before = weights_of(run)
    with pytest.raises(NonFiniteError, match="step 1 "):
        train_step(run, rows(1) * 1e30, torch.ones(B))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(run).items())


def test_decoder_rows_stay_unit_and_the_last_epoch_is_counted():
    run = make()
    for step in range(run.recipe.steps):
        train_step(run, rows(step), torch.ones(B))
    torch.testing.assert_close(run.sae.W_dec.norm(dim=1), torch.ones(N))
    assert run.recipe.steps == 20
    assert run.counts.tokens - run.counts.tokens_before_last_epoch == 5 * B
    assert 0 <= run.dead_share_of_last_epoch <= 1


def test_open_fields_are_resolved():
    recipe = make().recipe
    assert recipe.k_aux == 4
    assert recipe.dead_after == 20 * B // 10
    long = Recipe.resolve(recipe.spec.model_copy(update={"epochs": 1e7}), D, 5)
    assert long.dead_after == 10_000_000
    assert Recipe.resolve(recipe.spec.model_copy(update={"epochs": 0.7}), D, 10).steps == 7


def test_a_latent_is_dead_after_a_fortieth_of_the_run_but_not_before_it_was_due():
    assert dead_after_rows(266_240, 4096, 32) == 6656
    assert dead_after_rows(266_240, 8192, 32) == 12_800  # 50 N/K
    assert dead_after_rows(266_240, 65_536, 32) == 26_624
    assert dead_after_rows(10**12, 65_536, 32) == 10_000_000
    assert dead_after_rows(5, 8, 1) == 1


def test_k_falls_from_k_start_and_the_sae_keeps_its_own():
    run = make(k_start=20, k_anneal_fraction=0.5)  # 20 steps, 10 of them above K
    assert [run.recipe.k_at(step) for step in (0, 1, 2, 9, 10, 19)] == [20, 20, 18, 6, 3, 3]
    reports = [train_step(run, rows(step), torch.ones(B)) for step in range(12)]
    widths = [report.values.shape[1] for report in reports if report is not None]
    assert widths[0] == 20
    assert widths == sorted(widths, reverse=True)
    assert widths[10:] == [K, K]
    assert run.sae.k == K
    assert make().recipe.k_at(0) == K


@pytest.mark.parametrize("k_start", [K - 1, N + 1])
def test_a_k_start_that_cannot_fall_to_k_is_refused(k_start):
    with pytest.raises(ValueError, match="k_start"):
        make(k_start=k_start)
