"""What one launch of a kernel multiplies and moves: the entries of a step's ledger.

Each kernel's file registers its own function here, so that a kernel and its account change together. Reckoned
from the arguments' shapes and types alone: the tensors may be on the device `meta`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor


class Cost(NamedTuple):
    """One launch."""

    flops: float = 0.0
    """Of products on the device's matrix units, in the operands' type; a multiply-add is two."""
    streamed: int = 0
    """Bytes read or written in order, each operand once."""
    gathered: int = 0
    """Bytes of rows that are read at places given by indices."""


Given = Mapping[str, Any]
"""A launch's arguments by their names."""
CostOf = Callable[[Given], Cost]

COSTS: dict[str, CostOf] = {}
"""By the kernel's name."""


def cost_of(kernel: str) -> Callable[[CostOf], CostOf]:
    """Register the account of the kernel of this name; it is given the launch's arguments by their names."""

    def register(function: CostOf) -> CostOf:
        COSTS[kernel] = function
        return function

    return register


def size_of(tensor: Tensor) -> int:
    """Bytes that are there: an expanded dimension counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= 1 if stride == 0 and size > 1 else size
    return count * tensor.element_size()


class Launch(NamedTuple):
    """A launch that is told of instead of run."""

    kernel: str
    grid: tuple[int, ...]
    given: Given


_listener: ContextVar[Callable[[Launch], None] | None] = ContextVar("winnow_launches", default=None)


@contextmanager
def listening(listener: Callable[[Launch], None]) -> Iterator[None]:
    """Inside, launches are told to `listener` and run nothing."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def heard(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: Given) -> bool:
    """Tell a launch to the listener, if there is one; whether there was."""
    listener = _listener.get()
    if listener is None:
        return False
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | dict(constants)
    listener(Launch(kernel.fn.__name__, grid, given))
    return True
