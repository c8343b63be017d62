"""The specification of a cross-layer transcoder's step: dense autograd, which the sparse route is held to.

Layer l's latents read layer l and write to every target m >= l::

    y_hat.m = sum over l <= m of W_dec[l -> m]^T z.l + b_dec.m
    loss    = sum over m of |y.m - y_hat.m|^2 / constant.m, per weight of the batch, + AuxK of every layer

Codes, AuxK and the mesh's collectives are those of `winnow.trainer.step.spec`.

Legend: B rows of this rank, D width of a layer, O width of a layer's output, N latents per layer, n of this
shard, L layers, K active latents per row and layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from winnow.trainer.step.context import Outcome, StepContext, Taken
from winnow.trainer.step.losses import Rows, reconstruction_loss
from winnow.trainer.step.spans import mark
from winnow.trainer.step.spec import (
    AuxK,
    TrainCodes,
    auxk_loss,
    best_of_all,
    joint_gradients,
    train_codes,
    whole_loss,
)


def begin(layers: Sequence[StepContext], pieces: int) -> CrossSpecStep:
    """Open a step, which takes the whole batch at once."""
    assert pieces == 1, "a spec that asks for more is refused"
    return CrossSpecStep(layers)


class CrossSpecStep:
    """A step that is under way; see `begin`."""

    def __init__(self, layers: Sequence[StepContext]) -> None:
        self._layers = list(layers)
        self._outcomes: list[Outcome] = []

    def take(self, batches: Sequence[Rows]) -> list[Taken]:
        """Loss and gradients of the whole batch: for each layer what it reads, and its own target's rows."""
        layers, weights = self._layers, batches[0].weights
        b_pres = [ctx.world.latent.common(ctx.sae.b_pre) for ctx in layers]
        codes = _codes(layers, batches, b_pres)
        y_hat = _predict(layers, codes, len(weights))
        losses: list[Tensor] = []
        found: list[AuxK | None] = []
        for number, (ctx, batch, made) in enumerate(zip(layers, batches, y_hat, strict=True)):
            losses.append(reconstruction_loss(batch.y, made, weights, ctx.constant, ctx.total))
            found.append(None)
            if ctx.k_dead:
                # of all targets that this layer's dead latents can still reach
                left = [target.y - made for target, made in zip(batches, y_hat, strict=True)][number:]
                aux = auxk_loss(ctx, batch.x, torch.cat(left, 1), weights, b_pres[number])
                losses[-1] = losses[-1] + ctx.spec.auxk_coefficient * aux.loss
                found[-1] = aux
        mark("forward")
        for ctx in layers:
            ctx.sae.zero_grad()
        torch.stack(losses).sum().backward()
        # clipped together, since one loss moves all of them
        norm = math.hypot(*(joint_gradients(ctx) for ctx in layers))
        for ctx, loss, aux in zip(layers, losses, found, strict=True):
            value, finite = (None, True) if aux is None else (aux.value, aux.finite)
            self._outcomes.append(Outcome(whole_loss(ctx, loss.detach(), 0.0), value, finite, norm))
        mark("backward")
        return [_taken(ctx, made, kept) for ctx, made, kept in zip(layers, y_hat, codes, strict=True)]

    def end(self) -> list[Outcome]:
        """What the step found of each layer; its gradients are in `.grad`."""
        assert self._outcomes, "nothing was taken"
        return self._outcomes


def _codes(layers: list[StepContext], batches: Sequence[Rows], b_pres: list[Tensor]) -> list[TrainCodes]:
    """The codes of each layer; with BatchTopK all latents of all layers compete for K L places per row."""
    first = layers[0]
    if first.sae.parts.traits.selects == "row":
        return [train_codes(*given) for given in zip(layers, batches, b_pres, strict=True)]
    dense = [
        torch.addmm(ctx.sae.b_enc - ctx.sae.W_enc @ b_pre, batch.x, ctx.sae.W_enc.T).relu()
        for ctx, batch, b_pre in zip(layers, batches, b_pres, strict=True)
    ]
    kept = best_of_all(first, first.k * len(layers), batches[0], torch.cat(dense, 1))
    return [TrainCodes(part, None) for part in kept.chunk(len(layers), 1)]


def _predict(layers: list[StepContext], codes: list[TrainCodes], rows: int) -> tuple[Tensor, ...]:
    """The predictions [B, D] of every target: what all layers below give, and its own layer's bias."""
    width = layers[0].sae.d_model
    made = [layers[0].total.new_zeros(rows, width) for _ in layers]
    for number, (ctx, kept) in enumerate(zip(layers, codes, strict=True)):
        z = kept.values
        if kept.indices is not None:
            z = z.new_zeros(rows, ctx.sae.latents).scatter_add(1, kept.indices, z)
        for target, part in enumerate((z @ ctx.sae.W_dec).split(width, 1)):
            made[number + target] = made[number + target] + part
    whole = layers[0].world.latent.joined(torch.stack(made))
    biases = [ctx.sae.b_dec for ctx in layers]
    # the rest of a layer's bias stays exactly 0, so that the layers' outputs add up
    return tuple(y + b[:width] for y, b in zip(whole, biases, strict=True) if b is not None)


def _taken(ctx: StepContext, y_hat: Tensor, codes: TrainCodes) -> Taken:
    indices = codes.indices
    if indices is None:
        # dead counts and telemetry want an index beside every value
        indices = torch.arange(ctx.sae.latents, device=y_hat.device).expand_as(codes.values)
    return Taken(y_hat.detach(), codes.values.detach(), indices)
