"""The definitions of FVU and L0, for training, evaluation and benchmarks alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor


def present(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `x` [B, D] whose weight is above 0, and their weights."""
    keep = weights > 0
    # Most batches have no row of weight 0, and indexing would copy them.
    return (x, weights) if bool(keep.all()) else (x[keep], weights[keep])


# ---- definitions ---------------------------------------------------------------------------------


class Fvu:
    """Fraction of variance unexplained, streaming, in float64.

    ``sum_b w_b |x_b - x_hat_b|^2 / sum_b w_b |x_b - mean|^2`` with the weighted mean of all rows added.
    The space is the caller's: feed normalised rows for `fvu`, raw rows for `fvu_raw`.

    Args:
        d_model: Width D.
        device: Device of the sums.
    """

    def __init__(self, d_model: int, device: torch.device | str = "cpu") -> None:
        self._error = torch.zeros((), dtype=torch.float64, device=device)
        self._weight = torch.zeros_like(self._error)
        self._sum = torch.zeros(d_model, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._error)
        self._shift: Tensor | None = None

    def add(self, x: Tensor, x_hat: Tensor, weights: Tensor | None = None) -> None:
        """Add rows [B, D], their reconstruction [B, D] and their weights [B] (None: all 1)."""
        # Selected, not multiplied by 0: rows of weight 0 may hold NaN.
        w = torch.ones(len(x), device=x.device) if weights is None else weights
        keep = w > 0
        self.add_present(x[keep], x_hat[keep], w[keep])

    def add_present(self, x: Tensor, x_hat: Tensor, weights: Tensor) -> None:
        """The same for rows that are all of weight above 0: a GPU is not asked, and not waited for."""
        x, x_hat, w = x.double(), x_hat.double(), weights.double()
        if not len(x):
            return
        # Moments about the first batch's mean: about 0, the variance would be a small difference of large
        # sums where the mean is far from it.
        if self._shift is None:
            self._shift = (w @ x) / w.sum()
        centred = x - self._shift
        self._error += w @ (x - x_hat).square().sum(1)
        self._weight += w.sum()
        self._sum += w @ centred
        self._squares += w @ centred.square().sum(1)

    def over(self, add: Callable[[Tensor], Tensor]) -> Self:
        """Combine with the other ranks; `add` sums a tensor over the ranks, all of which must call this."""
        # A rank without rows has no shift, but must take part in every sum, or the others wait for it.
        shift = torch.zeros_like(self._sum) if self._shift is None else self._shift
        common = add(shift * self._weight) / add(self._weight.clone())
        # Each rank's moments are about its own first batch: moved to a common point before they are summed.
        move = shift - common
        self._squares += 2 * (move @ self._sum) + self._weight * move.square().sum()
        self._sum += self._weight * move
        self._shift = common
        for total in (self._error, self._weight, self._sum, self._squares):
            add(total)
        return self

    @property
    def rows(self) -> float:
        """Sum of the weights so far."""
        return self._weight.item()

    @property
    def variance(self) -> float:
        """``sum_b w_b |x_b - mean|^2`` so far."""
        return (self._squares - self._sum.square().sum() / self._weight).item()

    @property
    def value(self) -> float:
        """The FVU so far; NaN without rows or if they do not vary."""
        variance = self.variance
        return self._error.item() / variance if variance > 0 else float("nan")


class L0:
    """Mean number of active latents (value > 0) per row, streaming."""

    def __init__(self) -> None:
        # numbers, or scalars on a device, which is not waited for before the mean is read
        self._active: float | Tensor = 0.0
        self._weight: float | Tensor = 0.0

    def add(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Add the values [B, K] of codes and the rows' weights [B] (None: all 1)."""
        active = (values > 0).sum(1).double()
        w = torch.ones_like(active) if weights is None else weights.double()
        self._active = self._active + w @ active
        self._weight = self._weight + w.sum()

    def over(self, add: Callable[[Tensor], Tensor]) -> Self:
        """Combine with the other ranks; `add` sums a tensor over the ranks, all of which must call this."""
        sums = torch.tensor([float(self._active), float(self._weight)], dtype=torch.float64)
        self._active, self._weight = add(sums).tolist()
        return self

    @property
    def value(self) -> float:
        """Active latents per row; NaN without rows."""
        active, weight = float(self._active), float(self._weight)
        return active / weight if weight else float("nan")


# ---- training terms ------------------------------------------------------------------------------


def mean_row(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean [D] of rows [B, D]."""
    return (weights @ x) / weights.sum()


def sum_squares(x: Tensor, weights: Tensor) -> Tensor:
    """``sum_b w_b |x_b|^2`` of rows [B, D], a scalar."""
    return weights @ x.square().sum(1)


def variance_per_row(x: Tensor, weights: Tensor) -> Tensor:
    """Mean squared error of predicting the mean row, by which the loss is divided, a scalar."""
    return sum_squares(x - mean_row(x, weights), weights) / weights.sum()
