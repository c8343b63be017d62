"""The sparse route against the specification."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from winnow.sae.init import initialise
from winnow.sae.model import PARAMETERS, Sae
from winnow.schemas.errors import ConfigError, DependencyMissing
from winnow.schemas.training import TrainSpec
from winnow.trainer.run.checkpoint import pack, unpack
from winnow.trainer.step import Recipe, Run, auxk, sparse, spec, train_step
from winnow.trainer.step.context import StepContext
from winnow.trainer.step.losses import Rows

B, D, N, K, OUT = 96, 12, 80, 4, 7


def rows(seed: int, count: int = B, dtype=torch.float64) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(count, D, generator=draw, dtype=torch.float64) * 3 + 1).to(dtype)


def target_of(spec: TrainSpec, x: torch.Tensor) -> torch.Tensor | None:
    """A transcoder's target: something of x, and not linear."""
    return x[:, :OUT].relu() + x[:, -OUT:] if spec.target_hook else None


def make(kernels: str, dtype=torch.float64, **fields) -> Run:
    base = {"out": "x", "hook": "h.1", "latents": N, "k": K, "batch_rows": 64, "epochs": 8}
    base |= {"dead_after_tokens": 150, "auxk_k": 6, "lr": 0.003, "kernels": kernels}
    spec = TrainSpec.model_validate(base | fields)
    parts = spec.parts({"h.1": D, "h.2": OUT} if spec.target_hook else {"h.1": D - 5, "h.2": 5})
    sae = Sae(D, N, spec.k, spec.normalize, parts if fields else None, dtype=dtype)
    sample = rows(99, 500, dtype)
    target = target_of(spec, sample)
    constant = initialise(sae, sample, torch.ones(500, dtype=dtype), seed=0, target=target)
    with torch.no_grad():
        sae.b_enc[: N // 5] = -30.0 if spec.normalize == "none" else -0.3  # silent, so that AuxK has work
    return Run(sae, Recipe.resolve(spec, D, steps_per_epoch=5), constant)


RECIPES = {
    "plain": {"auxk_coefficient": 0, "clip_norm": None, "ema": False},
    "everything": {},
    "clipped on every step": {"clip_norm": 1e-3},
    "all dead latents": {"auxk_k": 64},
    "few of them": {"auxk_k": 1},
    "multi": {"multi_topk": True},
    "multi, K = N/2": {"multi_topk": True, "k": N // 2},
    "every latent": {"k": N},
    "K falls": {"k_start": 20, "multi_topk": True},
    "K falls, batchtopk": {"k_start": 20, "activation": "batchtopk"},
    "dataset": {"normalize": "dataset"},
    "none": {"normalize": "none"},
    "batchtopk": {"activation": "batchtopk"},
    "batchtopk, a row a group": {"activation": "batchtopk", "lanes": 32, "selection_groups": 32},
    "matryoshka": {"matryoshka": [7, 20, 50]},
    "matryoshka, batchtopk": {"matryoshka": [7, 20, 50], "activation": "batchtopk"},
    "transcoder": {"target_hook": "h.2"},
    "transcoder, skip, batchtopk": {"target_hook": "h.2", "skip": True, "activation": "batchtopk"},
    "transcoder, skip, matryoshka": {"target_hook": "h.2", "skip": True, "matryoshka": [30]},
    "transcoder, multi": {"target_hook": "h.2", "multi_topk": True, "target_normalize": "none"},
    "crosscoder": {"with_hooks": ["h.2"], "normalize": "dataset"},
}


@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES)
def test_training_in_float64_is_the_eager_training(fields):
    runs = [make(kernels, **fields) for kernels in ("eager", "cpu")]
    for step in range(25):
        x, weights = rows(step), torch.ones(B, dtype=torch.float64)
        weights[step::9] = 0
        x[step::9] = math.nan
        y = target_of(runs[0].recipe.spec, x)
        eager, found = (train_step(run, x.clone(), weights, y) for run in runs)
        assert eager is not None
        assert found is not None
        for field in ("loss", "auxk", "grad_norm", "lr", "dead", "fvu", "l0"):
            assert getattr(found, field) == pytest.approx(getattr(eager, field), rel=1e-9), (step, field)
        torch.testing.assert_close(found.x_hat, eager.x_hat, rtol=1e-8, atol=1e-9)
    assert runs[0].counts == runs[1].counts
    if "auxk_coefficient" not in fields and fields.get("k") != N:
        assert runs[0].counts.auxk_steps > 5
    assert torch.equal(runs[0].dead.since, runs[1].dead.since)
    eager, found = (pack(run) for run in runs)
    assert eager.keys() == found.keys()
    for name, tensor in eager.items():
        assert tensor.dtype == found[name].dtype
        torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-9, msg=name)


def take(route, run, batch):
    """A step's gradients alone."""
    step = route.begin(StepContext.of(run, batch.weights), 1)
    step.take(batch)
    return step.end().read()[0]


def test_loss_curves_in_float32_agree():
    runs = [make(kernels, torch.float32) for kernels in ("eager", "cpu")]
    curves = torch.tensor(
        [
            [train_step(run, rows(s, dtype=torch.float32), torch.ones(B)).loss for s in range(30)]
            for run in runs
        ]
    )
    torch.testing.assert_close(curves[1], curves[0], rtol=2e-3, atol=0)
    assert curves[0, -1] < curves[0, 0]


@pytest.mark.parametrize("auxk_k", [2, 6, 64])
@pytest.mark.parametrize("multi_topk", [False, True])
def test_gradients_in_float32_are_within_1e_5_of_dense_autograd(auxk_k, multi_topk):
    run = make("cpu", torch.float32, auxk_k=auxk_k, multi_topk=multi_topk)
    run.dead.since[3:50] = 1000
    x = run.sae.normalise(rows(1, dtype=torch.float32))[0]
    weights = torch.rand(B, generator=torch.Generator().manual_seed(3)) + 0.5
    twin = copy.deepcopy(run)
    twin.sae.double()
    found, expected = (
        take(route, of, Rows(x.to(w), x.to(w), w, (B,)))
        for route, of, w in ((sparse, run, weights), (spec, twin, weights.double()))
    )
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.auxk == pytest.approx(expected.auxk, rel=1e-5)
    assert found.auxk_finite
    for name in PARAMETERS:
        grad, exact = getattr(run.sae, name).grad, getattr(twin.sae, name).grad.float()
        assert (grad - exact).abs().max() < 1e-5 * max(1.0, exact.abs().max().item()), name


def test_auxk_that_is_not_finite_counts_as_0_and_is_counted():
    results = []
    for kernels in ("eager", "cpu"):
        run = make(kernels, normalize="none")
        run.dead.since[:] = 10**6
        with torch.no_grad():
            run.sae.W_dec.zero_()
            run.sae.b_pre.copy_(rows(4)[0])
        report = train_step(run, rows(4)[:1].expand(B, D), torch.ones(B, dtype=torch.float64))
        assert report is not None
        assert report.auxk == 0
        results.append((run.counts.auxk_nonfinite, pack(run)["sae.b_enc"]))
    assert results[0][0] == results[1][0] == 1
    torch.testing.assert_close(*(weights for _, weights in results))


def test_dense_and_sparse_auxk_are_the_same(monkeypatch):
    finals = []
    for share in (0, 10**9):
        monkeypatch.setattr(auxk, "DENSE_AUX", share)
        run = make("cpu", auxk_k=3)
        for step in range(12):
            train_step(run, rows(step), torch.ones(B, dtype=torch.float64))
        assert run.counts.auxk_steps > 5
        finals.append(pack(run))
    for name, tensor in finals[0].items():
        torch.testing.assert_close(finals[1][name], tensor, rtol=1e-8, atol=1e-10, msg=name)


def test_a_state_that_was_packed_goes_on_with_the_same_bits():
    def go(run, steps):
        for step in steps:
            train_step(run, rows(step, dtype=torch.float32), torch.ones(B))

    whole, first, second = (make("cpu", torch.float32) for _ in range(3))
    go(whole, range(20))
    go(first, range(9))
    unpack(second, pack(first))
    go(second, range(9, 20))
    for name, tensor in pack(whole).items():
        assert torch.equal(pack(second)[name], tensor), name


def test_eager_stays_selectable_and_auto_is_fused_on_a_cpu():
    assert make("eager").kernels == "eager"
    assert make("auto").kernels == "cpu"


def test_a_backend_that_cannot_run_here_is_refused():
    with pytest.raises((ConfigError, DependencyMissing), match="kernels: triton"):
        make("triton")


def test_two_threads_give_the_same_bits_every_run():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        finals = []
        for _ in range(3):
            spec = {"latents": 1500, "k": 16, "auxk_k": 64, "batch_rows": 512}
            run = make("cpu", torch.float32, **spec)
            for step in range(4):
                run.dead.since[::9] = 1000
                train_step(run, rows(step, 1100, torch.float32), torch.ones(1100))
            finals.append(pack(run))
    finally:
        torch.set_num_threads(threads)
    for other in finals[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in finals[0].items())


@pytest.mark.parametrize("candidates", [1, 4])
def test_batchtopk_takes_rows_that_have_more_than_their_candidates_exactly(monkeypatch, candidates):
    monkeypatch.setattr(sparse, "BATCH_CANDIDATES", candidates)
    runs = [make(kernels, activation="batchtopk") for kernels in ("eager", "cpu")]
    with torch.no_grad():
        for run in runs:
            run.sae.b_enc[: N // 5] = 0.0
    x = rows(5)
    x[::12] *= 300  # one row of every group takes what it can
    for run in runs:
        run.sae.normalize_mode = "none"  # rows as unequal as they are
    eager, found = (train_step(run, x, torch.ones(B, dtype=torch.float64)) for run in runs)
    fullest = int((eager.values > 0).sum(1).max())
    assert fullest > 4 * K
    assert int((found.values > 0).sum(1).max()) == fullest
    assert found.loss == pytest.approx(eager.loss, rel=1e-9)
    torch.testing.assert_close(found.x_hat, eager.x_hat, rtol=1e-8, atol=1e-9)
    for name in PARAMETERS:
        torch.testing.assert_close(getattr(runs[1].sae, name), getattr(runs[0].sae, name), msg=name)


def test_kernels_that_a_variant_lacks_are_refused_and_auto_says_so(told):
    assert make("auto", activation="relu").kernels == "eager"
    assert "eager, since activation relu" in told[0]
    with pytest.raises(ConfigError, match="eager or auto"):
        make("cpu", activation="jumprelu")
