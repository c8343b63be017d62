"""The best k of all shards' latents, exactly, without gathering k of every shard.

Legend: B rows, S shards, k kept per row, c candidates, m a shard's best.

Every shard orders its own best by (value descending, latent ascending). First each sends its best
c = min(k, ceil(2k/S) + 4) values; the k-th of them all is tau, a lower bound for the true k-th best. A row
is final if every shard that held values back sent a last one below tau. The other rows go through a second
round with everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.trainer.mesh.world import Axis


class Counts(NamedTuple):
    """How far into this shard's best the best k of all reach."""

    kept: Tensor
    """int64 [B]: that many of the shard's first."""
    second_rounds: int
    """Rows that one round did not settle."""


class Codes(NamedTuple):
    """This shard's part of the codes: values [B, w], 0 if a row has fewer, and indices within the shard."""

    values: Tensor
    indices: Tensor


def candidates(k: int, shards: int) -> int:
    """Values c that each shard sends first."""
    # twice an even share, so that second rounds are rare. All k of 512 shards would be 137 GB per rank at
    # k = 256 and B = 131,072
    return min(k, -(-2 * k // shards) + 4)


def count_kept(values: Tensor, k: int, available: Sequence[int], axis: Axis) -> Counts:
    """How many of this shard's best are among the best k of all.

    Args:
        values: This shard's best m [B, m], by (value descending, latent ascending).
        k: Kept per row; at most what all shards have.
        available: m of each shard: min(k, its latents).
        axis: The latent axis.
    """
    if axis.size == 1:
        return Counts(torch.full((len(values),), k, device=values.device), 0)
    c = candidates(k, axis.size)
    sent = axis.gather(_pad(values, c))  # [S, B, c]
    tau, kept = _reach(sent, k, axis.rank)
    holds_back = [shard for shard, m in enumerate(available) if m > c]
    if not holds_back:
        return Counts(kept, 0)
    # what a shard held back is at most its last value, so below tau none of it can belong; NaN is never
    # below, and takes the second round
    final = (sent[holds_back, :, -1] < tau).all(0)
    rows = (~final).nonzero().flatten()
    if len(rows):
        kept[rows] = _reach(axis.gather(_pad(values[rows], max(available))), k, axis.rank)[1]
    return Counts(kept, len(rows))


def _pad(values: Tensor, width: int) -> Tensor:
    """The first `width` columns, -inf if there are fewer."""
    if values.shape[1] >= width:
        return values[:, :width].contiguous()
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=-torch.inf)


def _reach(sent: Tensor, k: int, rank: int) -> tuple[Tensor, Tensor]:
    """The k-th best [B] of the values sent [S, B, c], and how many [B] of shard `rank` reach it.

    NaN counts as the largest number, as in torch.
    """
    flat = sent.transpose(0, 1).flatten(1)
    tau = flat.topk(k, dim=1).values[:, -1]
    # not `sent > tau`, which is false for NaN
    above = (~(sent <= tau[:, None])).sum(2)  # [S, B]
    ties = (sent == tau[:, None]).sum(2)
    # shards hold ascending ranges of latents: ties go to the earlier one, as by index, and no index is sent
    room = k - above.sum(0) - (ties.cumsum(0) - ties)[rank]
    return tau, above[rank] + room.clamp_min(0).minimum(ties[rank])


def keep(values: Tensor, indices: Tensor, kept: Tensor) -> Codes:
    """Cut a shard's best [B, m] to the counts [B] of `count_kept`, negatives to 0."""
    # the fullest row sets the width, so that empty slots are neither decoded nor sent
    width = min(values.shape[1], max(1, int(kept.max()) if len(kept) else 1))
    slot = torch.arange(width, device=values.device)
    values = torch.where(slot < kept[:, None], values[:, :width], 0.0).relu_()
    return Codes(values, indices[:, :width].contiguous())
