"""BatchTopK's threshold for use outside training: one number, so that K latents a row are active on average.

Legend: B rows, D d_model, N latents, K active latents a row.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from schemas.errors import ConfigError
from trainer.sae import Sae

CANDIDATES = 4
"""First guess at how many times K the fullest row has above the threshold."""


@torch.no_grad()
def calibrate(sae: Sae, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Set `sae.threshold` so that rows have K latents above it on average, exactly where no values tie.

    Args:
        sae: With `activation: batchtopk`.
        batches: Raw training rows [B, D] and their weights [B]; rows of weight 0 are left out. Held in
            normalised form all together.

    Returns:
        The threshold, at least 0: half-way between the last value that is to be active and the next.

    Raises:
        ConfigError: No row of weight above 0.
    """
    device = sae.W_enc.device
    kept = [sae.normalise(rows[weights > 0].to(device))[0] for rows, weights in batches]
    kept = [x for x in kept if len(x)]
    if not kept:
        raise ConfigError("the rows for the threshold", expected="some of weight above 0", got="none")
    count = sum(map(len, kept))
    width = min(CANDIDATES * sae.k, sae.latents)
    while True:
        values = torch.cat([sae.select(x, width)[0] for x in kept])
        quota = min(count * sae.k, values.numel() - 1)
        edges = values.flatten().topk(quota + 1).values[-2:] if quota else values.new_zeros(2)
        threshold = edges.mean().item() if sae.k < sae.latents else 0.0
        if width == sae.latents or bool((values[:, -1] <= threshold).all()):
            break
        width = min(4 * width, sae.latents)  # a row may hold more than was looked at
    sae.threshold.fill_(max(0.0, threshold))
    return sae.threshold.item()
