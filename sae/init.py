"""Initialisation: what is set before the first step, from a sample of training rows.

Legend: B rows of the sample, D d_model, O width of the output, N latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.sae.activations import activation_of
from winnow.sae.metrics import mean_row, sum_squares, variance_per_row
from winnow.sae.model import SMALLEST_NORM, Sae
from winnow.schemas.errors import ConfigError, NonFiniteError

CHUNK_ROWS = 4096
"""Rows encoded at once when the encoder is scaled."""
# A multiple of 16: torch draws normals in groups of 16, so blocks of whole groups hold the same numbers as
# one draw of all rows (blocks of 4,095 rows of 3 do not).
_DRAWN_ROWS = 4096
"""Random directions drawn at a time."""


class Place(NamedTuple):
    """Where an SAE's latents stand among those of the whole dictionary, of which it may hold a part."""

    latents: int
    """N, of the whole."""
    part: range
    """Those that the SAE holds."""
    output: Callable[[Tensor, int | None], Tensor]
    """The whole dictionary's output [B, O] of normalised rows [B, D]; with a number, by the best so many."""

    @classmethod
    def whole(cls, sae: Sae) -> Place:
        """That of an SAE that is not a part of anything."""

        def output(x: Tensor, k: int | None) -> Tensor:
            return sae.reconstruct(*sae.select(x, k), x)

        return cls(sae.latents, range(sae.latents), output)


def geometric_median(x: Tensor, weights: Tensor, *, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point [D] with the least weighted sum of distances to rows x [B, D].

    Weiszfeld's iteration from the mean, until a step is below `tolerance` of the mean distance.
    """
    # float64: distances near the median are divided by, and the steps are small differences of large sums.
    x, weights = x.double(), weights.double()
    median = mean_row(x, weights)
    for _ in range(iterations):
        distance = (x - median).norm(dim=1)
        typical = (weights @ distance / weights.sum()).item()
        # All rows are equal: the mean is the median, and there is nothing to divide by.
        if typical == 0:
            break
        # A row at the median would get infinite weight and stop the iteration there.
        moved = mean_row(x, weights / distance.clamp_min(1e-9 * typical))
        step = (moved - median).norm().item()
        median = moved
        if step < tolerance * typical:
            break
    return median


@torch.no_grad()
def initialise(
    sae: Sae,
    sample: Tensor,
    weights: Tensor,
    seed: int,
    target: Tensor | None = None,
    *,
    encoder_norm: float | None = None,
    place: Place | None = None,
) -> float:
    """Fill a new SAE and return the loss constant.

    Dataset constants (if the normalisation has them) and `b_pre`, the geometric median, come from the
    sample; decoder rows are random unit vectors; the encoder starts as the decoder times `encoder_norm`.

    A transcoder's encoder starts at random directions of its own, its `b_dec` at the target's geometric
    median, its skip path at 0, and the scale is that of the target. What an activation
    holds beside the weights starts as it says.

    Args:
        sae: A new SAE on its device.
        sample: Raw training rows [B, D].
        weights: Their weights [B]; rows of weight 0 are ignored.
        seed: Seed of the decoder's directions.
        target: A transcoder's raw target rows [B, O].
        encoder_norm: Norm of the encoder's rows; None scales the encoder so that the reconstruction's root
            mean square distance from its bias is the input's (Gao et al., A.1).
        place: Where the latents of `sae` stand if it holds a part of them; None if it holds all.

    Returns:
        The error per row of predicting the mean of the normalised rows to be reconstructed.

    Raises:
        ConfigError: The sample holds fewer than two rows of weight above 0, or rows that do not vary.
        NonFiniteError: The sample holds NaN or infinity.
    """
    sample, weights, target = counted_rows(sae, sample, weights, target)
    # Constants and biases first: the encoder's scale needs them.
    x, y = _fill_constants_and_biases(sae, sample, weights, target)
    constant = loss_constant(y, weights)

    place = place or Place.whole(sae)
    _fill_directions(sae, place, seed)
    sae.b_enc.zero_()
    sae.W_enc.mul_(
        _matching_scale(sae, place.output, x, y, weights) if encoder_norm is None else encoder_norm
    )
    activation_of(sae.parts.activation).begin(sae)
    return constant


def _fill_constants_and_biases(
    sae: Sae, sample: Tensor, weights: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the normalised rows [B, D] and those to be reconstructed [B, O]: a transcoder's target's."""
    # In this order: normalising needs the constants, and the biases need normalised rows.
    if sae.normalize_mode == "dataset":
        mean, scale = dataset_constants(sample, weights, sae.parts.widths or (sae.d_model,))
        sae.input_mean.copy_(mean)
        sae.input_scale.copy_(scale.view_as(sae.input_scale))
    y = x = sae.normalise(sample)[0]
    if sae.b_dec is not None:
        if target is None:
            raise ValueError("a transcoder is initialised with rows of its target")
        if sae.parts.target_normalize == "dataset":
            mean, scale = dataset_constants(target, weights, (sae.d_out,))
            sae.target_mean.copy_(mean)
            sae.target_scale.copy_(scale[0])
        y = sae.normalise_target(target)
        sae.b_dec.copy_(geometric_median(y, weights))
    sae.b_pre.copy_(geometric_median(x, weights))
    return x, y


def _fill_directions(sae: Sae, place: Place, seed: int) -> None:
    """Fill decoder and encoder with random unit rows, or with those of a shard's part of the latents."""
    # A generator of the CPU, so that every device starts with the same numbers.
    generator = torch.Generator().manual_seed(seed)
    latents, part = place.latents, place.part
    sae.W_dec.copy_(random_directions(sae.d_out, latents, generator, part, draw_all=sae.has_target))
    # The directions of an input and of another hook's output have nothing in common: a transcoder's encoder
    # is not its decoder.
    sae.W_enc.copy_(random_directions(sae.d_model, latents, generator, part) if sae.has_target else sae.W_dec)


def counted_rows(
    sae: Sae, sample: Tensor, weights: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows of weight above 0 of a sample, their weights and targets, on the SAE's device and in its type.

    Raises:
        ConfigError: Fewer than two such rows.
        NonFiniteError: They hold NaN or infinity.
    """
    # Left out first: rows of weight 0 (sinks, void rows) may hold anything, also NaN.
    keep = weights > 0
    sample, weights = sample.to(sae.W_enc)[keep], weights.to(sae.W_enc)[keep]
    if len(sample) < 2:
        raise ConfigError("the initial sample", expected="2 rows of weight above 0", got=len(sample))
    _require_finite(sample)
    if target is not None:
        target = target.to(sae.W_enc)[keep]
        _require_finite(target)
    return sample, weights, target


def loss_constant(y: Tensor, weights: Tensor) -> float:
    """The error per row of predicting the mean of normalised rows y [B, O].

    Raises:
        ConfigError: The rows do not vary.
    """
    # The loss is divided by it: equal rows would make every loss infinite.
    constant = variance_per_row(y.double(), weights.double()).item()
    if not constant > 0:
        raise ConfigError("the initial sample", expected="rows that differ", got="equal rows")
    return constant


def _require_finite(sample: Tensor) -> None:
    if not bool(sample.isfinite().all()):
        raise NonFiniteError("the initial sample holds NaN or infinity", fix="Verify the dataset")


def dataset_constants(sample: Tensor, weights: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The mean [D] of rows [B, D], and the root mean squared distance from it per hook."""
    sample, weights = sample.double(), weights.double()
    mean = mean_row(sample, weights)
    # Per hook of a crosscoder: norms grow with depth, and one scale would let the last layer have the loss.
    parts = (sample - mean).split(list(widths), dim=1)
    spreads = torch.stack([sum_squares(part, weights) / weights.sum() for part in parts])
    return mean, spreads.sqrt().clamp_min(SMALLEST_NORM)


def random_directions(
    width: int, latents: int, generator: torch.Generator, part: range, *, draw_all: bool = False
) -> Tensor:
    """Random unit rows [N, width], or those of a part of the latents: the same rows in any partition.

    With `draw_all` what the generator draws next does not depend on the part either.
    """
    # In blocks, so that a shard never holds all rows; those before its part are drawn and dropped.
    kept: list[Tensor] = []
    for first in range(0, latents if draw_all else part.stop, _DRAWN_ROWS):
        rows = torch.randn(min(_DRAWN_ROWS, latents - first), width, generator=generator, dtype=torch.float32)
        kept.append(rows[max(0, part.start - first) : max(0, part.stop - first)])
    return F.normalize(torch.cat(kept), dim=1)


def _matching_scale(
    sae: Sae, output: Callable[[Tensor, int | None], Tensor], x: Tensor, y: Tensor, weights: Tensor
) -> float:
    """|y - bias| over |y_hat - bias|, both root mean squares."""
    # One measurement suffices, since codes are linear in the encoder's scale. BatchTopK takes the K best per
    # row here, as its threshold is not known yet.
    k = sae.k if sae.parts.traits.selects else None
    bias = sae.b_pre if sae.b_dec is None else sae.b_dec
    out = sum(
        sum_squares(output(rows, k) - bias, w).item()
        for rows, w in zip(x.split(CHUNK_ROWS), weights.split(CHUNK_ROWS), strict=True)
    )
    # No latent active (all pre-activations negative): there is no scale to match.
    return (sum_squares(y - bias, weights).item() / out) ** 0.5 if out > 0 else 1.0
