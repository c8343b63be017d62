"""BatchTopK's threshold for use outside training: one number above which rows have K latents on average.

Legend: B rows, D d_model, N latents, K active latents per row.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from winnow.schemas.errors import ConfigError
from winnow.trainer.mesh.edge import nth_best
from winnow.trainer.mesh.shard import Shard

_CANDIDATES = 4
"""First guess of how many times K the row with the most active latents has above the threshold."""


@torch.no_grad()
def calibrate(shard: Shard, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Set the threshold so that rows have K latents above it on average, exactly unless values tie.

    Args:
        shard: With `activation: batchtopk`; a collective over the latent axis.
        batches: Raw training rows [B, D] and their weights [B]; rows of weight 0 are left out. All of them
            are held in memory in normalised form.

    Returns:
        The threshold, at least 0: half-way between the last value that is active and the next, or 0.

    Raises:
        ConfigError: No row of weight above 0.
    """
    sae, latent, latents = shard.sae, shard.world.latent, shard.latents
    device = sae.W_enc.device
    kept = [sae.normalise(rows[weights > 0].to(device))[0] for rows, weights in batches]
    kept = [x for x in kept if len(x)]
    if not kept:
        raise ConfigError("the rows for the threshold", expected="some of weight above 0", got="none")
    quota, width = sae.k * sum(map(len, kept)), _CANDIDATES * sae.k
    while True:
        width = min(width, sae.latents)
        # of this shard alone: the search joins the shards itself
        values = torch.cat([sae.select(x, width)[0] for x in kept])
        threshold = torch.stack([nth_best(values, rank, latent) for rank in (quota, quota + 1)]).mean()
        threshold = threshold if sae.k < latents else torch.zeros_like(threshold)
        # a row whose last candidate is above the threshold may hold more than was looked at
        short = width < sae.latents and not bool((values[:, -1] <= threshold).all())
        if not latent.largest(torch.tensor(short, dtype=torch.uint8)):
            break
        width *= 4
    sae.threshold.copy_(threshold)
    return threshold.item()
