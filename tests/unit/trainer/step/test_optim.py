"""Learning rate, projection, clipping, renormalisation, moving average, dead counts, initialisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from winnow.sae.init import geometric_median, initialise
from winnow.sae.model import PARAMETERS, Sae
from winnow.schemas.errors import ConfigError, NonFiniteError
from winnow.schemas.training import TrainSpec
from winnow.trainer.step import optim, power_of_two_near
from winnow.trainer.step.dead import DeadCounter

D, N, K = 8, 24, 3


def spec(**fields) -> TrainSpec:
    return TrainSpec(**{"out": "x", "hook": "h.1", "latents": N, "k": K, "batch_rows": 64} | fields)


def make(dtype=torch.float64, seed=0) -> Sae:
    sae = Sae(D, N, K, "none", dtype=dtype)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in PARAMETERS:
            tensor = getattr(sae, name)
            tensor.copy_(torch.randn(tensor.shape, generator=draw, dtype=torch.float64))
            tensor.grad = torch.randn(tensor.shape, generator=draw, dtype=torch.float64).to(dtype)
        sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
    return sae


def test_the_learning_rate_rises_stays_and_falls():
    s = spec(lr=2.0, warmup_fraction=0.1, decay_fraction=0.2)
    rates = [optim.lr_at(step, 100, s) for step in range(100)]
    assert rates[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    assert rates[10:81] == pytest.approx([2.0] * 71)
    assert rates[80:] == pytest.approx([2.0 * (20 - i) / 20 for i in range(20)])
    assert optim.lr_at(5, 100, spec(lr=2.0, decay_fraction=0)) == 2.0


def test_the_learning_rate_follows_the_square_root_of_the_latents():
    assert optim.peak_lr(spec(latents=4096)) == pytest.approx(1e-3)
    assert optim.peak_lr(spec(latents=32768, lr_constant=0.018)) == pytest.approx(1e-4, rel=0.01)


def test_projection_comes_before_clipping_and_leaves_nothing_parallel():
    sae = make()
    before = {name: getattr(sae, name).grad.clone() for name in PARAMETERS}
    optim.project_decoder_gradient(sae)
    along = (sae.W_dec.grad * sae.W_dec).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-12, rtol=0)
    direction = sae.W_dec.detach()
    expected = before["W_dec"] - (before["W_dec"] * direction).sum(1, keepdim=True) * direction
    torch.testing.assert_close(sae.W_dec.grad, expected)

    parameters = [getattr(sae, name) for name in PARAMETERS]
    norm = optim.clip_gradients(parameters, 0.5)
    assert norm == pytest.approx(
        torch.cat([before["W_enc"].flatten(), before["b_enc"], expected.flatten(), before["b_pre"]])
        .norm()
        .item()
    )
    after = torch.cat([p.grad.flatten() for p in parameters]).norm().item()
    assert after == pytest.approx(0.5)
    assert optim.clip_gradients(parameters, None) == pytest.approx(0.5)
    assert optim.clip_gradients(parameters, 9.0) == pytest.approx(0.5)
    torch.testing.assert_close(sae.b_pre.grad, before["b_pre"] * 0.5 / norm)


def test_adam_is_the_papers():
    sae = make(torch.float32)
    adam = optim.make_adam(sae, spec(lr=0.1))
    expected = sae.b_pre.detach() - 0.1 * sae.b_pre.grad / (sae.b_pre.grad.abs() + 6.25e-10)
    adam.step()
    torch.testing.assert_close(sae.b_pre.detach(), expected)
    assert adam.defaults["betas"] == (0.9, 0.999)
    assert adam.defaults["eps"] == 6.25e-10


def test_decoder_rows_are_unit_after_renormalising():
    weights = torch.randn(N, D) * 5
    directions = F.normalize(weights, dim=1)
    optim.renormalise_decoder(weights)
    torch.testing.assert_close(weights, directions)


def test_the_moving_average_is_bias_corrected_and_renormalised():
    sae, beta = make(), 0.9
    ema = optim.Ema(sae, beta)
    seen = []
    for step in range(5):
        with torch.no_grad():
            sae.W_enc.add_(step)
            sae.W_dec.copy_(F.normalize(sae.W_dec + 0.3 * step, dim=1))
        ema.update(sae)
        seen.append({name: getattr(sae, name).detach().clone() for name in PARAMETERS})
    ages = torch.tensor([beta**age for age in range(4, -1, -1)], dtype=torch.float64)
    share = ages / ages.sum()
    for name, found in ema.weights().items():
        expected = sum(s * weights[name] for s, weights in zip(share, seen, strict=True))
        if name == "W_dec":
            expected = F.normalize(expected, dim=1)
        torch.testing.assert_close(found, expected)


def test_the_moving_averages_memory_is_a_twentieth_of_the_run():
    assert optim.ema_beta(spec(), 700) == pytest.approx(1 - 20 / 700)
    assert optim.ema_beta(spec(), 10**6) == 0.999
    assert optim.ema_beta(spec(), 10) == 0
    assert optim.ema_beta(spec(ema_beta=0.5), 10) == 0.5


@pytest.mark.parametrize(("half", "expected"), [(288, 256), (384, 512), (256, 256), (8, 8), (0.5, 1)])
def test_auxk_takes_the_nearest_power_of_two(half, expected):
    assert power_of_two_near(half) == expected


# ---- dead latents


def test_a_latent_is_dead_after_that_many_rows_of_silence():
    dead = DeadCounter(4)
    dead.update(dead.active(torch.tensor([[1.0, 0.0], [2.0, 1.0]]), torch.tensor([[0, 1], [0, 2]])), 2)
    assert dead.since.tolist() == [0, 2, 0, 2]  # latent 1 was chosen with value 0: silent
    dead.update(dead.active(torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([[2], [2], [2]])), 3)
    assert dead.since.tolist() == [3, 5, 0, 5]
    assert dead.silent(4).tolist() == [1, 3]
    assert dead.silent(3).tolist() == [0, 1, 3]


# ---- initialisation


def test_the_geometric_median_is_where_the_pulls_cancel():
    x = torch.randn(500, D, generator=torch.Generator().manual_seed(0)).double() + 4
    x[:20] += 1e4  # a mean would follow these
    weights = torch.rand(500, generator=torch.Generator().manual_seed(1)).double()
    median = geometric_median(x, weights)
    pulls = (weights[:, None] * F.normalize(x - median, dim=1)).sum(0)
    assert pulls.norm() < 1e-2
    assert (median - 4).norm() < 1


def test_the_geometric_median_may_be_one_of_the_rows():
    x = torch.cat([torch.zeros(10, D), torch.eye(D)])
    assert geometric_median(x, torch.ones(len(x))).norm() < 1e-3


@pytest.mark.parametrize("normalize", ["layer", "dataset", "none"])
def test_initialisation(normalize):
    sample = 5 * torch.randn(400, D, generator=torch.Generator().manual_seed(0)) + 2
    weights = torch.ones(400)
    weights[::5] = 0
    sae, other = Sae(D, N, K, normalize), Sae(D, N, K, normalize)
    constant = initialise(sae, sample, weights, seed=3)
    dirty = sample.clone()
    dirty[::5] = float("nan")
    assert initialise(other, dirty, weights, seed=3) == constant
    for name, tensor in sae.tensors().items():
        assert torch.equal(tensor, other.tensors()[name])

    x = sae.normalise(sample[weights > 0])[0].detach()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N))
    torch.testing.assert_close(F.normalize(sae.W_enc, dim=1), sae.W_dec)
    assert constant == pytest.approx((x - x.mean(0)).square().sum(1).mean().item(), rel=1e-5)
    out = (sae.reconstruct(*sae.select(x)) - sae.b_pre).square().sum()
    torch.testing.assert_close(out, (x - sae.b_pre).square().sum(), rtol=1e-4, atol=0)
    if normalize == "dataset":
        torch.testing.assert_close(x.mean(0), torch.zeros(D), atol=1e-5, rtol=0)
        assert x.square().sum(1).mean().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "norm"),
    [
        ({}, 0.5),
        ({"activation": "batchtopk"}, 0.5),
        ({"encoder_norm": 0.2}, 0.2),
        ({"encoder_norm": "match"}, None),
        ({"activation": "relu"}, None),
        ({"target_hook": "h.2"}, 0.1),
        ({"target_hook": "h.2", "activation": "jumprelu"}, None),
        ({"target_hook": "h.2", "encoder_norm": 2.0}, 2.0),
    ],
)
def test_the_encoder_starts_along_the_decoder_at_the_specs_norm(fields, norm):
    spec = TrainSpec(out="run", hook="h.1", latents=N, k=K, **fields)
    assert spec.first_encoder_norm == norm
    if norm is not None:
        sae, sample = Sae(D, N, K), torch.randn(400, D)
        initialise(sae, sample, torch.ones(400), seed=3, encoder_norm=norm)
        torch.testing.assert_close(sae.W_enc.detach(), norm * sae.W_dec.detach())


@pytest.mark.parametrize("value", [0, -1, "other"])
def test_an_encoder_norm_that_cannot_be_is_refused(value):
    with pytest.raises(ValueError, match="encoder_norm"):
        TrainSpec(out="run", hook="h.1", latents=N, k=K, encoder_norm=value)


def test_initialisation_refuses_a_sample_it_cannot_use():
    with pytest.raises(ConfigError, match="weight above 0"):
        initialise(Sae(D, N, K), torch.randn(10, D), torch.zeros(10), 0)
    with pytest.raises(ConfigError, match="differ"):
        initialise(Sae(D, N, K, "none"), torch.ones(10, D), torch.ones(10), 0)
    with pytest.raises(NonFiniteError):
        initialise(Sae(D, N, K), torch.full((10, D), float("inf")), torch.ones(10), 0)
