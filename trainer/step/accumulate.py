"""One optimiser step from several micro-batches: the gradients of `fused_pass`, in less memory.

The sums of a step divide by the weight of the whole batch, which is known before the first micro-batch. The
AuxK term divides by the spread of the whole batch's error, which is known after the last one, so its
gradients are kept apart, undivided, for the dead latents alone, and join the others at the end.

Legend: b rows of a micro-batch, D width of the input, O width of the output, M dead latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.sae.metrics import mean_row
from winnow.sae.model import Sae
from winnow.schemas.training import TrainSpec
from winnow.trainer.kernels import Backend
from winnow.trainer.kernels.reference import accumulator
from winnow.trainer.kernels.segment_grad import segments_of
from winnow.trainer.kernels.step_ops import Dead, StepOps
from winnow.trainer.mesh.world import Axis
from winnow.trainer.step.fused import (
    DeadRows,
    Forward,
    Model,
    forward,
    gradients,
    keep_best,
    squares,
    wanted_dead,
    zero_where_cut,
)
from winnow.trainer.step.losses import Rows
from winnow.trainer.step.spans import mark

Seen = Callable[[Rows, Forward], None]
"""Told of every micro-batch and what came of it, while that is in memory."""


class Accumulated(NamedTuple):
    """What a step's micro-batches gave; the gradients are in the parameters' `.grad`."""

    loss: Tensor
    """The whole loss, of the micro-batches so far []."""
    auxk: float | None
    """See `fused.Pass`, as the next two."""
    auxk_finite: bool
    grad_norm: float


@torch.no_grad()
def accumulated_pass(
    sae: Sae,
    spec: TrainSpec,
    parts: Sequence[Callable[[], Rows]],
    weight: Tensor,
    dead: Tensor,
    k_aux: int,
    constant: float,
    backend: Backend,
    seen: Seen,
) -> Accumulated:
    """Loss, and every gradient with the decoder's projected, of a batch that comes in parts.

    Args:
        sae: The model; its `.grad`s are overwritten.
        spec: As for `fused_pass`.
        parts: Each gives a micro-batch of b >= 1 rows; one at a time is held.
        weight: Of the whole batch [].
        dead: int64 [M], ascending: the same for all of them.
        k_aux: Most dead latents a row.
        constant: See `losses.reconstruction_loss`.
        backend: `cpu` or `triton`.
        seen: See `Seen`.
    """
    model, wanted = Model.of(sae, spec, backend), wanted_dead(spec, dead, k_aux)
    auxk = None if wanted is None else AuxK(model.ops, model.W_dec, wanted, sae.d_model)
    done = Accumulated(torch.zeros_like(weight), None, True, 0.0)

    def take(batch: Rows, *, first: bool, last: bool) -> Accumulated:
        found = forward(model, spec, batch, wanted, weight * constant)
        seen(batch, found)
        loss, value, rows = done.loss + found.loss, None, None
        if auxk is not None and found.dead is not None:
            auxk.add(found.dead, found.centred, found.error.neg_(), batch.weights)
            if last:
                value, rows = auxk.result(spec.auxk_coefficient)
                loss += spec.auxk_coefficient * value
        mark("decode")
        centred, pulls = found.centred, found.pulls
        norm = gradients(model, found.parts, rows, centred, pulls, batch.x, first=first, last=last)
        mark("backward")
        return Accumulated(loss, value, value is None or rows is not None, norm)

    for number, part in enumerate(parts):  # what a part takes is let go with `take`
        done = take(part(), first=number == 0, last=number == len(parts) - 1)
    return done


class AuxK:
    """`losses.auxk_loss` over micro-batches: its two sums, and its gradients before they are divided.

    Args:
        ops: The backend.
        W_dec: As its operations take it.
        dead: The dead latents, on a mesh a shard's.
        d_model: D.
    """

    def __init__(self, ops: StepOps, W_dec: Tensor, dead: Dead, d_model: int) -> None:
        self._ops, self._dead, self._W = ops, dead, W_dec[dead.ids]
        count, width = self._W.shape
        zeros = partial(W_dec.new_zeros, dtype=accumulator(W_dec.dtype))
        self._rows = DeadRows(dead.ids, zeros((count, width)), zeros((count, d_model)), zeros(count))
        self._error = self._spread = self._weight = zeros(())
        self._mean = zeros(width)

    def add(self, z: Tensor | tuple[Tensor, Tensor], centred: Tensor, e: Tensor, weights: Tensor) -> None:
        """Take in a micro-batch.

        Args:
            z: Of the dead latents: see `step_ops.Codes`.
            centred: The encoder's input [b, D].
            e: y - y_hat [b, O].
            weights: [b].
        """
        self._add_moments(e, weights)
        if isinstance(z, Tensor):
            keep_best(z, self._dead.k)
            mm = self._ops.mm
            grad = self._grad(mm(z, self._W), e, weights)
            dz = zero_where_cut(mm(grad, self._W.T), z)
            rows = DeadRows(self._dead.ids, mm(z.T, grad), mm(dz.T, centred), dz.sum(0))
        else:
            values, places = z[0].relu_(), z[1]
            e_hat = self._ops.decode(values, places, self._W)
            rows = self._of_codes(values, places, e_hat, centred, e, weights)
        self._add_rows(rows)

    def add_codes(
        self, values: Tensor, latents: Tensor, e_hat: Tensor, centred: Tensor, e: Tensor, weights: Tensor
    ) -> None:
        """Take in a micro-batch of a mesh, which may have no row.

        Args:
            values: This shard's codes of dead latents [b, k].
            latents: int64 [b, k], of this shard.
            e_hat: What all shards' codes give [b, O]; lost.
            centred: See `add`, as the next two.
            e: As well.
            weights: As well.
        """
        if not len(weights):
            return
        self._add_moments(e, weights)
        if not values.numel():  # others have dead latents, this shard has none
            self._grad(e_hat, e, weights)
            return
        places = torch.searchsorted(self._dead.ids, latents)
        self._add_rows(self._of_codes(values, places, e_hat, centred, e, weights))

    def result(self, coefficient: float, data: Axis | None = None) -> tuple[float, DeadRows | None]:
        """The term, and `coefficient` times its gradients; 0 and None where it is not finite.

        With `data`, the term is that of all its ranks' rows; the gradients are of this one's.
        """
        if data is not None:
            moments = data.sum(
                torch.cat([torch.stack([self._weight, self._error]), self._weight * self._mean])
            )
            apart = self._mean - moments[2:] / moments[0]
            self._error = moments[1]
            self._spread = data.sum(self._spread + self._weight * (apart @ apart))
        value = (self._error / self._spread).item()
        if not math.isfinite(value):
            return 0.0, None
        for total in self._rows[1:]:
            total.mul_(coefficient / self._spread)
        return value, self._rows

    def _add_rows(self, rows: DeadRows) -> None:
        for total, part in zip(self._rows[1:], rows[1:], strict=True):
            total += part

    def _grad(self, e_hat: Tensor, e: Tensor, weights: Tensor) -> Tensor:
        """The gradient of the summed error by e_hat [b, O], in its place."""
        error = e_hat.sub_(e)
        self._error = self._error + weights @ squares(error)
        return error.mul_((2 * weights)[:, None])

    def _of_codes(
        self, values: Tensor, places: Tensor, e_hat: Tensor, centred: Tensor, e: Tensor, weights: Tensor
    ) -> DeadRows:
        """From codes [b, k] whose latents are numbered as in the dead ones."""
        ops, count = self._ops, len(self._W)
        segments = segments_of(places, count)
        grad = ops.low(self._grad(e_hat, e, weights))
        flat = values.flatten()[segments.order]
        dz = zero_where_cut(ops.dots(grad, places, segments, self._W), flat)
        whole = slice(0, count)
        W_dec, W_enc = ops.sums(flat, segments, grad, whole), ops.sums(dz, segments, centred, whole)
        b_enc = dz.new_zeros(count).index_add_(0, segments.latent, dz)
        return DeadRows(self._dead.ids, W_dec, W_enc, b_enc)

    def _add_moments(self, e: Tensor, weights: Tensor) -> None:
        """Weighted mean and spread of all rows so far, from those of the parts: nothing cancels."""
        weight, mean = weights.sum(), mean_row(e, weights)
        total = self._weight + weight
        apart = mean - self._mean
        between = self._weight * weight / total * (apart @ apart)
        self._spread = self._spread + weights @ squares(e - mean) + between
        self._mean = self._mean + apart * (weight / total)
        self._weight = total
