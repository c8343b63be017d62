"""Which latents are dead: silence counted in rows (tokens).

Legend: B rows, K active latents per row, N latents.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DeadCounter:
    """Rows since each latent was last active (its value above 0 on a row of weight above 0).

    Args:
        latents: N.
        device: Where the counts are kept.
    """

    def __init__(self, latents: int, device: torch.device | str = "cpu") -> None:
        # rows, not steps: silence then means the same for every batch size and with rows of weight 0
        self.since = torch.zeros(latents, dtype=torch.int64, device=device)
        """int64 [N]: rows seen since the latent was active; rows seen in all if it never was."""

    def silent(self, rows: int) -> Tensor:
        """Indices int64 [M], ascending, of the latents not active in the last `rows` rows."""
        return (self.since >= rows).nonzero().flatten()

    def active(self, values: Tensor, indices: Tensor) -> Tensor:
        """uint8 [N]: 1 if the latent is active in codes values [B, K] and indices [B, K]."""
        # only values above 0: empty slots also have an index
        counts = torch.bincount(indices[values > 0], minlength=len(self.since))
        # bytes, since ranks combine them by their largest
        return (counts > 0).to(torch.uint8)

    def update(self, active: Tensor, rows: int) -> None:
        """Count a step of `rows` rows, all of weight above 0, in which these latents [N] were active."""
        self.since = torch.where(active.bool(), 0, self.since + rows)
