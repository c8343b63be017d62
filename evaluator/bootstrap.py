"""Intervals: the 95 % bootstrap over whatever was sampled: windows, unless a figure names another unit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.evaluation import Figure

# A percentile bootstrap makes no assumption on the shape, and figures such as a single latent's ablation
# sparsity are heavy-tailed.
_DRAWS = 1000
_QUANTILES = (0.025, 0.975)


def figure(
    id: str,
    statistic: Callable[..., float],
    *columns: NDArray[np.floating],
    seed: int = 0,
    unit: str = "windows",
    note: str = "",
) -> Figure:
    """Compute a figure that is a function of means over samples, with its bootstrap interval.

    Args:
        id: Id of its definition.
        statistic: Takes the mean of each column: `lambda a: a` for a mean, `lambda a, b: a / b` for a ratio
            of sums.
        columns: float [n] each, one entry per sample.
        seed: Seed of the draws.
        unit: What a sample is.
        note: Note of the figure.

    Returns:
        The figure. Its value is None without samples or if the statistic is not finite, its interval is None
        with fewer than two samples.
    """
    table = np.stack([np.asarray(column, np.float64) for column in columns])
    n = table.shape[1]
    if not n:
        return Figure(id=id, value=None, samples=0, unit=unit, note=note or "nothing to measure")
    # A denominator of 0 is an answer here, not an accident: the figure then has no value and says why.
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(*table.mean(1)))
        if not np.isfinite(value):
            return Figure(id=id, value=None, samples=n, unit=unit, note=note or "not finite: no spread")
        low = high = None
        if n > 1:
            draw = np.random.default_rng(seed)
            # Samples are drawn whole, all columns together, so that a ratio keeps its numerators and
            # denominators paired.
            drawn = [statistic(*table[:, draw.integers(0, n, n)].mean(1)) for _ in range(_DRAWS)]
            # A draw in which nothing varies has no ratio. It is left out rather than spoiling both ends.
            finite = np.array([each for each in drawn if np.isfinite(each)])
            if len(finite):
                low, high = (float(edge) for edge in np.quantile(finite, _QUANTILES))
    return Figure(id=id, value=value, low=low, high=high, samples=n, unit=unit, note=note)


def mean_figure(id: str, column: NDArray[np.floating], **options: object) -> Figure:
    """Compute a figure that is the mean of one column; `options` as in `figure`."""
    return figure(id, lambda mean: mean, column, **options)  # pyright: ignore[reportArgumentType]
