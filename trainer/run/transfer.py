"""A step's rows on the device; on a GPU they travel while the step before them computes.

Legend: B rows, D width of the input, O width of the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.common.closing import Closing
from winnow.schemas.training import TrainSpec
from winnow.store.read.torch_stream import Batch
from winnow.trainer.run.start import rows_of


class Ready(NamedTuple):
    """What a step takes."""

    rows: Tensor
    """Raw [B, D]."""
    weights: Tensor
    """[B], always on the device."""
    target: Tensor | None
    """A transcoder's raw [B, O]."""


class _Sent(NamedTuple):
    batch: Ready
    arrived: torch.cuda.Event | None


class Transfer(Closing):
    """An iterator of a stream's batches, each on the device when it comes out.

    With `ahead` one more batch is taken from the stream than has come out: a thread copies it to pinned
    memory and from there, on a stream of its own, to the device. What the stream raises comes out in its
    turn, after the batches before it.

    Args:
        batches: As they come from the store, in the host's memory or on the device.
        count: How many to take: no more are asked for.
        spec: Which hooks are rows and which are targets.
        device: Where a step computes.
        whole: Whether rows and targets are moved; else the weights alone, for a step that moves its rows
            part by part (`accumulate`).
        ahead: See above; where not given, on a GPU.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        count: int,
        spec: TrainSpec,
        device: torch.device,
        *,
        whole: bool = True,
        ahead: bool | None = None,
    ) -> None:
        self._batches, self._left, self._spec, self._device = batches, count, spec, device
        self._whole = whole
        self._ahead = device.type == "cuda" if ahead is None else ahead
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and self._ahead else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="winnow-transfer") if self._ahead else None
        self._next: Future[_Sent] | Exception | None = None

    def __iter__(self) -> Iterator[Ready]:
        return self

    def __next__(self) -> Ready:
        """The next batch, usable by what the device's current stream is given from now on."""
        if self._thread is None:
            return self._here(self._take())
        now = self._next or self._start(self._thread)
        self._next = None
        if isinstance(now, Exception):
            raise now
        if self._left:
            self._next = self._start(self._thread)
        batch, arrived = now.result()
        if arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrived)
            for tensor in batch:
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(current)  # or its memory would be given to a later batch too early
        return batch

    def close(self) -> None:
        """Wait for what travels; the stream is its owner's."""
        if self._thread is not None:
            self._thread.shutdown()

    def _take(self) -> Batch:
        if not self._left:
            raise StopIteration
        self._left -= 1
        return next(self._batches)

    def _start(self, thread: ThreadPoolExecutor) -> Future[_Sent] | Exception:
        try:  # here and not in the thread: on a mesh all ranks take their batches in one order
            return thread.submit(self._send, self._take())
        except Exception as error:
            return error

    def _send(self, batch: Batch) -> _Sent:
        if self._stream is None:
            return _Sent(self._here(batch), None)
        with torch.cuda.stream(self._stream):
            sent = self._here(batch)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return _Sent(sent, arrived)

    def _here(self, batch: Batch) -> Ready:
        rows, target = rows_of(batch, self._spec)
        if self._whole:
            rows, target = self._move(rows), None if target is None else self._move(target)
        return Ready(rows, self._move(batch.weights), target)

    def _move(self, tensor: Tensor) -> Tensor:
        if self._stream is None or tensor.is_cuda:
            return tensor.to(self._device)
        # pinned memory is the allocator's, which keeps it until the copy has passed
        return tensor.pin_memory().to(self._device, non_blocking=True)
