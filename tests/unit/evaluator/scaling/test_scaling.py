"""Laws with known parameters are found again; what is held out is predicted; too little is refused."""

from __future__ import annotations

import numpy as np
import pytest

from winnow.evaluator.scaling.laws import (
    COMPUTE,
    JOINT,
    PLAIN,
    Cell,
    Curve,
    fit,
    frontier,
    gain_of_twice_the_tokens,
    hold_out_largest,
    log_shape,
    losses,
    mean_error,
    smoothed,
)
from winnow.schemas.errors import ConfigError

TRUTH = np.array([0.9, -0.35, -0.25, -0.012, -3.2, -0.15])
SIZES = [(n, k) for n in (512, 1024, 2048, 4096, 8192) for k in (8, 16, 32, 64)]


def cells(noise: float, parameters=TRUTH, law=JOINT) -> list[Cell]:
    draw = np.random.default_rng(3)
    bare = [Cell(n, k, 1.0, 1.0, 0.0, 1.0) for n, k in SIZES]
    true = law.value(parameters, log_shape(bare)) * np.exp(noise * draw.standard_normal(len(bare)))
    return [cell._replace(loss=float(value)) for cell, value in zip(bare, true, strict=True)]


def test_the_joint_law_is_found_without_noise():
    found = fit(JOINT, log_shape(cells(0)), losses(cells(0)), bootstraps=0)
    np.testing.assert_allclose(found.parameters, TRUTH, rtol=0.02, atol=0.005)
    assert found.rms < 1e-5
    assert np.isnan(found.low).all()


def test_with_noise_intervals_hold_the_truth_and_the_curve_is_close():
    noisy = cells(0.003)
    found = fit(JOINT, log_shape(noisy), losses(noisy), bootstraps=40)
    predicted = found.predict(log_shape(noisy)) / JOINT.value(TRUTH, log_shape(noisy))
    assert np.abs(predicted - 1).max() < 0.01
    inside = (found.low <= TRUTH) & (found.high >= TRUTH)
    assert inside.sum() >= 4, found.named()
    assert (found.low < found.high).all()
    assert set(found.named()) == {"a", "bk", "bn", "g", "z", "h"}


def test_one_wild_cell_hardly_moves_the_fit():
    wild = cells(0.002)
    wild[7] = wild[7]._replace(loss=wild[7].loss * 2)
    found = fit(JOINT, log_shape(wild), losses(wild), bootstraps=0)
    ratio = found.predict(log_shape(wild)) / JOINT.value(TRUTH, log_shape(wild))
    assert np.abs(np.delete(ratio, 7) - 1).max() < 0.03


def test_the_law_predicts_the_largest_better_than_a_power_law_and_a_neighbour():
    held = hold_out_largest(cells(0.001))
    assert [(h.cell.latents, h.cell.k) for h in held] == [(8192, k) for k in (8, 16, 32, 64)]
    joint, plain, nearest = (mean_error([getattr(h, n) for h in held]) for n in ("joint", "plain", "nearest"))
    assert joint < 0.01
    assert joint < plain < nearest


def test_where_the_truth_is_a_power_law_both_say_so():
    plain = cells(0, np.array([0.5, -0.4, -0.2]), PLAIN)
    held = hold_out_largest(plain)
    assert mean_error([h.plain for h in held]) < 1e-6
    assert mean_error([h.joint for h in held]) < 0.01


def test_the_law_of_compute_comes_from_the_frontier_of_curves():
    truth = np.array([4.0, -0.2, -2.0])
    curves = []
    for n in (512, 1024, 2048, 4096):
        compute = 6 * n * 64.0 * np.geomspace(1e4, 1e7, 80)
        best = 6 * n * 64 * 3e5  # each is best around its own compute
        penalty = 1 + 0.05 * np.log(compute / best) ** 2
        curves.append(Curve(n, 8, compute, COMPUTE.value(truth, np.log(compute)[:, None]) * penalty))
    compute, loss, latents = frontier(curves, 40)
    assert set(np.unique(latents)) == {512, 1024, 2048, 4096}
    assert (np.diff(latents) >= 0).all()
    on_the_law = COMPUTE.value(truth, np.log(compute)[:, None])
    assert (loss >= on_the_law * 0.999).all()
    assert (loss / on_the_law).min() < 1.01, "it touches the law where a curve is best"
    found = fit(COMPUTE, np.log(compute)[:, None], on_the_law, bootstraps=5)
    np.testing.assert_allclose(found.parameters, truth, rtol=0.02)
    assert len(frontier(curves[:1])[0]) == 0


def test_convergence_is_the_gain_of_twice_the_tokens():
    tokens = np.arange(1, 101) * 1000.0
    assert gain_of_twice_the_tokens(tokens, tokens**-0.5) == pytest.approx(1 - 2**-0.5)
    assert gain_of_twice_the_tokens(tokens, np.full(100, 0.3)) == pytest.approx(0, abs=1e-12)
    assert np.isnan(gain_of_twice_the_tokens(tokens[:5], tokens[:5]))
    assert Cell(8, 2, 0.1, 1.0, 0.01, 1.0).converged
    assert not Cell(8, 2, 0.1, 1.0, float("nan"), 1.0).converged
    assert smoothed(np.array([1.0, 3, 5, 7]), 2).tolist() == [1, 2, 4, 6]


@pytest.mark.parametrize("wrong", [cells(0)[:6], [cell._replace(loss=float("nan")) for cell in cells(0)]])
def test_too_few_or_broken_cells_are_refused(wrong):
    with pytest.raises(ConfigError):
        fit(JOINT, log_shape(wrong), losses(wrong))
