"""Reconstructions by parts of the codes: Matryoshka's prefixes of the latents, Multi-TopK's wider codes.

Legend: B rows of this rank, O width of the output, S slots of codes, N latents of all shards.

On a mesh a prefix may end before this shard's latents or begin after them: its part then has no codes here.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.trainer.kernels.fused_ops import FusedOps
from winnow.trainer.mesh.topk import Codes
from winnow.trainer.step.context import Model
from winnow.trainer.step.losses import Rows


class EntryPart(NamedTuple):
    """Codes that one gradient flows through."""

    values: Tensor
    indices: Tensor
    grads: tuple[Tensor, ...]
    """Of the reconstruction made from these codes, [B, O/T] for each of T targets."""
    chosen: Tensor | None = None
    """bool [B, S]: the entries it flows through; None for all."""
    whole: bool = False
    """Whether `grads` are those of the whole output, bias and linear path included."""
    dz: Tensor | None = None
    """[B, S]: the gradient of the values, if it is known already."""
    pull: Tensor | None = None
    """[O]: the sum of `grads` over the rows, if it is known; they are then rounded as `StepOps.low` does."""

    @property
    def grad(self) -> Tensor:
        """[B, O]: that of all targets."""
        return self.grads[0] if len(self.grads) == 1 else torch.cat(self.grads, 1)


class Reconstruction(NamedTuple):
    """A reconstruction from codes, its error and loss, and the codes with their gradients."""

    parts: list[EntryPart]
    y_hat: Tensor
    error: Tensor | None
    """[B, O]: y_hat - y; None if it was not written."""
    loss: Tensor
    """Of this rank's rows, divided by the whole batch's weight []."""


def reconstruct_at_once(
    fused: FusedOps, model: Model, batch: Rows, codes: Codes, scale: Tensor, padded: bool
) -> Reconstruction:
    """`reconstruct` with one prefix and all latents here, the gradient of the values included."""
    sae = model.ctx.sae
    bias = sae.b_pre if sae.b_dec is None else sae.b_dec
    made = fused.reconstruct(*codes, model.W_dec, batch.y, bias.detach(), 2 * scale)
    chosen = codes.values > 0 if padded else None
    part = EntryPart(*codes, (made.grad,), chosen, whole=True, dz=made.dz, pull=made.pull)
    return Reconstruction([part], made.y_hat, None, scale @ made.squares)


def reconstruct(model: Model, batch: Rows, codes: Codes, scale: Tensor, padded: bool) -> Reconstruction:
    """Reconstruct by every prefix; see `spec.prefix_loss`. With one prefix: one part, and the plain loss.

    Args:
        model: The step's.
        batch: B rows.
        codes: At least 0.
        scale: [B]: the rows' weights over the whole batch's and the loss constant.
        padded: Whether many slots may be empty; those are then left out of the gradients.
    """
    ctx, values, indices = model.ctx, *codes
    sizes, own = ctx.spec.prefixes, ctx.shard.part
    # a mean over prefixes, not the paper's sum: learning rate, clipping and AuxK keep their scale
    share = (2 / len(sizes) * scale)[:, None]
    y_hat = error = batch.y
    some: list[Codes] = []
    chosen: list[Tensor | None] = []
    grads: list[Tensor] = []
    loss = scale.new_zeros(())
    for number, (first, stop) in enumerate(pairwise((0, *sizes))):
        low, high = max(first, own.start) - own.start, min(stop, own.stop) - own.start
        mask = None
        # without codes of this shard, but not skipped: `decode` below is a collective
        part = Codes(values[:, :0], indices[:, :0]) if low >= high else codes
        # full codes of a whole shard need no mask, and the sort of their entries is then plain
        if low < high and (padded or high - low < len(own)):
            mask = values > 0
        if mask is not None and high - low < len(own):
            mask &= (indices >= low) & (indices < high)
            part = Codes(torch.where(mask, values, 0.0), indices)
        decoded = model.decode(*part)
        # prefixes are nested, so each adds only its own latents; the bias is in the first
        y_hat = y_hat + decoded if number else ctx.sae.add_bias(decoded, batch.x).detach()
        error = y_hat - batch.y
        loss += scale @ squares(error) / len(sizes)
        some.append(part)
        grads.append(error * share)
        chosen.append(mask)
    # a code reaches every prefix that contains its latent, so its gradient is the sum over those; the first
    # part's is thus the gradient of the whole output
    for number in reversed(range(len(grads) - 1)):
        grads[number] += grads[number + 1]
    parts = [EntryPart(*part, (grad,), mask) for part, grad, mask in zip(some, grads, chosen, strict=True)]
    parts[0] = parts[0]._replace(whole=True)
    return Reconstruction(parts, y_hat, error, loss)


def widened(model: Model, batch: Rows, wide: Codes, scale: Tensor) -> tuple[EntryPart, Tensor]:
    """Multi-TopK's second term, L(4K) / 8: its part, and the loss."""
    error = model.ctx.sae.add_bias(model.decode(*wide), batch.x).detach().sub_(batch.y)
    loss = scale @ squares(error) / 8
    chosen = None if model.ctx.world.latent.size == 1 else wide.values > 0
    # 2/8: the derivative of an eighth of the square
    return EntryPart(*wide, (error.mul_((scale / 4)[:, None]),), chosen, whole=True), loss


def squares(rows: Tensor) -> Tensor:
    """`rows.square().sum(1)` [B] of rows [B, D]."""
    return torch.linalg.vecdot(rows, rows)
