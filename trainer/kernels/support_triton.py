"""What the Triton kernels share. Importing this module needs Triton, so only a run that chose it does."""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false

from __future__ import annotations

from typing import Any

import triton
from triton.runtime.interpreter import InterpretedFunction

from winnow.trainer.kernels.cost import heard


@triton.jit
def _probe():
    pass


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on tensors of the CPU."""
    return isinstance(_probe, InterpretedFunction)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on a grid; while a ledger is kept (`cost.listening`), only tell of it."""
    # in one place, because Triton's own types tell a type checker nothing
    if not heard(kernel, grid, arguments, constants):
        kernel[grid](*arguments, **constants)


def cdiv(size: int, by: int) -> int:
    """`size / by`, rounded up."""
    return -(-size // by)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not less than `size`, at least 1."""
    return 1 << max(0, size - 1).bit_length()


def block_of(size: int, largest: int) -> int:
    """The smallest power of two not less than `size`, but at least 16 and at most `largest`."""
    return min(largest, max(16, power_of_two(size)))
