"""Copies tensors from the device to the host while the device computes the next batch.

On a GPU a stream of its own copies into pinned memory: the LM's next pass is queued before the copy of
the last one is waited for. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class CopyOut:
    """Copies into two sets of pinned buffers in turn: take a copy before the next but one is started.

    Args:
        device: Where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: list[dict[int, Tensor]] = [{}, {}]

    def start(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to copy.

        Returns:
            A function that waits for the copy and returns the tensors on the host.
        """
        if self._stream is None:
            return lambda: list(tensors)
        self._buffers.reverse()
        found: list[Tensor] = []
        # The copy must not begin before the pass has written the tensors.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for number, tensor in enumerate(tensors):
                # A subject over several cards: this stream is of one of them only.
                if tensor.device != self._device:
                    found.append(tensor.cpu())
                    continue
                found.append(self._pinned(number, tensor))
                found[-1].copy_(tensor, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        # torch's allocator does not know of the copy on this stream and would give their memory to the next
        # pass.
        held = list(tensors)

        def take() -> list[Tensor]:
            done.synchronize()
            held.clear()
            return found

        return take

    def _pinned(self, number: int, tensor: Tensor) -> Tensor:
        # Kept between batches: pinning memory is slow. The last batch of a unit may be smaller and takes a
        # part.
        have = self._buffers[0].get(number)
        if have is None or have.numel() < tensor.numel() or have.dtype != tensor.dtype:
            have = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=True)
            self._buffers[0][number] = have
        return have[: tensor.numel()].view(tensor.shape)
