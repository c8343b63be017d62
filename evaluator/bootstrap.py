"""Intervals: the 95 % bootstrap over whatever was sampled (windows, unless a figure says otherwise)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.evaluation import Figure

DRAWS = 1000
QUANTILES = (0.025, 0.975)


def figure(
    id: str,
    statistic: Callable[..., float],
    *columns: NDArray[np.floating],
    seed: int = 0,
    unit: str = "windows",
    note: str = "",
) -> Figure:
    """A figure that is a function of means over samples, with its bootstrap interval.

    Args:
        id: The definition.
        statistic: Takes one mean a column: `lambda a: a` for a mean, `lambda a, b: a / b` for a ratio of
            sums.
        columns: float [n] each, one entry a sample; samples are drawn whole, all columns together.
        seed: Of the draws.
        unit: What a sample is.
        note: Goes into the figure.

    Returns:
        The figure; its value is None without samples or where the statistic is not finite, its interval is
        None with fewer than two samples.
    """
    table = np.stack([np.asarray(column, np.float64) for column in columns])
    n = table.shape[1]
    if not n:
        return Figure(id=id, value=None, samples=0, unit=unit, note=note or "nothing to measure")
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(*table.mean(1)))
        if not np.isfinite(value):
            return Figure(id=id, value=None, samples=n, unit=unit, note=note or "not finite: no spread")
        low = high = None
        if n > 1:
            draw = np.random.default_rng(seed)
            drawn = [statistic(*table[:, draw.integers(0, n, n)].mean(1)) for _ in range(DRAWS)]
            finite = np.array([each for each in drawn if np.isfinite(each)])
            if len(finite):
                low, high = (float(edge) for edge in np.quantile(finite, QUANTILES))
    return Figure(id=id, value=value, low=low, high=high, samples=n, unit=unit, note=note)


def mean_figure(id: str, column: NDArray[np.floating], **options: object) -> Figure:
    """The mean of one column."""
    return figure(id, lambda mean: mean, column, **options)  # pyright: ignore[reportArgumentType]
