"""Which latents are dead: silence counted in rows (tokens).

Legend: B rows, K active latents a row, N latents.
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
        self.since = torch.zeros(latents, dtype=torch.int64, device=device)
        """int64 [N]: rows seen since the latent was active; rows seen in all if it never was."""

    def silent(self, rows: int) -> Tensor:
        """Indices int64 [M], ascending, of the latents not active in the last `rows` rows."""
        return (self.since >= rows).nonzero().flatten()

    def share(self, rows: int) -> float:
        """Share of the N latents not active in the last `rows` rows."""
        return (self.since >= rows).float().mean().item()

    def update(self, values: Tensor, indices: Tensor) -> None:
        """Count one step's codes, values [B, K] and indices [B, K], all of weight above 0."""
        active = torch.bincount(indices[values > 0], minlength=len(self.since)) > 0
        self.since = torch.where(active, 0, self.since + len(values))
