"""What is set before a cross-layer transcoder's first step, from a sample of training rows.

Legend: B rows of the sample, D width of a layer, N latents per layer, L layers, l source layer, m target
layer.

Every layer that can write to a target is to write as much of it as any other: of target m's variance V.m
(mean squared distance from its geometric median), each of its m + 1 layers is to give V.m / (m + 1). So layer
l gives q.l = sum over m >= l of V.m / (m + 1) in all; its unit decoder rows, drawn at random over all of its
targets, have their parts weighted by the square roots of those shares, and its encoder is scaled until its
codes give q.l. Unweighted rows cannot do that: target 0 would need L times the length of its share from layer
0 alone, and would leave nothing to the others at every later target. Outputs of different layers are nearly
orthogonal, but not quite: one last scale for all encoders makes the sums as long as their targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.sae.activations import activation_of
from winnow.sae.init import (
    counted_rows,
    dataset_constants,
    geometric_median,
    loss_constant,
    random_directions,
)
from winnow.sae.metrics import sum_squares
from winnow.trainer.step.cross_train import normalise_own
from winnow.trainer.step.state import Run

_CHUNK_ROWS = 1024
"""Rows decoded at once while encoders are scaled: outputs are L times as wide as rows."""


@torch.no_grad()
def initialise_cross(
    runs: Sequence[Run], inputs: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor
) -> None:
    """Fill the new SAEs of a cross-layer set, and set each run's loss constant, that of its own target.

    Dataset constants, b_pre and each layer's own part of b_dec come from the sample; a target's scale is the
    same in every layer that writes to it, and its mean and bias are in its own layer alone. A collective over
    the latent axis.

    Args:
        runs: One per layer, ascending; on a mesh, of this rank's latents.
        inputs: Raw rows [B, D] that each layer reads, the same on every rank.
        targets: Raw rows [B, D] of each layer's own target.
        weights: [B]; rows of weight 0 are ignored.

    Raises:
        ConfigError: The sample holds fewer than two rows of weight above 0, or rows that do not vary.
        NonFiniteError: The sample holds NaN or infinity.
    """
    x, y, kept = _fill_constants(runs, inputs, targets, weights)
    for number, run in enumerate(runs):
        spec = run.recipe.spec
        # by seed and layer, so that no two layers begin alike
        _fill_directions(run, spec.seed + spec.layer, _shares(y[number:], kept, number))
    asked = runs[0].recipe.spec.first_encoder_norm
    for run in runs:
        if asked is not None:
            run.sae.W_enc.mul_(asked)
    if asked is None:
        _match(runs, x, y, kept)
    for run in runs:
        activation_of(run.sae.parts.activation).begin(run.sae)


def _fill_constants(
    runs: Sequence[Run], inputs: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Fill constants and biases; normalised inputs and targets, and the weights of the rows that are kept."""
    normal_x: list[Tensor] = []
    normal_y: list[Tensor] = []
    kept = weights
    for number, (run, raw, raw_target) in enumerate(zip(runs, inputs, targets, strict=True)):
        sae = run.sae
        sample, kept, target = counted_rows(sae, raw, weights, raw_target)
        assert target is not None
        assert sae.b_dec is not None, "a layer of a set is a transcoder"
        if sae.normalize_mode == "dataset":
            mean, scale = dataset_constants(sample, kept, (sae.d_model,))
            sae.input_mean.copy_(mean)
            sae.input_scale.copy_(scale[0])
        if sae.parts.target_normalize == "dataset":
            mean, scale = dataset_constants(target, kept, (sae.d_model,))
            sae.target_mean[: sae.d_model] = mean
            for earlier, writer in enumerate(runs[: number + 1]):
                writer.sae.target_scale.view(-1)[number - earlier] = scale[0]
        normal_x.append(sae.normalise(sample)[0])
        normal_y.append(normalise_own(sae, target))
        sae.b_pre.copy_(geometric_median(normal_x[-1], kept))
        sae.b_dec[: sae.d_model] = geometric_median(normal_y[-1], kept)
        run.loss_constant = loss_constant(normal_y[-1], kept)
        # its own bias stands for the middle of the target from here on
        normal_y[-1] = normal_y[-1] - sae.b_dec[: sae.d_model]
    return normal_x, normal_y, kept


def _shares(y: list[Tensor], weights: Tensor, layer: int) -> Tensor:
    """What a layer is to give to each of its targets [T]: V.m / (m + 1)."""
    total = weights.sum().item()
    return torch.tensor(
        [sum_squares(rows, weights).item() / total / (layer + at + 1) for at, rows in enumerate(y)],
        dtype=torch.float64,
    )


def _fill_directions(run: Run, seed: int, shares: Tensor) -> None:
    """Random unit rows: the decoder's weighted by its targets' shares, the encoder's of their own."""
    sae, place = run.sae, run.shard.place
    # a generator of the CPU, so that every device starts with the same numbers
    draws = torch.Generator().manual_seed(seed)
    rows = random_directions(sae.d_out, place.latents, draws, place.part, draw_all=True)
    rows *= shares.sqrt().to(rows.dtype).repeat_interleave(sae.d_model)
    sae.W_dec.copy_(F.normalize(rows, dim=1))
    sae.W_enc.copy_(random_directions(sae.d_model, place.latents, draws, place.part))
    sae.b_enc.zero_()


def _match(runs: Sequence[Run], x: list[Tensor], y: list[Tensor], weights: Tensor) -> None:
    """Scale the encoders: each layer gives its share, and together they are as long as their targets."""
    total = weights.sum().item()
    for number, (run, rows) in enumerate(zip(runs, x, strict=True)):
        parts = zip(rows.split(_CHUNK_ROWS), weights.split(_CHUNK_ROWS), strict=True)
        given = sum(sum_squares(_given(run, some), w).item() for some, w in parts) / total
        wanted = _shares(y[number:], weights, number).sum().item()
        # no latent active (all pre-activations negative): there is no scale to match
        run.sae.W_enc.mul_((wanted / given) ** 0.5 if given > 0 else 1.0)
    summed, width = 0.0, runs[0].sae.d_model
    for first in range(0, len(weights), _CHUNK_ROWS):
        some = slice(first, first + _CHUNK_ROWS)
        made = torch.zeros_like(torch.stack([rows[some] for rows in x]))
        for number, run in enumerate(runs):
            for at, part in enumerate(_given(run, x[number][some]).split(width, 1)):
                made[number + at] += part
        summed += sum(sum_squares(rows, weights[some]).item() for rows in made)
    wanted = sum(sum_squares(rows, weights).item() for rows in y)
    for run in runs:
        run.sae.W_enc.mul_((wanted / summed) ** 0.5 if summed > 0 else 1.0)


def _given(run: Run, x: Tensor) -> Tensor:
    """What a layer's K best codes per row write [B, O], without bias, over all shards."""
    sae = run.sae
    assert sae.b_dec is not None
    # BatchTopK takes the K best per row here as well: whole batches are not at hand
    return run.shard.output(x, sae.k) - sae.b_dec
