"""Examples of how a step launches its kernels, for programs that compile or reckon them without a GPU.

Each file of kernels registers its own, next to its launchers. An example calls a launcher on tensors of the
device `meta`: nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """A step's sizes."""

    rows: int = 16_384
    width: int = 768
    latents: int = 131_072
    k: int = 32
    dtype: torch.dtype = torch.bfloat16
    """Of the products' operands; sums are float32."""

    def empty(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor without numbers, of the operands' type unless told otherwise."""
        return torch.empty(sizes, dtype=dtype or self.dtype, device="meta")

    def codes(self) -> tuple[Tensor, Tensor]:
        """Values, float32, and indices, int64, [rows, k]."""
        size = (self.rows, self.k)
        return self.empty(*size, dtype=torch.float32), self.empty(*size, dtype=torch.int64)


Example = Callable[[Shape], object]
EXAMPLES: dict[str, list[Example]] = {}
"""By the name of the module that registers them."""


def example(function: Example) -> Example:
    """Register a call of the module's launchers; its docstring, if any, says what it is of in tables."""
    EXAMPLES.setdefault(function.__module__, []).append(function)
    return function
