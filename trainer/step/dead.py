"""Which latents are dead: silence counted in rows (tokens).

Legend: B rows, K active latents per row, N latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class _Known(NamedTuple):
    """How many latents are silent, as long as nobody has written `since`."""

    facts: tuple[int, int, int]
    """The tensor, how often torch has written it, and the rows of silence."""
    silent: int


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
        self._known: _Known | None = None

    def silent(self, rows: int) -> Tensor:
        """Indices int64 [M], ascending, of the latents not active in the last `rows` rows."""
        silent = self.since >= rows
        known = self._known
        if known is None or known.facts != (id(self.since), self.since._version, rows):
            return silent.nonzero().flatten()
        # the same without asking the device how many they are: the m-th is where the count of them reaches m
        wanted = torch.arange(1, known.silent + 1, device=silent.device)
        return torch.searchsorted(silent.cumsum(0), wanted)

    def active(self, values: Tensor, indices: Tensor) -> Tensor:
        """uint8 [N]: 1 if the latent is active in codes values [B, K] and indices [B, K]."""
        # only values above 0: empty slots also have an index. They go to a place past the last latent, since
        # to leave them out would ask the device how many they are
        latents = len(self.since)
        places = torch.where(values > 0, indices, latents).flatten()
        # bytes, since ranks combine them by their largest
        found = torch.zeros(latents + 1, dtype=torch.uint8, device=self.since.device)
        return found.scatter_(0, places, 1)[:latents]

    def after(self, active: Tensor, rows: int) -> Tensor:
        """`since` after a step of `rows` rows of weight above 0 in which these latents [N] were active."""
        return torch.where(active.bool(), 0, self.since + rows)

    def update(self, active: Tensor, rows: int) -> None:
        """Count such a step."""
        self.settle(self.after(active, rows))

    def settle(self, since: Tensor, silent: int | None = None, rows: int = 0) -> None:
        """Take over what `after` gave, and the number of latents then silent for `rows` rows, if known."""
        self.since = since
        self._known = None if silent is None else _Known((id(since), since._version, rows), silent)
