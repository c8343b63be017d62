"""Runs a model of 16 bits in float32 for a trial, so that an error is told from rounding.

A cache that loses 2 % of what a recurrence holds is below the rounding of a right one in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


@contextmanager
def in_float32(model: nn.Module, blocks: str) -> Iterator[None]:
    """While open, passes of a model compute in float32, with the values of its own weights.

    It takes the memory of one block, and of all that is outside the blocks, in float32.

    Args:
        model: The model; afterwards its weights are the same tensors as before.
        blocks: Path of the list of its blocks.
    """
    listed = list(model.get_submodule(blocks).children())
    inside = {id(tensor) for block in listed for tensor in _tensors(block)}
    with ExitStack() as stack:
        _raise(stack, (tensor for tensor in _tensors(model) if id(tensor) not in inside))
        for block in listed:
            # Closed after each run of the block, or at the end if the pass did not get that far.
            raised = stack.enter_context(ExitStack())

            def before(block: nn.Module, _: object, raised: ExitStack = raised) -> None:
                _raise(raised, _tensors(block))

            def after(_: nn.Module, __: object, ___: object, raised: ExitStack = raised) -> None:
                raised.close()

            stack.callback(block.register_forward_pre_hook(before).remove)
            stack.callback(block.register_forward_hook(after).remove)
        yield


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _raise(stack: ExitStack, tensors: Iterable[Tensor]) -> None:
    """Give 16-bit tensors float32 values until the stack is closed."""
    for tensor in tensors:
        if tensor.dtype in (torch.bfloat16, torch.float16):
            stack.callback(setattr, tensor, "data", tensor.data)
            tensor.data = tensor.data.float()
