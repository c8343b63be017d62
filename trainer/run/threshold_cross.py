"""The one threshold of a cross-layer set trained with BatchTopK.

In training the latents of all layers compete for K L places per row, their values compared as they are. So
one number serves all layers: above it, rows have K L latents on average over the whole set, and a layer keeps
the share of them that it won.

Legend: B rows, D width of a layer, N latents per layer, K active latents per row and layer, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from winnow.schemas.errors import ConfigError
from winnow.trainer.mesh.edge import nth_best
from winnow.trainer.mesh.shard import Shard

_CANDIDATES = 4
"""First guess of how many times K a row has above the threshold in one layer."""


@torch.no_grad()
def calibrate_cross(shards: Sequence[Shard], batches: Iterable[tuple[Sequence[Tensor], Tensor]]) -> float:
    """Set every layer's threshold so that rows have K L latents above it on average, unless values tie.

    Args:
        shards: One per layer, with `activation: batchtopk`; a collective over the latent axis.
        batches: For each batch the raw training rows [B, D] that each layer reads, and the weights [B]; rows
            of weight 0 are left out. All of them are held in memory in normalised form.

    Returns:
        The threshold, at least 0: half-way between the last value that is active and the next, or 0.

    Raises:
        ConfigError: No row of weight above 0.
    """
    first = shards[0]
    sae, latent, device = first.sae, first.world.latent, first.sae.W_enc.device
    kept: list[list[Tensor]] = []
    for inputs, weights in batches:
        some = weights > 0
        if bool(some.any()):
            rows = zip(shards, inputs, strict=True)
            kept.append([shard.sae.normalise(x[some].to(device))[0] for shard, x in rows])
    if not kept:
        raise ConfigError("the rows for the threshold", expected="some of weight above 0", got="none")
    quota = sae.k * len(shards) * sum(len(rows[0]) for rows in kept)
    width = _CANDIDATES * sae.k
    while True:
        width = min(width, sae.latents)
        # of this shard alone: the search joins the shards itself
        values = torch.cat(
            [shard.sae.select(x, width)[0] for rows in kept for shard, x in zip(shards, rows, strict=True)]
        )
        threshold = torch.stack([nth_best(values, rank, latent) for rank in (quota, quota + 1)]).mean()
        threshold = threshold if sae.k < first.latents else torch.zeros_like(threshold)
        # a row whose last candidate is above the threshold may hold more than was looked at
        short = width < sae.latents and not bool((values[:, -1] <= threshold).all())
        if not latent.largest(torch.tensor(short, dtype=torch.uint8)):
            break
        width *= 4
    for shard in shards:
        shard.sae.threshold.copy_(threshold)
    return threshold.item()
