"""What one launch of a kernel multiplies and moves: the entries of a step's ledger.

Each kernel's file registers its own function here, so that a kernel and its account change together. Reckoned
from the arguments' shapes and types alone: the tensors may be on the device `meta`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """One launch."""

    flops: float = 0.0
    """Of products on the device's matrix units, in the operands' type; a multiply-add is two."""
    streamed: int = 0
    """Bytes read or written in order, each operand once."""
    gathered: int = 0
    """Bytes of rows that are read at places given by indices."""


CostOf = Callable[[Mapping[str, Any]], Cost]

COSTS: dict[str, CostOf] = {}
"""By the kernel's name."""


def cost_of(kernel: str) -> Callable[[CostOf], CostOf]:
    """Register the account of the kernel of this name; it is given the launch's arguments by their names."""

    def register(function: CostOf) -> CostOf:
        COSTS[kernel] = function
        return function

    return register
