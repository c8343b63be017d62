"""The stream as torch tensors: the only module of the store that imports torch.

Letters: B rows in a batch, D d_model.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from winnow.common.closing import Closing
from winnow.schemas.harvest import SCALE_BYTES
from winnow.schemas.stream import StreamState
from winnow.store.format.order import LaneOrder
from winnow.store.read.stream import Rows


class Batch(NamedTuple):
    """A rank's share of one step, in host memory."""

    rows: dict[str, torch.Tensor]
    """Hook -> [B/world, D], raw activations, float32 unless the stored dtype was asked for (`packed` int8 is
    [B/world, D + 4]); row i is the same token for every hook."""
    weights: torch.Tensor
    """float32 [B/world]: 0 at marked rows (sinks) and in void units, otherwise 1."""
    step: int
    """Counted from 0 over all epochs."""


def widen(stored: NDArray[Any], out: NDArray[np.float32]) -> None:
    """Convert stored rows to float32, into `out`, like `shards.to_float32`: uint16 is bfloat16's bits."""
    # By torch, in one pass over the memory: NumPy has no bfloat16, and `to_float32` takes two.
    source: torch.Tensor = torch.from_numpy(stored)  # pyright: ignore[reportUnknownMemberType]
    target: torch.Tensor = torch.from_numpy(out)  # pyright: ignore[reportUnknownMemberType]
    if stored.dtype == np.int8:
        # The scales are four bytes at the end of each row: only a copy of them can be viewed as float32.
        values = source[:, :-SCALE_BYTES]
        scale = source[:, -SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
        torch.mul(values, scale.view(torch.float32), out=target)
        return
    target.copy_(source.view(torch.bfloat16) if stored.dtype == np.uint16 else source)


class Stream(Closing):
    """An iterator of `Batch` over endless epochs, or up to a step; see `ActivationStore.stream`.

    Use it as a context manager, or call `close()`.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        rows, weights, step = next(self._rows)
        return Batch({hook: _tensor(values) for hook, values in rows.items()}, _tensor(weights), step)

    @property
    def order(self) -> LaneOrder:
        """Which row comes when: steps per epoch, groups, mixing."""
        return self._rows.order

    @property
    def seconds_waiting(self) -> float:
        """Seconds the consumer has waited for data."""
        return self._rows.seconds_waiting

    @property
    def bytes_read(self) -> int:
        """Bytes read from storage so far, including read-ahead and refetches; grows while iterating."""
        return self._rows.bytes_read

    @property
    def memory_bytes(self) -> int:
        """Memory of this rank's buffers, in bytes."""
        return self._rows.memory_bytes

    def ready(self, seconds: float) -> bool:
        """Return whether the units of the next batch are committed, after waiting at most so long."""
        return self._rows.ready(seconds)

    def state(self) -> StreamState:
        """Return the stream's position, before its next step. Integers only."""
        return self._rows.state()

    def close(self) -> None:
        """Stop reading and release the buffers."""
        self._rows.close()


def _tensor(values: NDArray[Any]) -> torch.Tensor:
    """View an array's memory as a tensor, which keeps the array alive; uint16 is bfloat16's bits."""
    tensor: torch.Tensor = torch.from_numpy(values)  # pyright: ignore[reportUnknownMemberType]
    return tensor.view(torch.bfloat16) if values.dtype == np.uint16 else tensor
