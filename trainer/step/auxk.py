"""AuxK of the sparse route: what dead latents could still explain, over shards, ranks and micro-batches.

The term is `spec.auxk_loss`'s: the squared error of what the best dead latents give, over the spread of the
batch's error. A batch in one piece knows that spread at once, so its gradients join the step's (`whole`). One
in micro-batches knows it after the last of them: gradients are kept apart, undivided, for the dead latents
alone, and join at the end (`add`, `result`).

Legend: b rows of a micro-batch on this rank, D width of the input, O width of the output, M dead latents of
this shard, k kept of them per row.
"""

from __future__ import annotations

import math
from functools import cached_property, partial

import torch
from torch import Tensor

from winnow.sae.metrics import mean_row
from winnow.trainer.kernels.best import best, sort_pairs
from winnow.trainer.kernels.encode_topk import ROW_TILE
from winnow.trainer.kernels.reference import accumulator
from winnow.trainer.kernels.segment_grad import segments_of
from winnow.trainer.kernels.step_ops import Dead
from winnow.trainer.mesh.topk import Codes, count_kept, keep
from winnow.trainer.step.context import Model
from winnow.trainer.step.gradients import DeadRows, zero_where_cut
from winnow.trainer.step.prefixes import EntryPart, squares

# twelve is a CPU's: with a tenth of the latents dead, four dense products of 0.1 each beat gathers
# (docs/kernels.md). For an H100 about 270 was reckoned, but no GPU was measured
DENSE_AUX = 12
"""Most dead latents per latent kept for which AuxK works on dense [B, M]; beyond it, on codes. A gathered
multiplication costs about as much as twelve of a product."""
DeadCodes = Tensor | tuple[Tensor, Tensor] | None
"""As in `step_ops.Codes`; None if this shard has no dead latent or this rank no row."""


class AuxK:
    """The AuxK term of one step and its gradients.

    Args:
        model: The step's.
        by_rows: Rows and codes cross the data axis, so that codes are wanted.
    """

    def __init__(self, model: Model, *, by_rows: bool) -> None:
        ctx, ids = model.ctx, model.ctx.dead
        self._model, self._world, self._k = model, ctx.world, ctx.k_dead
        self._coefficient = ctx.spec.auxk_coefficient
        # only codes can be sent to the other data ranks
        dense = not by_rows and sum(ctx.dead_of_shards) <= DENSE_AUX * ctx.k_dead
        # this shard may hold fewer dead latents than are kept of all
        self._dead = Dead(ids, min(ctx.k_dead, len(ids)), dense)
        self._apart = ctx.spec.accumulate > 1
        self.value: float | None = None
        """The term, once it is known."""
        self.finite = True
        self._rows: DeadRows | None = None
        if self._apart:
            count, width = len(ids), ctx.sae.d_out
            # in float32 also if the products are in bfloat16, like every sum over micro-batches
            zeros = partial(model.W_dec.new_zeros, dtype=accumulator(model.W_dec.dtype))
            self._error = self._spread = self._weight = zeros(())
            self._mean = zeros(width)
            shapes = ((count, width), (count, ctx.sae.d_model), (count,))
            self._rows = DeadRows(ids, *(zeros(shape) for shape in shapes))

    @cached_property
    def _W(self) -> Tensor:
        """The dead latents' decoder rows [M, O]; a copy, made only if it is used."""
        return self._model.W_dec[self._dead.ids]

    @property
    def wanted(self) -> Dead | None:
        """The dead latents that the encoder computes codes of."""
        return self._dead if len(self._dead.ids) else None

    # ---- which codes -------------------------------------------------------------------------------

    def _kept(self, found: DeadCodes, rows: int) -> Tensor | Codes:
        """This shard's part of the best k dead latents of each row: dense, or codes by place in the dead."""
        local = self._world.latent.size == 1
        if isinstance(found, Tensor) and local:
            keep_best(found, self._dead.k)
            return found
        if found is None:
            # no dead latent or no row here, but the collectives below need every shard
            empty = self._model.ctx.total.new_empty(rows, self._dead.k)
            found = empty, torch.empty_like(empty, dtype=torch.int64)
        if local:
            assert isinstance(found, tuple)
            return Codes(found[0].relu_(), found[1])
        dense = found if isinstance(found, Tensor) else None
        # `count_kept` needs them in order, and the encoder gives codes of dead latents unordered
        values, places = sort_pairs(*(found if dense is None else best(dense, self._dead.k)))
        available = [min(self._k, count) for count in self._model.ctx.dead_of_shards]
        codes = keep(values, places, count_kept(values, self._k, available, self._world.latent).kept)
        return codes if dense is None else dense.zero_().scatter_(1, codes.indices, codes.values)

    def _given(self, z: Tensor | Codes) -> Tensor:
        """What the kept codes of all shards reconstruct [b, O]; by place in the dead in micro-batches."""
        if isinstance(z, Tensor):
            given, latent = self._model.ops.mm(z, self._W), self._world.latent
            # `mm` pads rows to 64 bytes, and collectives take contiguous tensors
            return given if latent.size == 1 else latent.sum(given.contiguous())
        return self._model.decode(*z, self._W if self._apart else None)

    def take(
        self, found: DeadCodes, centred: Tensor, e: Tensor, weights: Tensor, *, last: bool
    ) -> tuple[EntryPart | None, DeadRows | None]:
        """What the term adds to a micro-batch's gradients; arguments as for `whole`."""
        if not self._apart:
            return self.whole(found, centred, e, weights)
        self.add(found, centred, e, weights)
        return None, self.result() if last else None

    # ---- a batch in one piece ----------------------------------------------------------------------

    def whole(
        self, found: DeadCodes, centred: Tensor, e: Tensor, weights: Tensor
    ) -> tuple[EntryPart | None, DeadRows | None]:
        """The term of the whole batch, with the coefficient in its gradients: as a part, or dense.

        Args:
            found: This shard's codes of dead latents.
            centred: The encoder's input [b, D].
            e: y - y_hat [b, O].
            weights: [b].
        """
        z = self._kept(found, len(weights))
        if not isinstance(z, Tensor):
            # this part joins the step's entries, whose indices count all latents of the shard
            z = Codes(z.values, self._dead.ids[z.indices])
        data, total = self._world.data, self._model.ctx.total
        # summed over all ranks before anything is divided: a mean of ranks' ratios would be another term
        mean = data.sum(weights @ e) / total
        spread = weights @ squares(e - mean)
        error = self._given(z).sub_(e)
        sums = data.sum(torch.stack([weights @ squares(error), spread]))
        left, spread = sums.unbind()
        self._settle((left / spread).item())
        if not self.finite:
            return None, None
        grad = error.mul_((2 * self._coefficient / spread * weights)[:, None])
        if isinstance(z, Tensor):
            return None, self._of_dense(z, grad, centred)
        return EntryPart(*z, self._model.by_target(grad), self._there(z)), None

    def _there(self, z: Codes) -> Tensor | None:
        """Which slots hold a code; None if empty slots are rare, as on one process."""
        return None if self._world.latent.size == 1 else z.values > 0

    def _settle(self, value: float) -> None:
        self.finite = math.isfinite(value)
        self.value = value if self.finite else 0.0

    # ---- a batch in micro-batches ------------------------------------------------------------------

    def add(self, found: DeadCodes, centred: Tensor, e: Tensor, weights: Tensor) -> None:
        """Take in a micro-batch; arguments as for `whole`."""
        z = self._kept(found, len(weights))
        e_hat = self._given(z)
        # not before the collectives in `_kept` and `_given`: other ranks have rows and wait there
        if not len(weights):
            return
        self._add_moments(e, weights)
        error = e_hat.sub_(e)
        self._error = self._error + weights @ squares(error)
        grad = error.mul_((2 * weights)[:, None])
        assert self._rows is not None
        made = self._of_dense(z, grad, centred) if isinstance(z, Tensor) else self._of_codes(z, grad, centred)
        for total, more in zip(self._rows[1:], made[1:] if made else (), strict=bool(made)):
            total += more

    def result(self) -> DeadRows | None:
        """The coefficient times the gradients of this rank's rows; the term is that of all of them."""
        data = self._world.data
        if data.size > 1:
            moments = data.sum(
                torch.cat([torch.stack([self._weight, self._error]), self._weight * self._mean])
            )
            # the spread about the joint mean: each rank's own, and that of its mean
            apart = self._mean - moments[2:] / moments[0]
            self._error = moments[1]
            self._spread = data.sum(self._spread + self._weight * (apart @ apart))
        self._settle((self._error / self._spread).item())
        if not self.finite or self._rows is None:
            return None
        for total in self._rows[1:]:
            total.mul_(self._coefficient / self._spread)
        return self._rows

    def _add_moments(self, e: Tensor, weights: Tensor) -> None:
        """Weighted mean and spread of all rows so far, from those of the micro-batches."""
        # not sum(e^2) - sum(e)^2 / n, whose difference cancels in float32
        weight, mean = weights.sum(), mean_row(e, weights)
        total = self._weight + weight
        apart = mean - self._mean
        between = self._weight * weight / total * (apart @ apart)
        self._spread = self._spread + weights @ squares(e - mean) + between
        self._mean = self._mean + apart * (weight / total)
        self._weight = total

    # ---- gradients of the dead latents alone -------------------------------------------------------

    def _of_dense(self, z: Tensor, grad: Tensor, centred: Tensor) -> DeadRows:
        """From dense codes [b, M]."""
        mm = self._model.ops.mm
        dz = zero_where_cut(mm(grad, self._W.T), z)
        return DeadRows(self._dead.ids, mm(z.T, grad), mm(dz.T, centred), dz.sum(0))

    def _of_codes(self, z: Codes, grad: Tensor, centred: Tensor) -> DeadRows | None:
        """From codes [b, k] by place in the dead; None if there are none."""
        if not z.values.numel():
            return None
        ops, count = self._model.ops, len(self._W)
        segments = segments_of(z.indices, count, self._there(z))
        grad = ops.low(grad)
        flat = z.values.flatten()[segments.order]
        dz = zero_where_cut(ops.dots(grad, z.indices, segments, self._W), flat)
        all_of_them = slice(0, count)
        W_dec = ops.sums(flat, segments, grad, all_of_them)
        W_enc = ops.sums(dz, segments, centred, all_of_them)
        b_enc = dz.new_zeros(count).index_add_(0, segments.latent, dz)
        return DeadRows(self._dead.ids, W_dec, W_enc, b_enc)


def keep_best(z: Tensor, k: int) -> None:
    """Cut z [B, M] to the best k of each row that are above 0, in place."""
    # tile by tile: a top-k needs copies of its input, and a tile without more than k positives needs none
    for part in z.split(ROW_TILE):
        if k < z.shape[1] and int((part > 0).sum(1, dtype=torch.int32).max()) > k:
            values, at = best(part, k)
            part.zero_().scatter_(1, at, values)
        part.relu_()
