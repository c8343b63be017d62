"""Gathering steps' rows from a group's buffers into batches, ahead of the consumer.

Letters: B rows in a batch, D d_model.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.harvest import SCALE_BYTES
from winnow.store.format.shards import to_float32
from winnow.store.read.groups import Buffers, Turns

# One waits while two threads are at work: with two, a thread that was done waited for the consumer to ask.
RUNS_AHEAD = 3
"""Runs of batches assembled ahead of the consumer."""
ASSEMBLING = 2
"""Threads that assemble, unless those that read do."""
# Waking a thread costs as much as gathering a small batch, so several are handed over together. Three runs of
# 2.5 MiB (and slices received 2 MiB at a time) gave 0.81 of the bare loop's rate, two of 4 MiB 0.75.
_RUN_BYTES = 5 * 2**19
"""Bytes of a run of batches, about; at least one batch."""
RUN_BATCHES = 8
"""Most batches in a run."""
# What was gathered is still in the cache when it is widened.
CHUNK_BYTES = 2**19
"""Bytes gathered at a time before they are widened."""

Widen = Callable[[NDArray[Any], NDArray[np.float32]], object]
"""Writes stored values into a float32 array of their shape."""


class RowBatch(NamedTuple):
    """A rank's share of one step; the arrays belong to the consumer."""

    rows: dict[str, NDArray[Any]]
    """Hook -> [B/world, D], float32 or in the dtype on disk."""
    weights: NDArray[np.float32]
    """[B/world] 0 for marked rows and void units, otherwise 1; the same for all hooks (they multiply)."""
    step: int
    """Counted from 0 over all epochs."""


def _run(batch_bytes: int) -> int:
    """Batches of so many bytes in a run."""
    return min(max(1, _RUN_BYTES // batch_bytes), RUN_BATCHES)


def assembled_bytes(batch_bytes: int) -> int:
    """Most memory of batches of so many bytes: those ahead, the consumer's run and the one it had before."""
    return (RUNS_AHEAD + 2) * _run(batch_bytes) * batch_bytes


class Assembler:
    """Gathers steps' rows into batches, in arrays that are reused.

    A run of batches is one array, gathered in one go and reused once nothing refers to it any more: a batch
    that the consumer keeps never changes, and keeps the memory of its run.

    Args:
        pool: The threads that read, if they assemble too.
        widen: Converts rows to float32; None leaves them in the dtype on disk.
        batch_bytes: Bytes of a batch's rows, over all hooks.
        hooks: Number of hooks.
    """

    def __init__(
        self, pool: ThreadPoolExecutor | None, widen: Widen | None, batch_bytes: int, hooks: int
    ) -> None:
        self.widen = widen
        self.run = _run(batch_bytes)
        """Batches assembled by one task."""
        self._most = (RUNS_AHEAD + 2) * hooks
        # The threads that read a local root assemble too: more threads than cores pass the interpreter's lock
        # around, and cost more than they do. Threads that wait for a network would keep batches waiting.
        self.pool = pool or ThreadPoolExecutor(ASSEMBLING, "winnow-stream-batch")
        self._waiting: deque[tuple[Future[list[RowBatch]], Callable[[], list[RowBatch]]]] = deque()
        self._lock, self._local = threading.Lock(), threading.local()
        self._arrays: dict[tuple[int, ...], list[NDArray[Any]]] = {}

    def start(
        self, buffers: Buffers, turns: Turns, step_in_group: int, step: int, count: int
    ) -> Future[list[RowBatch]]:
        """Begin to assemble the batches of `count` steps."""
        # A queue beside the pool's own: threads that read take from it first (`GroupReader.before`), as the
        # consumer waits for batches, not for the next group.
        future = Future[list[RowBatch]]()
        self._waiting.append((future, partial(self._assemble, buffers, turns, step_in_group, step, count)))
        self.pool.submit(self.work)
        return future

    def work(self) -> None:
        """Assemble the runs that are waiting."""
        while self._waiting:
            try:
                future, assemble = self._waiting.popleft()
            except IndexError:  # another thread took the last one in between
                return
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(assemble())
                except BaseException as error:  # it belongs to the consumer, whichever thread met it
                    future.set_exception(error)

    def cancel(self) -> None:
        """Cancel the runs that no thread has begun."""
        while self._waiting:
            self._waiting.popleft()[0].cancel()

    def _assemble(
        self, buffers: Buffers, turns: Turns, step_in_group: int, step: int, count: int
    ) -> list[RowBatch]:
        chosen = turns.rows(step_in_group, count)
        rows = {hook: self._gather(held, chosen) for hook, held in buffers.rows.items()}
        weights = buffers.weights.take(chosen)
        size = len(chosen) // count
        cuts = [slice(first, first + size) for first in range(0, len(chosen), size)]
        return [
            RowBatch({hook: run[cut] for hook, run in rows.items()}, weights[cut], step + number)
            for number, cut in enumerate(cuts)
        ]

    def _gather(self, held: NDArray[Any], chosen: NDArray[np.int64]) -> NDArray[Any]:
        widen = None if held.dtype == np.float32 else self.widen
        # packed int8 rows keep their scales
        width = held.shape[1] - (SCALE_BYTES if widen is not None and held.dtype == np.int8 else 0)
        out = self._array((len(chosen), width), held.dtype if widen is None else np.float32)
        # "clip", since NumPy's default mode buffers `out`; the order's rows are all valid.
        if widen is None:
            held.take(chosen, 0, out, "clip")
            return out
        step = max(1, CHUNK_BYTES // (held.shape[1] * held.itemsize))
        scratch = self._scratch(step, held)
        for first in range(0, len(chosen), step):
            part = slice(first, first + step)
            some = scratch[: len(chosen[part])]
            held.take(chosen[part], 0, some, "clip")
            widen(some, out[part])
        return out

    def _scratch(self, rows: int, like: NDArray[Any]) -> NDArray[Any]:
        """This thread's own [rows, D] to gather into."""
        # Made once: touching new pages would cost as much as gathering into them.
        found: NDArray[Any] | None = getattr(self._local, "scratch", None)
        if found is None or found.shape != (rows, like.shape[1]):
            found = self._local.scratch = np.empty((rows, like.shape[1]), like.dtype)
        return found

    def _array(self, shape: tuple[int, int], dtype: Any) -> NDArray[Any]:
        # Reused, so that of a consumer who drops batches each page is touched once, not once per run. The
        # reference count is exact: a batch is a view, which keeps its array.
        with self._lock:
            arrays = self._arrays.setdefault(shape, [])
            for number in range(len(arrays)):
                if sys.getrefcount(arrays[number]) == 2:  # that of the list and that of this call
                    return arrays[number]
            array = np.empty(shape, dtype)
            arrays.append(array)
            # A consumer who keeps its batches must not make this list grow without end.
            del arrays[: -self._most]
            return array


def widen_stored(stored: NDArray[Any], out: NDArray[np.float32], dtype: str) -> None:
    """Convert rows stored in a plan's dtype to float32, into `out`."""
    to_float32(stored, dtype, out=out)
