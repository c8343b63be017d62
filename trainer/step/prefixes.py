"""Reconstructions by parts of the codes: Matryoshka's prefixes of the latents, Multi-TopK's wider codes.

Legend: B rows of this rank, O width of the output, S slots of codes, N latents of all shards.

On a mesh a prefix may end before this shard's latents or begin behind them: its part then has no codes
here, but the sum over the shards is taken all the same.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.trainer.mesh.topk import Codes
from winnow.trainer.step.context import Model
from winnow.trainer.step.losses import Rows


class EntryPart(NamedTuple):
    """Codes that one gradient flows through."""

    values: Tensor
    indices: Tensor
    grad: Tensor
    """[B, O]: of the reconstruction made from these codes."""
    chosen: Tensor | None = None
    """bool [B, S]: the entries it flows through; null for all."""
    whole: bool = False
    """Whether `grad` is a gradient of the whole output, bias and linear path included."""


class Reconstruction(NamedTuple):
    """What codes give, and how it is pulled."""

    parts: list[EntryPart]
    y_hat: Tensor
    error: Tensor
    """[B, O]: y_hat - y."""
    loss: Tensor
    """Of this rank's rows, divided by the whole batch's weight []."""


def reconstruct(model: Model, batch: Rows, codes: Codes, scale: Tensor, padded: bool) -> Reconstruction:
    """See `spec.prefix_loss`.

    A latent's code reaches every prefix it is in, so the gradient of its part is the sum over those: the
    first part's is the gradient of the bias. With one prefix there is one part, and the plain loss.

    Args:
        model: The step's.
        batch: B rows.
        codes: At least 0.
        scale: [B]: the rows' weights over the whole batch's and the loss constant.
        padded: Whether codes have empty slots as a rule; those are then left out of the gradients.
    """
    ctx, values, indices = model.ctx, *codes
    sizes, own = ctx.spec.prefixes, ctx.shard.part
    share = (2 / len(sizes) * scale)[:, None]
    y_hat = error = batch.y
    some: list[Codes] = []
    chosen: list[Tensor | None] = []
    grads: list[Tensor] = []
    loss = scale.new_zeros(())
    for number, (first, stop) in enumerate(pairwise((0, *sizes))):
        low, high = max(first, own.start) - own.start, min(stop, own.stop) - own.start
        mask = None
        part = Codes(values[:, :0], indices[:, :0]) if low >= high else codes
        if low < high and (padded or high - low < len(own)):
            mask = values > 0
        if mask is not None and high - low < len(own):
            mask &= (indices >= low) & (indices < high)
            part = Codes(torch.where(mask, values, 0.0), indices)
        decoded = model.decode(*part)
        y_hat = y_hat + decoded if number else ctx.sae.add_bias(decoded, batch.x).detach()
        error = y_hat - batch.y
        loss += scale @ squares(error) / len(sizes)
        some.append(part)
        grads.append(error * share)
        chosen.append(mask)
    for number in reversed(range(len(grads) - 1)):
        grads[number] += grads[number + 1]
    parts = [EntryPart(*part, grad, mask) for part, grad, mask in zip(some, grads, chosen, strict=True)]
    parts[0] = parts[0]._replace(whole=True)
    return Reconstruction(parts, y_hat, error, loss)


def widened(model: Model, batch: Rows, wide: Codes, scale: Tensor) -> tuple[EntryPart, Tensor]:
    """Multi-TopK's second term, L(4K) / 8: its part, and the loss."""
    error = model.ctx.sae.add_bias(model.decode(*wide), batch.x).detach().sub_(batch.y)
    loss = scale @ squares(error) / 8
    chosen = None if model.ctx.world.latent.size == 1 else wide.values > 0
    return EntryPart(*wide, error.mul_((scale / 4)[:, None]), chosen, whole=True), loss


def squares(rows: Tensor) -> Tensor:
    """`rows.square().sum(1)` [B] of rows [B, D]."""
    return torch.linalg.vecdot(rows, rows)
