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

RUNS_AHEAD = 3
"""Runs of batches assembled ahead of the consumer: one waits while two threads are at work."""
ASSEMBLING = 2
"""Threads that assemble where those that read do not."""
RUN_BYTES = 5 * 2**19
"""Batches are assembled and handed over in runs of about so many bytes, at least one: waking a thread costs
as much as gathering a small batch."""
RUN_BATCHES = 8
"""Batches in a run at the most."""
CHUNK_BYTES = 2**19
"""Bytes gathered at a time before they are widened."""

Widen = Callable[[NDArray[Any], NDArray[np.float32]], object]
"""Writes stored values into a float32 array of their shape."""


class RowBatch(NamedTuple):
    """A rank's share of one step; the arrays are the consumer's own."""

    rows: dict[str, NDArray[Any]]
    """Hook -> [B/world, D], float32 or in the dtype on disk."""
    weights: NDArray[np.float32]
    """[B/world] 0 for marked rows and void units, else 1; equal for all hooks (they multiply)."""
    step: int
    """Counted from 0 over all epochs."""


class Assembler:
    """Gathers steps' rows into batches, in arrays that are used again.

    A run of batches lies in one array, gathered in one go. It is used again once nothing outside refers to
    it any more, so that the pages of a consumer who drops his batches are touched once, and a batch that is
    kept is never changed; it keeps the memory of its run.

    Of a local root the threads that read assemble too, batches first, so that there are no more threads than
    cores: where the interpreter's lock goes from hand to hand, each more costs more than it does. Threads
    that wait for a network would keep batches waiting too: there others assemble.

    Args:
        pool: The threads that read, where they assemble too.
        widen: Makes rows float32; None leaves them in the dtype on disk.
        batch_bytes: Bytes of a batch's rows, of all hooks.
        hooks: How many.
    """

    def __init__(
        self, pool: ThreadPoolExecutor | None, widen: Widen | None, batch_bytes: int, hooks: int
    ) -> None:
        self.widen = widen
        self.run = min(max(1, RUN_BYTES // batch_bytes), RUN_BATCHES)
        """Batches assembled by one task."""
        self._most = (RUNS_AHEAD + 2) * hooks
        self.pool = pool or ThreadPoolExecutor(ASSEMBLING, "winnow-stream-batch")
        self._waiting: deque[tuple[Future[list[RowBatch]], Callable[[], list[RowBatch]]]] = deque()
        self._lock, self._local = threading.Lock(), threading.local()
        self._arrays: dict[tuple[int, ...], list[NDArray[Any]]] = {}

    def start(
        self, buffers: Buffers, turns: Turns, step_in_group: int, step: int, count: int
    ) -> Future[list[RowBatch]]:
        """Begin the batches of `count` steps."""
        future = Future[list[RowBatch]]()
        self._waiting.append((future, partial(self._assemble, buffers, turns, step_in_group, step, count)))
        self.pool.submit(self.work)
        return future

    def work(self) -> None:
        """Assemble what waits for it, if anything does."""
        while self._waiting:
            try:
                future, assemble = self._waiting.popleft()
            except IndexError:
                return
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(assemble())
                except BaseException as error:
                    future.set_exception(error)

    def cancel(self) -> None:
        """Forget what nobody has begun."""
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
        width = held.shape[1] - (SCALE_BYTES if held.dtype == np.int8 else 0)
        out = self._array((len(chosen), width), held.dtype if widen is None else np.float32)
        if widen is None:
            held.take(chosen, 0, out, "clip")
            return out
        step = max(1, CHUNK_BYTES // (held.shape[1] * held.itemsize))  # what is gathered stays in the cache
        scratch = self._scratch(step, held)
        for first in range(0, len(chosen), step):
            part = slice(first, first + step)
            some = scratch[: len(chosen[part])]
            held.take(chosen[part], 0, some, "clip")
            widen(some, out[part])
        return out

    def _scratch(self, rows: int, like: NDArray[Any]) -> NDArray[Any]:
        """This thread's own [rows, D], made once: a fresh one would cost as much as what it is for."""
        found: NDArray[Any] | None = getattr(self._local, "scratch", None)
        if found is None or found.shape != (rows, like.shape[1]):
            found = self._local.scratch = np.empty((rows, like.shape[1]), like.dtype)
        return found

    def _array(self, shape: tuple[int, int], dtype: Any) -> NDArray[Any]:
        with self._lock:
            arrays = self._arrays.setdefault(shape, [])
            for number in range(len(arrays)):
                if sys.getrefcount(arrays[number]) == 2:  # the list's and the call's own
                    return arrays[number]
            array = np.empty(shape, dtype)
            arrays.append(array)
            del arrays[: -self._most]
            return array


def widen_stored(stored: NDArray[Any], out: NDArray[np.float32], dtype: str) -> None:
    """Write rows as they are stored in a plan's dtype into float32 rows."""
    to_float32(stored, dtype, out=out)
