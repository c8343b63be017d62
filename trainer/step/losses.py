"""The reconstruction loss, and the rows of a step.

Legend: B rows, D d_model, N latents, M dead latents, K active latents per row.

Every function takes row weights [B], of rows that `winnow.trainer.step.train.prepare` has kept; sums are
divided by the sum of weights.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from winnow.sae.metrics import sum_squares


def reconstruction_loss(
    x: Tensor, x_hat: Tensor, weights: Tensor, constant: float, total: Tensor | None = None
) -> Tensor:
    """Squared error per row over `constant`, so that predicting the mean costs about 1.

    `total` [] is the weight of all rows, if these are only some of them.
    """
    # by the weight of the whole batch: a mean of ranks' means would weigh a row by its rank
    return sum_squares(x - x_hat, weights) / ((weights.sum() if total is None else total) * constant)


class Rows(NamedTuple):
    """One step's rows of weight above 0, normalised."""

    x: Tensor
    """[B, D]: what is read."""
    y: Tensor
    """[B, O]: what is reconstructed; x itself except for a transcoder."""
    weights: Tensor
    """[B]."""
    groups: tuple[int, ...]
    """Rows of each group that BatchTopK selects in, in order; their sum is B."""
