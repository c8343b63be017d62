"""The sparse route of a cross-layer transcoder: one step of all its layers together.

The numbers of `winnow.trainer.step.cross_spec` up to rounding. Most of what a layer needs is that of any
transcoder (`winnow.trainer.step.sparse`); here the layers meet three times: in BatchTopK's selection, in the
predictions, which add up, and in the norm by which gradients are clipped. Decoding and gradients go target by
target, so that what is gathered, [B, D] or [N, D], stays in cache; all targets of a layer share one sort of
its codes.

Legend: B rows of this rank's micro-batch, D width of a layer, N latents per layer, L layers, l source layer,
m target layer, K active latents per row and layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from winnow.trainer.mesh.topk import Codes
from winnow.trainer.step.auxk import AuxK
from winnow.trainer.step.context import Model, Outcome, StepContext, Taken
from winnow.trainer.step.gradients import Entries, Gradients, finish
from winnow.trainer.step.losses import Rows
from winnow.trainer.step.prefixes import EntryPart, squares
from winnow.trainer.step.selection import (
    BATCH_CANDIDATES,
    Candidates,
    best_of_batch,
    best_of_rows,
    groups_of,
)
from winnow.trainer.step.spans import mark
from winnow.trainer.step.sparse import Encoded, encode


def begin(layers: Sequence[StepContext], pieces: int) -> CrossStep:
    """Open a step of `pieces` micro-batches, as many on every rank; the weights must not change."""
    return CrossStep(layers, pieces)


class CrossStep:
    """A step that is under way; see `begin`."""

    def __init__(self, layers: Sequence[StepContext], pieces: int) -> None:
        self._left = pieces
        self._models = [Model.of(ctx) for ctx in layers]
        data = layers[0].world.data
        self._data, self._latent = data, layers[0].world.latent
        self._auxk = [AuxK(model, by_rows=False) if model.ctx.k_dead else None for model in self._models]
        # always summed as gradients: rows would have to be sent for every layer and target
        over = None if data.size == 1 else data
        self._gradients = [Gradients(model, over) for model in self._models]
        self._losses = layers[0].total.new_zeros(len(layers))
        self._second_rounds = 0

    @torch.no_grad()
    def take(self, batches: Sequence[Rows]) -> list[Taken]:
        """Add a micro-batch: for each layer the rows that it reads, and those of its own target."""
        self._left -= 1
        models = self._models
        centred = [
            model.ops.low(batch.x - model.ctx.sae.b_pre.detach())
            for model, batch in zip(models, batches, strict=True)
        ]
        wanted = self._candidates()
        encoded = [
            encode(model, x, wanted, auxk) for model, x, auxk in zip(models, centred, self._auxk, strict=True)
        ]
        mark("encode")
        codes = self._choose(batches[0], centred, encoded)
        y_hat = self._predict(codes, len(batches[0].x))
        errors = [made - batch.y for made, batch in zip(y_hat, batches, strict=True)]
        grads = self._add_losses(errors, batches[0].weights)
        pulls = [grad.sum(0) for grad in grads]
        # once for all layers that write to a target
        grads = [models[0].ops.low(grad) for grad in grads]
        mark("decode")
        for layer, found in enumerate(zip(codes, encoded, centred, strict=True)):
            self._learn(layer, *found, errors[layer:], grads[layer:], pulls[layer], batches[0].weights)
        mark("backward")
        return [Taken(made, *kept) for made, kept in zip(y_hat, codes, strict=True)]

    @torch.no_grad()
    def end(self) -> list[Outcome]:
        """Each layer's loss, that of its target and its AuxK, and the joint norm."""
        assert not self._left, "a micro-batch is missing"
        losses, second_rounds = self._losses, self._second_rounds
        if self._data.size > 1:
            # one collective for all; float64 holds the count exactly
            told = torch.cat([losses.double(), losses.new_tensor([second_rounds], dtype=torch.float64)])
            told = self._data.sum(told)
            losses, second_rounds = told[:-1].to(losses.dtype), int(told[-1])
        norm = finish(self._gradients).item()
        outcomes: list[Outcome] = []
        for model, auxk, loss in zip(self._models, self._auxk, losses.tolist(), strict=True):
            value, finite = (None, True) if auxk is None else auxk.read()
            # after the sum, since AuxK's value is already that of all ranks' rows
            loss += model.ctx.spec.auxk_coefficient * (value or 0.0)
            outcomes.append(Outcome(loss, value, finite, norm, second_rounds))
        return outcomes

    # ---- the parts of `take` -----------------------------------------------------------------------

    @property
    def _batched(self) -> bool:
        return self._models[0].ctx.sae.parts.traits.selects == "batch"

    def _candidates(self) -> int:
        """Candidates per row and layer."""
        k = self._models[0].ctx.k
        return BATCH_CANDIDATES * k if self._batched else k

    def _choose(self, batch: Rows, centred: list[Tensor], encoded: list[Encoded]) -> list[Codes]:
        """The codes of each layer: K per row, or of all layers together the best K L per row of a group."""
        models, ctx = self._models, self._models[0].ctx
        best = [found.best for found in encoded]
        if self._batched:
            groups = groups_of(batch.groups, ctx.k * len(models), ctx.groups, ctx.world, batch.weights.device)
            layers = [
                Candidates(found, x, model.W_enc, model.ctx.sae.b_enc.detach())
                for found, x, model in zip(best, centred, models, strict=True)
            ]
            codes, again = best_of_batch(models[0].ops, layers, groups)
            self._second_rounds += again
            return codes
        if self._latent.size == 1:
            return [best_of_rows(found, ctx.k, [], self._latent).codes for found in best]
        # layers as further rows: the shards agree in one collective
        joined = Codes(*(torch.cat(parts) for parts in zip(*best, strict=True)))
        (values, indices), again = best_of_rows(joined, ctx.k, ctx.kept_of_shards(ctx.k), self._latent)
        self._second_rounds += again
        count = len(models)
        return [Codes(*one) for one in zip(values.chunk(count), indices.chunk(count), strict=True)]

    def _predict(self, codes: list[Codes], rows: int) -> Tensor:
        """The predictions [L, B, D]: what all layers l <= m give to each target m."""
        models = self._models
        y_hat = self._losses.new_zeros(len(models), rows, models[0].ctx.sae.d_model)
        for layer, (model, found) in enumerate(zip(models, codes, strict=True)):
            if found.values.numel():
                for target in range(model.targets):
                    model.add_for(target, y_hat[layer + target], *found)
        self._latent.sum(y_hat)
        for made, model in zip(y_hat, models, strict=True):
            made += own_bias(model.ctx)
        return y_hat

    def _add_losses(self, errors: list[Tensor], weights: Tensor) -> list[Tensor]:
        """Add each target's loss; the gradients [B, D] of the predictions."""
        grads: list[Tensor] = []
        for target, (error, model) in enumerate(zip(errors, self._models, strict=True)):
            # by the whole batch's weight, so that micro-batches and ranks simply add up
            scale = weights / (model.ctx.total * model.ctx.constant)
            self._losses[target] += scale @ squares(error)
            grads.append(error * (2 * scale)[:, None])
        return grads

    def _learn(
        self,
        layer: int,
        codes: Codes,
        encoded: Encoded,
        centred: Tensor,
        errors: list[Tensor],
        grads: list[Tensor],
        pull: Tensor,
        weights: Tensor,
    ) -> None:
        """Add the gradients of a layer, given errors and gradients of the targets it writes to.

        `pull` is the gradient of the bias of its own target.
        """
        model, auxk = self._models[layer], self._auxk[layer]
        # BatchTopK and shards leave slots empty, TopK on one process only if fewer than k values are positive
        chosen = codes.values > 0 if self._batched or self._latent.size > 1 else None
        parts = [EntryPart(*codes, tuple(grads), chosen, whole=True)]
        dead = None
        if auxk is not None:
            e = torch.cat(errors, 1).neg_()
            part, dead = auxk.take(encoded.dead, centred, e, weights, last=not self._left)
            parts += [part] if part is not None else []
        entries = [Entries.of(model, part) for part in parts if part.values.numel()]
        # the layer's own target is the first, and the only one whose bias it holds
        self._gradients[layer].add(entries, dead, centred, pull, None, last=not self._left)


def own_bias(ctx: StepContext) -> Tensor:
    """The bias [D] of a layer's own target, the only one that it holds."""
    b_dec = ctx.sae.b_dec
    assert b_dec is not None, "a layer of a set is a transcoder"
    return b_dec.detach()[: ctx.sae.d_model]
