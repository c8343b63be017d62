"""Scaling laws of a sweep: L(N, K) and L(C), fitted in log space. Pure.

Legend: N latents, K active latents, D d_model, L the normalised held-out error (FVU), C compute.

The laws (Gao et al. 2024, section 3; symbols as in the paper)::

    L(N, K) = exp(a + bk log K + bn log N + g log K log N) + exp(z + h log K)
    L(C)    = exp(a + b log C) + exp(z)                          C = 6 N D tokens

Fits are robust least squares (soft L1) on log L from several starts. Intervals are percentiles of a residual
bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from winnow.schemas.errors import ConfigError

Array = NDArray[np.float64]
_SOFT = 0.02
"""Errors of log L beyond this count linearly, not squared: a run that went wrong must not bend the law."""
# The sum of two exponentials has local optima, so that one start may end in a bad fit.
_STARTS = 24
_BOOTSTRAPS = 400
_LOWEST = -14.0
"""Lower bound of z. An irreducible term of 1e-6 is as good as none, and without a bound z would run off to
minus infinity."""
_SAME_SLOPE_LOSS = 0.02
"""A cell has converged if twice the tokens would lower its loss by less than this share."""


class Cell(NamedTuple):
    """One SAE of a sweep."""

    latents: int
    k: int
    loss: float
    """Held-out FVU in the normalised space."""
    compute: float
    """6 N D tokens, in FLOP."""
    gain: float
    """Share by which twice the tokens would lower the training loss, from its slope at constant learning
    rate; NaN with too few lines of telemetry."""
    overfit: float
    """Held-out loss over the training loss of the last lines of telemetry."""

    @property
    def converged(self) -> bool:
        """Whether more tokens would hardly help."""
        # NaN compares as False: an SAE with too few lines has not been shown to converge.
        return self.gain < _SAME_SLOPE_LOSS


@dataclass(frozen=True)
class _Law:
    """A sum of exponentials of terms that are linear in the parameters."""

    names: tuple[str, ...]
    """Names of the parameters."""
    terms: Callable[[Array], list[Array]]
    """x [n, F] -> for each term, what multiplies its own parameters [n, P_t]; in the order of the names."""
    starts: tuple[tuple[float, float], ...]
    """Range of each parameter from which starts are drawn uniformly."""
    bounds: tuple[tuple[float, float], ...]
    """Bounds of each parameter."""

    def value(self, parameters: Array, x: Array) -> Array:
        """Compute L [n] at x [n, F]."""
        return _sum(parameters, self.terms(x))[0]


def _sum(parameters: Array, terms: Sequence[Array]) -> tuple[Array, Array]:
    """Compute the sum L [n] of the terms, and the derivatives of log L by the parameters [n, P]."""
    parts: list[Array] = []
    start = 0
    for term in terms:
        stop = start + term.shape[1]
        # Clipped to what exp can represent: on its way the fit tries parameters that are far off.
        parts.append(np.exp(np.clip(term @ parameters[start:stop], -700, 700)))
        start = stop
    total = np.sum(parts, axis=0)
    slopes = [term * (part / total)[:, None] for term, part in zip(terms, parts, strict=True)]
    return total, np.concatenate(slopes, 1)


def _joint(x: Array) -> list[Array]:
    n, k = x[:, 0], x[:, 1]
    one = np.ones_like(n)
    return [np.stack([one, k, n, k * n], 1), np.stack([one, k], 1)]


def _plain(x: Array) -> list[Array]:
    return [np.stack([np.ones(len(x)), x[:, 1], x[:, 0]], 1)]


def _compute(x: Array) -> list[Array]:
    return [np.stack([np.ones(len(x)), x[:, 0]], 1), np.ones((len(x), 1))]


# Bounds are wide: they keep the fit from overflowing, and only z's lower one is ever meant to be reached.
FREE = (-60.0, 60.0)
JOINT = _Law(
    ("a", "bk", "bn", "g", "z", "h"),
    _joint,
    ((-2, 4), (-1.5, 0.5), (-1, 0), (-0.1, 0.1), (-8, -1), (-1, 0.2)),
    (FREE, (-5, 5), (-5, 5), (-2, 2), (_LOWEST, 2), (-3, 3)),
)
PLAIN = _Law(("a", "bk", "bn"), _plain, ((-2, 4), (-1, 0), (-1, 0)), (FREE, (-5, 5), (-5, 5)))
COMPUTE = _Law(("a", "b", "z"), _compute, ((0, 20), (-1, 0), (-8, -1)), (FREE, (-5, 0), (_LOWEST, 2)))
"""Here x is log C."""


@dataclass(frozen=True)
class Fit:
    """A fitted law."""

    law: _Law
    parameters: Array
    """In the order of the law's names."""
    rms: float
    """Root mean square of the errors of log L."""
    low: Array
    """Lower ends of the parameters' 95 % intervals; NaN without bootstrap."""
    high: Array
    """Upper ends."""

    def predict(self, x: Array) -> Array:
        """Predict L at x [n, F]."""
        return self.law.value(self.parameters, x)

    def named(self) -> dict[str, dict[str, float]]:
        """Return the parameters with their intervals, by name."""
        rows = zip(self.law.names, self.parameters, self.low, self.high, strict=True)
        return {name: {"value": float(v), "low": float(a), "high": float(b)} for name, v, a, b in rows}


def fit(law: _Law, x: Array, loss: Array, *, seed: int = 0, bootstraps: int = _BOOTSTRAPS) -> Fit:
    """Fit a law to losses.

    Args:
        law: Its form.
        x: [n, F], logarithms.
        loss: [n], above 0.
        seed: Seed of starts and bootstrap.
        bootstraps: Number of bootstrap fits; 0 leaves the intervals NaN.

    Raises:
        ConfigError: There are no more points than parameters, or a loss is not a positive number.
    """
    count, size = len(loss), len(law.names)
    if count <= size:
        raise ConfigError(
            f"the law with {', '.join(law.names)}",
            expected=f"more than {size} SAEs",
            got=count,
            fix="Sweep a larger grid",
        )
    if not (np.isfinite(loss).all() and (loss > 0).all()):
        raise ConfigError("the losses of the sweep", expected="numbers above 0", got=loss.tolist())
    draw = np.random.default_rng(seed)
    starts = [draw.uniform(*zip(*law.starts, strict=True)) for _ in range(_STARTS)]
    log_loss: Array = np.log(np.asarray(loss, dtype=float))
    best = _best(law, x, log_loss, starts)
    predicted: Array = np.log(law.value(best, x))
    errors = log_loss - predicted
    # Fitted errors are smaller than true ones, by the parameters that were spent on them: n - p for n points.
    wide = (errors - errors.mean()) * math.sqrt(count / (count - size))
    # Errors are drawn anew onto the predictions; the points themselves are a designed grid, not a sample. Two
    # starts, the best fit and another: all 24 for each of 400 draws would take twelve times as long.
    again = [
        _best(law, x, predicted + draw.choice(wide, count), [best, starts[number % _STARTS]])
        for number in range(bootstraps)
    ]
    nan = np.full(size, np.nan)
    low, high = np.percentile(again, [2.5, 97.5], axis=0) if again else (nan, nan)
    return Fit(law, best, float(np.sqrt(np.mean(errors**2))), low, high)


def _best(law: _Law, x: Array, log_loss: Array, starts: Sequence[Array]) -> Array:
    low, high = (np.array(side, dtype=float) for side in zip(*law.bounds, strict=True))

    terms = law.terms(x)
    found = [
        least_squares(
            lambda p: np.log(_sum(p, terms)[0]) - log_loss,
            np.clip(start, low, high),
            jac=lambda p: _sum(p, terms)[1],  # pyright: ignore[reportArgumentType]
            bounds=(low, high),
            loss="soft_l1",
            f_scale=_SOFT,
            # Parameters differ in scale: a is of the order of 1, g of 0.1.
            x_scale="jac",
            max_nfev=300,
        )
        for start in starts
    ]
    return min(found, key=lambda result: result.cost).x


# ---- L(N, K) -------------------------------------------------------------------------------------


def log_shape(cells: Sequence[Cell]) -> Array:
    """Return log N and log K of each cell, [n, 2]."""
    return np.log(np.array([[cell.latents, cell.k] for cell in cells], dtype=float).reshape(-1, 2))


def losses(cells: Sequence[Cell]) -> Array:
    """Return the loss of each cell, [n]."""
    return np.array([cell.loss for cell in cells])


class HeldOut(NamedTuple):
    """Predictions by laws that were fitted to smaller SAEs, for an SAE that they have not seen."""

    cell: Cell
    """The unseen SAE."""
    joint: float
    """Error of the law: predicted over true loss, minus 1."""
    plain: float
    """Error of a power law without interaction and irreducible term."""
    nearest: float
    """Error of taking the loss of the nearest SAE in (log N, log K)."""


def hold_out_largest(cells: Sequence[Cell], *, seed: int = 0) -> list[HeldOut]:
    """Predict the SAEs of the largest N from all others.

    Raises:
        ConfigError: There are too few others to fit the law to.
    """
    largest = max(cell.latents for cell in cells)
    seen = [cell for cell in cells if cell.latents < largest]
    unseen = [cell for cell in cells if cell.latents == largest]
    x, true = log_shape(unseen), losses(unseen)
    # Beside two simpler predictions: a law is of use only if it beats them.
    joint = fit(JOINT, log_shape(seen), losses(seen), seed=seed, bootstraps=0).predict(x)
    plain = fit(PLAIN, log_shape(seen), losses(seen), seed=seed, bootstraps=0).predict(x)
    distance = np.linalg.norm(log_shape(seen)[None] - x[:, None], axis=2)
    nearest = losses(seen)[distance.argmin(1)]
    errors = [(predicted / true - 1).tolist() for predicted in (joint, plain, nearest)]
    return [HeldOut(cell, *each) for cell, *each in zip(unseen, *errors, strict=True)]


def mean_error(values: Sequence[float]) -> float:
    """Compute the mean absolute relative error."""
    return float(np.mean(np.abs(values)))


# ---- L(C) ----------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """A run's loss over its compute, while its learning rate was constant."""

    latents: int
    k: int
    compute: Array
    """[n], in FLOP, ascending."""
    loss: Array
    """[n], smoothed training FVU."""


def frontier(curves: Sequence[Curve], points: int = 24) -> tuple[Array, Array, Array]:
    """Find the smallest loss that any run has reached at a compute, and the N that reached it.

    Compute is divided into `points` equal steps of its logarithm.

    Returns:
        compute [m], loss [m], latents [m].
    """
    # From the second start to the second-to-last end: where only one run is left, its own curve is no
    # frontier.
    starts, ends = sorted(c.compute[0] for c in curves), sorted(c.compute[-1] for c in curves)
    if len(curves) < 2 or not starts[1] < ends[-2]:
        return np.empty(0), np.empty(0), np.empty(0)
    grid = np.geomspace(starts[1], ends[-2], points)
    table = np.array(
        [
            # In logarithms, in which the curves are nearly straight; infinite outside a run's range, so that
            # it cannot be the smallest there.
            np.interp(np.log(grid), np.log(c.compute), np.log(c.loss), left=np.inf, right=np.inf)
            for c in curves
        ]
    )
    best = table.argmin(0)
    return grid, np.exp(table.min(0)), np.array([curves[index].latents for index in best])


def smoothed(values: Array, width: int) -> Array:
    """Compute the running mean over the last `width` values, over fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stops = np.arange(1, len(values) + 1)
    starts = np.maximum(0, stops - width)
    return (sums[stops] - sums[starts]) / (stops - starts)


def gain_of_twice_the_tokens(tokens: Array, loss: Array) -> float:
    """Estimate the share by which twice the tokens would lower a loss, from its recent log-log slope.

    Args:
        tokens: [n], ascending, at constant learning rate.
        loss: [n].

    Returns:
        1 - 2^slope; NaN with fewer than 6 values in that half.
    """
    # The later half: the slope falls during training, and a mean over all of it would promise too much.
    later = tokens >= tokens[-1] / 2 if len(tokens) else np.zeros(0, bool)
    if later.sum() < 6:
        return float("nan")
    slope = np.polyfit(np.log(tokens[later]), np.log(loss[later]), 1)[0]
    return float(1 - 2**slope)
