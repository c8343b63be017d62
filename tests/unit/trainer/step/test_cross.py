"""One step of a cross-layer transcoder: the sparse route against the specification, and a per-layer set."""

from __future__ import annotations

import pytest
import torch

from tests.support.cross import CASES, LAYERS, D, K, N, batch, go_cross, make_cross, pack_all
from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError, NonFiniteError
from winnow.schemas.layers import SetSpec
from winnow.trainer.step import Recipe, Run, cross, cross_spec, train_step
from winnow.trainer.step.context import StepContext
from winnow.trainer.step.cross_init import initialise_cross
from winnow.trainer.step.cross_train import _prepare, train_cross

LATENT = ("W_enc", "b_enc", "W_dec", "b_pre", "b_dec")


def close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name, **tolerance)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_training_in_float64_is_that_of_the_specification(fields):
    spec, found = (make_cross(kernels, **fields | {"accumulate": 1}) for kernels in ("eager", "cpu"))
    told, right = go_cross(found, 12), go_cross(spec, 12)
    for step, (layers, expected) in enumerate(zip(told, right, strict=True)):
        for layer, report in enumerate(layers):
            assert report == pytest.approx(expected[layer], rel=1e-9), (step, layer)
    close(pack_all(found), pack_all(spec), rtol=1e-7, atol=1e-9)
    assert all(run.counts.auxk_steps > 5 for run in (found[0], found[2]))
    assert [run.counts for run in found] == [run.counts for run in spec]


@pytest.mark.parametrize(
    ("activation", "pieces"), [("topk", 2), ("topk", 3), ("batchtopk", 2), ("batchtopk", 4)]
)
def test_micro_batches_are_the_whole_batch(activation, pieces):
    fields = {"activation": activation, "batch_rows": 192}
    whole, parts = make_cross("cpu", **fields), make_cross("cpu", **fields, accumulate=pieces)
    told, found = go_cross(whole), go_cross(parts)
    for layers, expected in zip(found, told, strict=True):
        for layer, report in enumerate(layers):
            assert report == pytest.approx(expected[layer], rel=1e-11)
    close(pack_all(parts), pack_all(whole), rtol=0, atol=1e-11)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_every_gradient_is_that_of_dense_autograd(activation):
    grads = []
    for kernels, route in (("eager", cross_spec), ("cpu", cross)):
        runs = make_cross(kernels, activation=activation)
        for run in runs:
            run.dead.since[::3] = 1000
        inputs, targets, weights = batch(1)
        step = route.begin(StepContext.of_layers(runs, weights), 1)
        step.take(_prepare(runs, weights, *inputs, *targets))
        found = step.end()
        assert all(outcome.auxk for outcome in found)
        grads.append(
            {f"{n}.{name}": getattr(run.sae, name).grad for n, run in enumerate(runs) for name in LATENT}
        )
    close(grads[1], grads[0], rtol=1e-9, atol=1e-13)
    for number in range(LAYERS):
        assert all(grads[1][f"{number}.{name}"].any() for name in LATENT)
        assert not grads[1][f"{number}.b_dec"][D:].any(), "only a target's own layer has its bias"


@pytest.mark.parametrize("candidates", [1, 4])
def test_a_row_that_takes_all_its_candidates_is_encoded_again(monkeypatch, candidates):
    monkeypatch.setattr(cross, "BATCH_CANDIDATES", candidates)
    spec, found = (make_cross(kernels, activation="batchtopk") for kernels in ("eager", "cpu"))
    inputs, targets, weights = batch(7)
    for x in inputs:
        x[::12] *= 100
    told, right = (train_cross(runs, inputs, targets, weights) for runs in (found, spec))
    assert told is not None
    assert right is not None
    assert max(int((report.values > 0).sum(1).max()) for report in told) > 4 * K
    assert told[0].second_rounds > 0
    close(pack_all(found), pack_all(spec), rtol=1e-7, atol=1e-9)


def test_batchtopk_gives_all_layers_together_k_per_row_and_layer():
    runs = make_cross("cpu", activation="batchtopk", auxk_coefficient=0)
    with torch.no_grad():
        runs[1].sae.b_enc += 0.5
    (told,) = go_cross(runs, 1)
    l0 = [report["l0"] for report in told]
    assert sum(l0) == pytest.approx(K * LAYERS, rel=0.05)
    assert l0[1] > K > min(l0)


def test_its_own_decoders_alone_are_a_per_layer_set():
    fields = {"clip_norm": None, "auxk_coefficient": 0}
    runs = make_cross("cpu", **fields)
    inputs, targets, weights = batch(3)
    single: list[Run] = []
    for run in runs:
        with torch.no_grad():
            run.sae.W_dec[:, D:] = 0
            torch.nn.functional.normalize(run.sae.W_dec, dim=1, out=run.sae.W_dec)
        spec = run.recipe.spec.model_copy(update={"set": SetSpec(layers=(2, 4))})
        of = spec.parts({run.recipe.spec.target_hook: D})
        sae = Sae(D, N, K, spec.normalize, of, dtype=torch.float64)
        tensors = {name: tensor[..., :D] if name in ("W_dec", "b_dec", "target_mean") else tensor
                   for name, tensor in run.sae.tensors().items()}  # fmt: skip
        tensors["target_scale"] = tensors["target_scale"].flatten()[0]
        sae.fill(tensors)
        single.append(Run(sae, Recipe.resolve(spec, D, 5), run.loss_constant))
    reports = train_cross(runs, inputs, targets, weights)
    assert reports is not None
    for run, other, x, y, report in zip(runs, single, inputs, targets, reports, strict=True):
        alone = train_step(other, x, weights, y)
        assert alone is not None
        assert report.loss == pytest.approx(alone.loss, rel=1e-12)
        torch.testing.assert_close(report.x_hat, alone.x_hat)
        torch.testing.assert_close(report.values, alone.values)
        for name in LATENT:
            grad, expected = getattr(run.sae, name).grad, getattr(other.sae, name).grad
            own = grad[..., :D] if name in ("W_dec", "b_dec") else grad
            torch.testing.assert_close(own, expected, msg=name)


@pytest.mark.parametrize("kernels", ["eager", "cpu"])
def test_a_batch_of_weight_0_moves_only_the_step_number(kernels):
    runs = make_cross(kernels)
    before = pack_all(runs)
    inputs, targets, weights = batch(0)
    assert train_cross(runs, inputs, targets, torch.zeros_like(weights)) is None
    changed = {name for name, tensor in pack_all(runs).items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{number}.count.step" for number in range(LAYERS)}


@pytest.mark.parametrize("kernels", ["eager", "cpu"])
def test_a_loss_that_is_not_finite_leaves_every_layer_as_it_was(kernels):
    runs = make_cross(kernels)
    go_cross(runs, 2)
    before = pack_all(runs)
    inputs, targets, weights = batch(0)
    targets[-1][weights > 0] = torch.inf
    with pytest.raises(NonFiniteError, match="loss of step 2"):
        train_cross(runs, inputs, targets, weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pack_all(runs).items())


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_packed_moments_and_bfloat16_products_learn_alike(moments):
    plain = make_cross("cpu", dtype=torch.float32)
    packed = make_cross("cpu", dtype=torch.float32, moments=moments, compute_dtype="bfloat16")
    told, found = go_cross(plain, 20), go_cross(packed, 20)
    for layer in range(LAYERS):
        assert found[-1][layer]["loss"] == pytest.approx(told[-1][layer]["loss"], rel=0.1)
        norms = packed[layer].sae.W_dec.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(N), rtol=1e-5, atol=1e-5)
        grad, rows = packed[layer].sae.W_dec.grad, packed[layer].sae.W_dec
        assert grad is not None
        assert grad.shape == rows.shape


def test_first_predictions_are_as_long_as_their_targets_and_every_layer_gives_its_share():
    runs = make_cross("cpu", latents=2000, k=32, encoder_norm="match")
    inputs, targets, weights = batch(99)
    batches = _prepare(runs, weights, *inputs, *targets)
    for run in runs:
        run.sae.b_enc.data.zero_()
    total, wanted, sums = 0.0, 0.0, [torch.zeros(len(batches[0].x), D) for _ in runs]
    for number, (run, rows) in enumerate(zip(runs, batches, strict=True)):
        given = run.shard.output(rows.x, run.sae.k).detach() - run.sae.b_dec.detach()
        for at, part in enumerate(given.split(D, 1)):
            sums[number + at] = sums[number + at] + part
        assert run.sae.W_dec.norm(dim=1).tolist() == pytest.approx([1.0] * 2000)
    for made, run, rows in zip(sums, runs, batches, strict=True):
        y = rows.y - run.sae.b_dec.detach()[:D]
        here, there = ((rows.weights @ of.square().sum(1)).item() for of in (made, y))
        assert 0.3 < here / there < 3
        total, wanted = total + here, wanted + there
    assert total == pytest.approx(wanted, rel=1e-9)
    # constants: one scale per target, in all layers that write to it; mean and bias in its own alone
    for number, run in enumerate(runs):
        assert not run.sae.b_dec[D:].any()
        assert not run.sae.target_mean[D:].any()
        scales = run.sae.target_scale.flatten()
        for at, scale in enumerate(scales):
            assert scale == runs[number + at].sae.target_scale.flatten()[0]
        assert run.loss_constant == pytest.approx(1.0, rel=1e-6)
    assert not torch.equal(runs[0].sae.W_enc, runs[1].sae.W_enc)


def test_a_sample_without_rows_is_refused():
    runs = make_cross("cpu")
    inputs, targets, weights = batch(0)
    with pytest.raises(ConfigError, match="2 rows of weight above 0"):
        initialise_cross(runs, inputs, targets, torch.zeros_like(weights))
