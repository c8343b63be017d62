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
from winnow.trainer.kernels.fused_ops import WIDEST_DEAD, FusedOps
from winnow.trainer.kernels.reference import accumulator
from winnow.trainer.kernels.step_ops import Dead
from winnow.trainer.mesh.topk import Codes, count_kept, keep
from winnow.trainer.step.context import Model
from winnow.trainer.step.gradients import DeadRows, per_latent, zero_where_cut
from winnow.trainer.step.prefixes import EntryPart, squares

# with a tenth of the latents dead, four dense products of 0.1 each beat gathers (docs/kernels.md)
DENSE_AUX = 12
"""Most dead latents per latent kept for which AuxK works on dense [B, M] on a CPU; beyond it, on codes. A
gathered multiplication costs about as much as twelve of a product."""
# reckoned for an H100, not measured: its tensor cores make 340 T multiplications per second in bfloat16,
# while gathers of 2.5 TB/s bring 1.25 T numbers to be multiplied; in float32 it is 25 T against 0.6 T
DENSE_AUX_GPU = {"bfloat16": 270, "float32": 40}
"""The same on a GPU, by the type of the products."""
# at N = 131,072, a tenth of it dead and B = 65,536 these are 1.7 GB each of z and its gradient
DENSE_AUX_BYTES = 2 << 30
"""Most bytes of [B, M] on a GPU: beyond it, on codes."""
# a top-k in place needs the best apart, and the library copies what it is given
KEPT_BYTES = 1 << 28
"""Bytes of dense codes that are cut to their best at a time on a GPU."""
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
        dense = not by_rows and sum(ctx.dead_of_shards) <= _dense_share(model) * ctx.k_dead
        # this shard may hold fewer dead latents than are kept of all
        self._dead = Dead(ids, min(ctx.k_dead, len(ids)), dense)
        self._apart = ctx.spec.accumulate > 1
        self.value: Tensor | None = None
        """The term [], finite or not, once it is known."""
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
    def _kind(self) -> torch.dtype:
        """The type of sums."""
        return accumulator(self._model.W_dec.dtype)

    @property
    def _kernels(self) -> FusedOps | None:
        """Those of a GPU, if codes are dense: decided alike on ranks without a row or a dead latent."""
        return self._model.ops.fused if self._dead.dense and self._kind == torch.float32 else None

    @property
    def wanted(self) -> Dead | None:
        """The dead latents that the encoder computes codes of."""
        return self._dead if len(self._dead.ids) else None

    # ---- which codes -------------------------------------------------------------------------------

    def _kept(self, found: DeadCodes, count: int) -> Tensor | Codes:
        """This shard's part of the best k dead latents of each row: dense, or codes by place in the dead."""
        local = self._world.latent.size == 1
        if isinstance(found, Tensor) and local:
            fused = self._model.ops.fused
            if fused is not None and found.shape[1] <= WIDEST_DEAD:
                fused.keep_best(found, self._dead.k)
            else:
                keep_best(found, self._dead.k, ROW_TILE if fused is None else _rows_at_once(found))
            return found
        if found is None:
            # no dead latent or no row here, but the collectives below need every shard
            empty = self._model.ctx.total.new_empty(count, self._dead.k)
            found = empty, torch.empty_like(empty, dtype=torch.int64)
        if local:
            assert isinstance(found, tuple)
            return Codes(found[0].relu_(), found[1])
        dense = found if isinstance(found, Tensor) else None
        # `count_kept` needs them in order, and the encoder gives codes of dead latents unordered
        values, places = sort_pairs(*(found if dense is None else best(dense, self._dead.k)))
        values = values.to(self._kind)  # dense ones may be of half precision
        available = [min(self._k, dead) for dead in self._model.ctx.dead_of_shards]
        codes = keep(values, places, count_kept(values, self._k, available, self._world.latent).kept)
        if dense is None:
            return codes
        return dense.zero_().scatter_(1, codes.indices, codes.values.to(dense.dtype))

    def _given(self, z: Tensor | Codes) -> Tensor:
        """What the kept codes of all shards reconstruct [b, O]; by place in the dead in micro-batches."""
        if isinstance(z, Tensor):
            latent = self._world.latent
            # shards add up in float32; one process has no other use for that than its kernels, which widen it
            kind = None if self._kernels is not None and latent.size == 1 else self._kind
            given = self._model.ops.mm(z, self._W, kind)
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
        if self._kernels is not None:
            return None, self._at_once(self._kernels, z, centred, e, weights)
        data, total = self._world.data, self._model.ctx.total
        # summed over all ranks before anything is divided: a mean of ranks' ratios would be another term
        mean = data.sum(weights @ e) / total
        spread = weights @ squares(e - mean)
        error = self._given(z).sub_(e)
        sums = data.sum(torch.stack([weights @ squares(error), spread]))
        left, spread = sums.unbind()
        self.value = left / spread
        if self._fails():
            return None, None
        grad = error.mul_((2 * self._coefficient / spread * weights)[:, None])
        if error.device.type != "cpu":
            # not asked whether it is finite: what is not becomes 0, since 0 * NaN would be NaN
            grad.masked_fill_(~self.value.isfinite(), 0.0)
        if isinstance(z, Tensor):
            return None, self._of_dense(z, grad, centred)
        return EntryPart(*z, self._model.by_target(grad), self._there(z)), None

    def _at_once(
        self, kernels: FusedOps, z: Tensor | Codes, centred: Tensor, e: Tensor, weights: Tensor
    ) -> DeadRows | None:
        """The same of dense codes in one pass; what the term divides by scales the gradients at their end."""
        made = kernels.errors(self._given(z), e, weights, self._model.W_dec.dtype)
        error, spread = self._joined(made.weight, made.error, made.mean, made.spread)
        self.value = error / spread
        scale = torch.where(self.value.isfinite(), self._coefficient / spread, 0.0)
        return self._of_dense(z, made.grad, centred, scale) if isinstance(z, Tensor) else None

    def _there(self, z: Codes) -> Tensor | None:
        """Which slots hold a code; None if empty slots are rare, as on one process."""
        return None if self._world.latent.size == 1 else z.values > 0

    def _fails(self) -> bool:
        """Whether the term is known not to be finite: a CPU knows, a GPU would be waited for."""
        assert self.value is not None
        return self.value.device.type == "cpu" and not math.isfinite(self.value.item())

    def read(self) -> tuple[float | None, bool]:
        """The term, 0 if it was not finite and None if it is not known, and whether it was finite."""
        if self.value is None:
            return None, True
        value = self.value.item()
        return (value, True) if math.isfinite(value) else (0.0, False)

    # ---- a batch in micro-batches ------------------------------------------------------------------

    def add(self, found: DeadCodes, centred: Tensor, e: Tensor, weights: Tensor) -> None:
        """Take in a micro-batch; arguments as for `whole`."""
        z = self._kept(found, len(weights))
        e_hat = self._given(z)
        # not before the collectives in `_kept` and `_given`: other ranks have rows and wait there
        if not len(weights):
            return
        if self._kernels is not None:
            grad, found_error, *moments = self._kernels.errors(e_hat, e, weights, self._model.W_dec.dtype)
            self._add_moments(*moments)
        else:
            mean = mean_row(e, weights)
            self._add_moments(weights.sum(), mean, weights @ squares(e - mean))
            error = e_hat.sub_(e)
            found_error = weights @ squares(error)
            grad = error.mul_((2 * weights)[:, None])
        self._error = self._error + found_error
        assert self._rows is not None
        made = self._of_dense(z, grad, centred) if isinstance(z, Tensor) else self._of_codes(z, grad, centred)
        for total, more in zip(self._rows[1:], made[1:] if made else (), strict=bool(made)):
            total += more

    def result(self) -> DeadRows | None:
        """The coefficient times the gradients of this rank's rows; the term is that of all of them."""
        self._error, self._spread = self._joined(self._weight, self._error, self._mean, self._spread)
        self.value = self._error / self._spread
        if self._fails() or self._rows is None:
            return None
        for total in self._rows[1:]:
            total.mul_(self._coefficient / self._spread)
            if total.device.type != "cpu":
                total.masked_fill_(~self.value.isfinite(), 0.0)
        return self._rows

    def _joined(self, weight: Tensor, error: Tensor, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Error and spread of all ranks' rows, from those of this rank's."""
        data = self._world.data
        if data.size > 1:
            moments = data.sum(torch.cat([torch.stack([weight, error]), weight * mean]))
            # the spread about the joint mean: each rank's own, and that of its mean
            apart = mean - moments[2:] / moments[0]
            error = moments[1]
            spread = data.sum(spread + weight * (apart @ apart))
        return error, spread

    def _add_moments(self, weight: Tensor, mean: Tensor, spread: Tensor) -> None:
        """Weighted mean and spread of all rows so far, with those of a micro-batch."""
        # not sum(e^2) - sum(e)^2 / n, whose difference cancels in float32
        total = self._weight + weight
        apart = mean - self._mean
        between = self._weight * weight / total * (apart @ apart)
        self._spread = self._spread + spread + between
        self._mean = self._mean + apart * (weight / total)
        self._weight = total

    # ---- gradients of the dead latents alone -------------------------------------------------------

    def _of_dense(self, z: Tensor, grad: Tensor, centred: Tensor, scale: Tensor | None = None) -> DeadRows:
        """From dense codes [b, M]; by kernels times `scale` [], if there is one."""
        ops, kind, kernels = self._model.ops, self._kind, self._kernels
        mm = ops.mm
        if kernels is not None:
            # the gradient of z takes its place
            W_dec = mm(z.T, grad)
            b_enc = kernels.grads_of_codes(grad, self._W, z)
            W_enc = mm(z.T, centred)
            if scale is None:
                return DeadRows(self._dead.ids, W_dec.to(kind), W_enc.to(kind), b_enc)
            # of one dimension, so that products with it are float32
            scale = scale.view(1)
            return DeadRows(self._dead.ids, W_dec * scale, W_enc * scale, b_enc * scale)
        # as wide as z: no other copy of [b, M] is made
        dz = zero_where_cut(mm(grad, self._W.T, z.dtype), z)
        return DeadRows(self._dead.ids, mm(z.T, grad, kind), mm(dz.T, centred, kind), dz.sum(0, dtype=kind))

    def _of_codes(self, z: Codes, grad: Tensor, centred: Tensor) -> DeadRows | None:
        """From codes [b, k] by place in the dead; None if there are none."""
        if not z.values.numel():
            return None
        ops, count = self._model.ops, len(self._W)
        segments = ops.segments(z.indices, count, self._there(z))
        grad = ops.low(grad)
        flat = z.values.flatten()[segments.order]
        dz = zero_where_cut(ops.dots(grad, z.indices, segments, self._W), flat)
        all_of_them = slice(0, count)
        W_dec = ops.sums(flat, segments, grad, all_of_them)
        W_enc = ops.sums(dz, segments, centred, all_of_them)
        b_enc = per_latent(dz, segments, count)
        return DeadRows(self._dead.ids, W_dec, W_enc, b_enc)


def _dense_share(model: Model) -> float:
    """Most dead latents per latent kept for which AuxK works on dense codes."""
    ctx = model.ctx
    if model.ops.fused is None:
        return DENSE_AUX
    rows = -(-ctx.fullest // ctx.spec.accumulate)
    dead = DENSE_AUX_BYTES // max(1, rows * model.W_dec.element_size())
    return min(DENSE_AUX_GPU[ctx.spec.compute_dtype], dead / ctx.k_dead)


def _rows_at_once(z: Tensor) -> int:
    return max(1, KEPT_BYTES // max(1, z.shape[1] * z.element_size()))


def keep_best(z: Tensor, k: int, rows: int) -> None:
    """Cut z [B, M] to the best k of each row that are above 0, in place, some rows at a time."""
    # tile by tile: a top-k needs copies of its input, and a tile without more than k positives needs none
    for part in z.split(rows):
        # a GPU is not asked how many are positive: it would be waited for
        if k < z.shape[1] and (z.device.type != "cpu" or int((part > 0).sum(1, dtype=torch.int32).max()) > k):
            values, at = best(part, k)
            part.zero_().scatter_(1, at, values)
        part.relu_()
