"""`reconstruct(...)`: what a step computes from a row's codes and the directions that they name, at once.

The reconstruction, its squared error, the gradient of the reconstruction and that of the codes' values all
read the same K directions per row: a GPU gathers them once (`reconstruct_triton`). Here is the specification.

Legend: B rows, O width of the output, N latents, K entries per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from winnow.trainer.kernels import reference


class Reconstructed(NamedTuple):
    """Sums are taken in float32."""

    y_hat: Tensor
    """float32 [B, O]."""
    squares: Tensor
    """float32 [B]: squared error of each row."""
    grad: Tensor
    """[B, O], of the directions' type: `share` times the error."""
    pull: Tensor
    """float32 [O]: the sum of the same over the rows, before it is rounded to that type."""
    dz: Tensor
    """float32 [B, K]: the gradient of the values, 0 unless they are above 0."""


def reconstruct(
    values: Tensor, indices: Tensor, W_dec: Tensor, y: Tensor, bias: Tensor, share: Tensor
) -> Reconstructed:
    """Reconstruct rows from codes, and differentiate the weighted squared error.

    Args:
        values: [B, K], at least 0.
        indices: int64 [B, K], each in [0, N).
        W_dec: [N, O], float32 or of half precision.
        y: float32 [B, O], what is reconstructed.
        bias: float32 [O].
        share: float32 [B]: the derivative of the loss by half a row's squared error.
    """
    y_hat = reference.decode(values, indices, W_dec.float()) + bias
    error = y_hat - y
    pulls = error * share[:, None]
    grad = pulls.to(W_dec.dtype)
    dots = reference.decode_grad_values(grad, indices, W_dec)
    return Reconstructed(
        y_hat, error.square().sum(1), grad, pulls.sum(0), torch.where(values <= 0, 0.0, dots)
    )
