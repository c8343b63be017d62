"""What is fixed before the first step, from a sample of training rows.

Legend: B rows of the sample, D d_model, N latents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from schemas.errors import ConfigError, NonFiniteError
from trainer.losses import mean_row, present, sum_squares, variance_per_row
from trainer.sae import SMALLEST_NORM, Sae

CHUNK_ROWS = 4096
"""Rows encoded at once when the encoder is scaled."""


def geometric_median(x: Tensor, weights: Tensor, *, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point [D] with the least weighted sum of distances to rows x [B, D].

    Weiszfeld's iteration from the mean, in float64, until a move is under `tolerance` of the mean
    distance.
    """
    x, weights = x.double(), weights.double()
    median = mean_row(x, weights)
    for _ in range(iterations):
        distance = (x - median).norm(dim=1)
        typical = (weights @ distance / weights.sum()).item()
        if typical == 0:
            break
        moved = mean_row(x, weights / distance.clamp_min(1e-9 * typical))
        step = (moved - median).norm().item()
        median = moved
        if step < tolerance * typical:
            break
    return median


@torch.no_grad()
def initialise(sae: Sae, sample: Tensor, weights: Tensor, seed: int) -> float:
    """Fill a new SAE and give the loss constant.

    Dataset constants (where the normalisation has them) and `b_pre`, the geometric median, come from
    the sample; decoder rows are random unit vectors; the encoder starts as the decoder, scaled so that
    the reconstruction's root mean square distance from `b_pre` is the input's (Gao et al., A.1).

    Args:
        sae: A new SAE on its device.
        sample: Raw training rows [B, D].
        weights: Their weights [B]; rows of weight 0 are left out.
        seed: Of the decoder's directions. Drawn on the CPU, so that every device starts alike.

    Returns:
        The error, a row, of predicting the sample's mean in the normalised space.

    Raises:
        ConfigError: The sample holds fewer than two rows of weight above 0, or rows that do not vary.
        NonFiniteError: The sample holds NaN or infinity.
    """
    sample, weights = present(sample.to(sae.W_enc), weights.to(sae.W_enc))
    if len(sample) < 2:
        raise ConfigError("the initial sample", expected="2 rows of weight above 0", got=len(sample))
    if not bool(sample.isfinite().all()):
        raise NonFiniteError("the initial sample holds NaN or infinity", fix="Verify the dataset")
    if sae.normalize_mode == "dataset":
        mean = mean_row(sample.double(), weights.double())
        sae.input_mean.copy_(mean)
        spread = sum_squares(sample.double() - mean, weights.double()) / weights.double().sum()
        sae.input_scale.copy_(spread.sqrt().clamp_min(SMALLEST_NORM))

    x = sae.normalise(sample)[0]
    constant = variance_per_row(x.double(), weights.double()).item()
    if not constant > 0:
        raise ConfigError("the initial sample", expected="rows that differ", got="equal rows")
    sae.b_pre.copy_(geometric_median(x, weights))

    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(sae.latents, sae.d_model, generator=generator, dtype=torch.float32)
    sae.W_dec.copy_(F.normalize(directions, dim=1))
    sae.W_enc.copy_(sae.W_dec)
    sae.b_enc.zero_()
    sae.W_enc.mul_(_encoder_scale(sae, x, weights))
    return constant


def _encoder_scale(sae: Sae, x: Tensor, weights: Tensor) -> float:
    """|x - b_pre| over |x_hat - b_pre|, both root mean squares; codes are linear in the encoder's scale."""
    out = sum(
        sum_squares(sae.reconstruct(*sae.select(rows)) - sae.b_pre, w).item()
        for rows, w in zip(x.split(CHUNK_ROWS), weights.split(CHUNK_ROWS), strict=True)
    )
    return (sum_squares(x - sae.b_pre, weights).item() / out) ** 0.5 if out > 0 else 1.0
