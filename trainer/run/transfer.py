"""A step's rows on the device; on a GPU they are copied while the step before them computes.

Weights stay on the host: how many rows have one above 0 decides the shapes of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.common.closing import Closing
from winnow.store.read.torch_stream import Batch

# a step of 65,536 rows of 768 in 29 ms asks for 3.5 GB/s of bfloat16, more than one thread may copy
PINNERS = 4
"""Threads that copy into pinned memory."""
PART_BYTES = 8 << 20
"""Bytes that a thread pins and sends at a time."""


class _Sent(NamedTuple):
    batch: Batch
    arrived: torch.cuda.Event | None


class Transfer(Closing):
    """An iterator over a stream's batches, the rows of each on the device when it is returned.

    With `ahead` one more batch is taken from the stream than has been returned: threads copy parts of it to
    pinned memory and from there, on a CUDA stream of their own, to the device. An error of the stream is
    raised in its turn, after the batches before it.

    Args:
        batches: Batches of the store, in the host's memory or on the device.
        count: Number of batches to take; no more are requested.
        device: The device of the step.
        whole: Move the rows; not for a step that moves them itself, part by part (`accumulate`).
        ahead: See above; None means only on a GPU.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        count: int,
        device: torch.device,
        *,
        whole: bool = True,
        ahead: bool | None = None,
    ) -> None:
        self._batches, self._left, self._device = batches, count, device
        self._whole = whole
        self._ahead = device.type == "cuda" if ahead is None else ahead
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and self._ahead else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="winnow-transfer") if self._ahead else None
        self._pinners = ThreadPoolExecutor(PINNERS, "winnow-pin") if self._stream is not None else None
        self._next: Future[_Sent] | Exception | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch, ready for work queued on the device's current CUDA stream from now on."""
        if self._thread is None:
            return self._on_device(self._take())
        now = self._next or self._start(self._thread)
        self._next = None
        if isinstance(now, Exception):
            raise now
        # before this batch is awaited: the next one is copied while the step computes with this one
        if self._left:
            self._next = self._start(self._thread)
        batch, arrived = now.result()
        if arrived is not None:
            current = torch.cuda.current_stream(self._device)
            # the GPU waits for the copy, not the host, which can go on queueing the step
            current.wait_event(arrived)
            for tensor in batch.rows.values():
                if tensor.is_cuda:
                    # otherwise the allocator, which knows only the copying stream, gives the memory to a
                    # later batch while the step still reads it
                    tensor.record_stream(current)
        return batch

    def close(self) -> None:
        """Wait for the copy in progress; the stream is closed by its owner."""
        # in this order: the first waits for what it has given the second
        for threads in (self._thread, self._pinners):
            if threads is not None:
                threads.shutdown()

    def _take(self) -> Batch:
        if not self._left:
            raise StopIteration
        self._left -= 1
        return next(self._batches)

    def _start(self, thread: ThreadPoolExecutor) -> Future[_Sent] | Exception:
        # taken here and not in the thread: on a mesh taking is a collective, and all ranks must run theirs in
        # one order
        try:
            return thread.submit(self._send, self._take())
        except Exception as error:
            # kept for its turn: the batch that is already on the device can still be trained on
            return error

    def _send(self, batch: Batch) -> _Sent:
        if self._stream is None:
            return _Sent(self._on_device(batch), None)
        with torch.cuda.stream(self._stream):
            sent = self._on_device(batch)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return _Sent(sent, arrived)

    def _on_device(self, batch: Batch) -> Batch:
        rows = {hook: self._move(t) if self._whole else t for hook, t in batch.rows.items()}
        return Batch(rows, batch.weights.cpu(), batch.step)

    def _move(self, tensor: Tensor) -> Tensor:
        if self._pinners is None or tensor.is_cuda:
            return tensor.to(self._device)
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        # a list, so that an error of any part is raised here
        list(self._pinners.map(partial(self._send_part, tensor, out), parts_of(tensor)))
        return out

    def _send_part(self, tensor: Tensor, out: Tensor, part: slice) -> None:
        # every thread has a current stream of its own
        with torch.cuda.stream(self._stream):
            # only a copy from pinned memory is asynchronous; the allocator keeps the pinned block until the
            # copy has ended, so nothing here has to hold it
            out[part].copy_(tensor[part].pin_memory(), non_blocking=True)


def parts_of(tensor: Tensor) -> list[slice]:
    """Cut rows into slices of PART_BYTES that several threads pin at a time."""
    step = max(1, PART_BYTES // max(1, tensor[:1].nbytes))
    return [slice(first, min(first + step, len(tensor))) for first in range(0, len(tensor), step)]
