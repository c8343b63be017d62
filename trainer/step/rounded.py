"""A run's matrices as its products read them, rounded by the update that writes them.

Legend: N latents, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class _Copy(NamedTuple):
    rounded: Tensor
    of: tuple[int, int]
    """The weights' storage and the version of its contents."""


class RoundedWeights:
    """Copies in less than float32 that outlive a step, so that the next one makes none of its own."""

    def __init__(self) -> None:
        self._copies: dict[str, _Copy] = {}

    def of(self, name: str, weights: Tensor, low: Callable[[Tensor], Tensor]) -> Tensor:
        """The weights [N, D] of this name, rounded by `low`, now or earlier; themselves if it rounds nothing.

        A copy is made anew if the weights have been written by others than the update that also writes it.
        """
        kept = self._copies.get(name)
        # not the address, which tensors without contents lack; torch counts its own writes of a tensor, and a
        # kernel's are not among them
        of = weights.untyped_storage()._cdata, weights._version
        if kept is None or kept.of != of:
            kept = _Copy(low(weights), of)
            if kept.rounded is weights:
                return weights
            self._copies[name] = kept
        return kept.rounded

    def written(self, name: str) -> Tensor | None:
        """The copy of this name, for an update that writes both; None if there is none."""
        kept = self._copies.get(name)
        return None if kept is None else kept.rounded
