"""The sparse route: a step without a dense product beside the encoder's, on a mesh of any size.

The numbers of `winnow.trainer.step.spec` up to rounding, by hand instead of by autograd: the gradients share
one sort of the codes, are computed in blocks of latents that stay in cache while they are projected and
measured, and are written to buffers that live as long as the run. `begin`, then `take` once per micro-batch,
then `end`.

On a mesh four things cross: the global selection and the sum of the shards' reconstructions over `latent`,
the gradients and a few sums over `data`. Everything divides by the weight of the whole batch. What has no
latents (b_pre; a transcoder's b_dec and W_skip) is replicated: every rank computes the same gradient for it,
and the norm counts it once. On one process each of these does nothing.

Legend: B rows of this rank's micro-batch, D width of the input, O width of the output, N latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from winnow.trainer.mesh.exchange import Gather, Part, dense_bytes, rows_bytes
from winnow.trainer.mesh.topk import Codes, candidates
from winnow.trainer.step.auxk import AuxK, DeadCodes
from winnow.trainer.step.context import Ending, Model, StepContext, Taken
from winnow.trainer.step.gradients import DeadRows, Entries, Gradients, finish, gathered, pull_of, pulls_of
from winnow.trainer.step.losses import Rows
from winnow.trainer.step.prefixes import EntryPart, Reconstruction, reconstruct, reconstruct_at_once, widened
from winnow.trainer.step.selection import (
    BATCH_CANDIDATES,
    Candidates,
    best_of_batch,
    best_of_rows,
    groups_of,
)
from winnow.trainer.step.spans import mark


class Encoded(NamedTuple):
    """Candidates per row, and the codes that AuxK asked for."""

    best: Codes
    dead: DeadCodes


def encode(model: Model, centred: Tensor, candidates: int, auxk: AuxK | None) -> Encoded:
    """This shard's best candidates of each row, in order, from its one dense product."""
    ctx = model.ctx
    m = min(candidates, ctx.sae.latents)
    if not len(centred):
        # a rank without rows still takes part in the collectives that follow
        values = ctx.total.new_empty(0, m)
        return Encoded(Codes(values, torch.empty_like(values, dtype=torch.int64)), None)
    wanted = None if auxk is None else auxk.wanted
    found = model.ops.encode(centred, model.W_enc, ctx.sae.b_enc.detach(), m, wanted)
    return Encoded(Codes(found.values, found.indices), found.dead)


def begin(ctx: StepContext, pieces: int) -> SparseStep:
    """Open a step of `pieces` micro-batches, as many on every rank; the weights must not change."""
    return SparseStep(ctx, pieces)


class SparseStep:
    """A step that is under way; see `begin`."""

    def __init__(self, ctx: StepContext, pieces: int) -> None:
        self._ctx, self._left = ctx, pieces
        self._model = Model.of(ctx)
        # decided before the first row, from numbers that every rank knows: all ranks choose alike
        self._by_rows = self._sends_rows()
        self._auxk = AuxK(self._model, by_rows=self._by_rows) if ctx.k_dead else None
        # shards add up their reconstructions before an error is known; prefixes and a linear path are not
        # made at once either, and rows cross the data axis as they are before they are rounded
        whole = ctx.world.latent.size == 1 and not self._by_rows
        plain = len(ctx.spec.prefixes) == 1 and ctx.sae.W_skip is None
        self._fused = self._model.at_once if whole and plain else None
        # gathered rows are those of all ranks, so their sums are whole
        summed_here = self._by_rows or ctx.world.data.size == 1
        self._gradients = Gradients(self._model, None if summed_here else ctx.world.data)
        self._loss = ctx.total.new_zeros(())
        self._second_rounds = 0

    @torch.no_grad()
    def take(self, batch: Rows) -> Taken:
        """Add a micro-batch: this rank's rows, weights above 0; B may be 0 on a mesh."""
        ctx, model = self._ctx, self._model
        self._left -= 1
        # a copy of [B, D]; folding b_pre into b, as the specification does, would read W_enc once more, and N
        # is the larger as a rule
        centred = model.ops.low(batch.x - ctx.sae.b_pre.detach())
        gather = Gather(ctx.world.data, centred, ctx.fullest) if self._by_rows else None
        encoded = self._encode(centred)
        mark("encode")
        codes, made = self._reconstruct(batch, centred, encoded.best)
        self._loss += made.loss
        parts = made.parts
        # before AuxK is computed, so that the exchange and AuxK overlap
        self._send(gather, parts)
        part, dead = self._add_auxk(encoded.dead, centred, made, batch)
        if part is not None:
            parts = [*parts, part]
            self._send(gather, [part])
        mark("decode")
        skip = None if ctx.sae.W_skip is None else (pulls_of(parts), batch.x)
        if gather is not None:
            entries, centred, pulls = gathered(model, gather)
            pull = pulls.sum(0)
        else:
            pull = pull_of(parts) if skip is None else skip[0].sum(0)
            # a prefix that ends before this shard has no codes here
            entries = [Entries.of(model, part) for part in parts if part.values.numel()]
        self._gradients.add(entries, dead, centred, pull, skip, last=not self._left)
        mark("backward")
        return Taken(made.y_hat, *codes)

    @torch.no_grad()
    def end(self) -> Ending:
        """Loss and norm of the whole step, whose gradients are then in `.grad`."""
        assert not self._left, "a micro-batch is missing"
        ctx, loss, second_rounds = self._ctx, self._loss, self._second_rounds
        if ctx.world.data.size > 1:
            # one collective for both; float64 holds the count exactly
            told = torch.stack([loss.double(), loss.new_tensor(second_rounds, dtype=torch.float64)])
            told = ctx.world.data.sum(told)
            loss, second_rounds = told[0].to(loss.dtype), int(told[1])
        # AuxK's value is already that of all ranks' rows
        auxk = None if self._auxk is None else self._auxk.value
        norm = finish([self._gradients])
        return Ending(loss, norm, auxk, ctx.spec.auxk_coefficient, second_rounds)

    # ---- the parts of `take` -----------------------------------------------------------------------

    def _encode(self, centred: Tensor) -> Encoded:
        """This shard's best candidates of each row."""
        return encode(self._model, centred, self._candidates(), self._auxk)

    def _candidates(self) -> int:
        """Candidates per row."""
        if self._ctx.sae.parts.traits.selects == "batch":
            return BATCH_CANDIDATES * self._ctx.k
        return self._widest

    @property
    def _widest(self) -> int:
        """Latents per row of the widest selection by rows."""
        ctx = self._ctx
        return min(4 * ctx.k, ctx.spec.latents) if ctx.spec.multi_topk else ctx.k

    def _reconstruct(self, batch: Rows, centred: Tensor, best: Codes) -> tuple[Codes, Reconstruction]:
        """Selection, reconstruction and its gradients, without AuxK."""
        ctx, model, latent = self._ctx, self._model, self._ctx.world.latent
        batched = ctx.sae.parts.traits.selects == "batch"
        if batched:
            groups = groups_of(batch.groups, ctx.k, ctx.groups, ctx.world, centred.device)
            b_enc = ctx.sae.b_enc.detach()
            one = Candidates(best, centred, model.W_enc, b_enc)
            (codes,), again = best_of_batch(model.ops, [one], groups)
        else:
            codes, again = best_of_rows(best, ctx.k, ctx.kept_of_shards(ctx.k), latent)
        self._second_rounds += again
        # by the whole batch's weight, so that micro-batches and ranks simply add up
        scale = batch.weights / (ctx.total * ctx.constant)
        # BatchTopK and shards leave slots empty, TopK on one process only if fewer than k values are positive
        padded = batched or latent.size > 1
        if self._fused is not None and len(batch.x):
            made = reconstruct_at_once(self._fused, model, batch, codes, scale, padded)
        else:
            made = reconstruct(model, batch, codes, scale, padded)
        if ctx.spec.multi_topk:
            wide, again = best_of_rows(best, self._widest, ctx.kept_of_shards(self._widest), latent)
            self._second_rounds += again
            # 4K is a selection of its own on a mesh, from the candidates already at hand
            part, loss = widened(model, batch, wide, scale)
            made = made._replace(parts=[*made.parts, part], loss=made.loss + loss)
        return codes, made

    def _add_auxk(
        self, found: DeadCodes, centred: Tensor, made: Reconstruction, batch: Rows
    ) -> tuple[EntryPart | None, DeadRows | None]:
        """What AuxK adds to this micro-batch's gradients; `made.error` is overwritten."""
        if self._auxk is None:
            return None, None
        e = batch.y - made.y_hat if made.error is None else made.error.neg_()
        return self._auxk.take(found, centred, e, batch.weights, last=not self._left)

    # ---- rows or gradients over `data` -------------------------------------------------------------

    def _sends_rows(self) -> bool:
        """Whether rows and codes cross the data axis: if that sends less than gradients would.

        Not with `accumulate`: gradients cross once, after the last micro-batch, when the rows are gone.
        """
        ctx = self._ctx
        data, spec, sae = ctx.world.data, ctx.spec, ctx.sae
        if data.size == 1 or spec.accumulate > 1 or ctx.world.exchange == "dense":
            return False
        batched = sae.parts.traits.selects == "batch"
        k = 2 * ctx.k if batched else ctx.k  # a fuller row of a batch has twice k
        widths = [k] * len(spec.prefixes) + ([self._widest] if spec.multi_topk else [])
        widths += [ctx.k_dead] if ctx.k_dead else []
        # an estimate: how many a shard keeps per row is known only after the selection
        entries = [min(sae.latents, candidates(width, ctx.world.latent.size)) for width in widths]
        size = ctx.total.element_size()
        by_rows = rows_bytes(data.size, ctx.fullest, sae.d_model, sae.d_out, entries, size)
        by_sums = dense_bytes(data.size, sae.latents, sae.d_model, sae.d_out, size)
        return ctx.world.exchange == "rows" or by_rows < by_sums

    def _send(self, gather: Gather | None, parts: list[EntryPart]) -> None:
        """Begin to send parts to the other ranks of the data axis, while the step continues."""
        if gather is None:
            return
        for part in parts:
            values = part.values if part.chosen is None else torch.where(part.chosen, part.values, 0.0)
            # dz is sent, too: without it every rank would compute the dots of all ranks' rows
            dz = values
            if values.numel():
                dz = Entries.of(self._model, part).in_rows(values)
            gather.add(Part(values, dz, part.indices, part.grad, part.whole))
