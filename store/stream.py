"""The prefetching reader: checked byte ranges in the background, batches in lane order. NumPy only.

Letters: B rows in a batch, D d_model, G lanes, L lanes of this rank, U units in a group, S rows that a
lane owns of one unit.

A rank's lanes own neighbouring slices of every unit, so a rank reads one run of bytes a unit and hook,
and no byte that another rank reads. Slices go from storage into the group's buffers with one copy and are
checked there; a batch gathers its rows from all over the group and widens them to float32, ahead of the
consumer. While one group is consumed, the next is read into a second set of buffers. A split that is a
single group is read once and shuffled anew each epoch.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ConfigError
from schemas.harvest import SCALE_BYTES, HarvestPlan, row_bytes
from schemas.training import StreamState
from store.cache import SliceCache
from store.closing import Closing
from store.fetch import fetch_slices
from store.follow import Arrivals
from store.index import ReceiptIndex
from store.layout import STORED_DTYPES, slice_bytes
from store.objects import ObjectStore
from store.order import LaneOrder
from store.shards import to_float32

REQUEST_BYTES = 16 * 2**20
"""A run of slices is asked for in ranges of about this many bytes: few to sign and to answer."""
RUNS_AHEAD = 2
"""Runs of batches assembled ahead of the consumer."""
RUN_BYTES = 4 * 2**20
"""Batches are assembled and handed over in runs of about so many bytes, at least one: waking a thread costs
as much as gathering a small batch."""
RUN_BATCHES = 8
"""Batches in a run at the most."""
SHUFFLED_TOGETHER = 8
"""Lanes that one task shuffles."""
CHUNK_BYTES = 2**19
"""Bytes gathered at a time before they are widened."""


class RowBatch(NamedTuple):
    """A rank's share of one step; the arrays are the consumer's own."""

    rows: dict[str, NDArray[Any]]
    """Hook -> [B/world, D], float32 or in the dtype on disk."""
    weights: NDArray[np.float32]
    """[B/world] 0 for marked rows and void units, else 1; equal for all hooks (they multiply)."""
    step: int
    """Counted from 0 over all epochs."""


def memory_bytes(plan: HarvestPlan, order: LaneOrder, hooks: Sequence[str], world: int = 1) -> int:
    """Memory that a rank's stream holds in buffers, in bytes.

    Rows and weights of two groups (one, when the split is one group) and two groups' turns, over the
    world size.
    """
    row = sum(row_bytes(plan.spec.dtype, plan.d_model(hook)) for hook in hooks) + 4
    held = 1 if order.groups == 1 else 2
    return order.group_units * plan.rows_per_unit * (row * held + 2 * 8) // world


class _Buffers:
    """One group's rows of this rank, lane after lane: filled by the reading threads, then only read."""

    def __init__(self, plan: HarvestPlan, order: LaneOrder, hooks: Sequence[str], lanes: int) -> None:
        most = lanes * min(order.group_units, len(order.units)) * order.lane_unit_rows
        dtype = STORED_DTYPES[plan.spec.dtype]
        self.rows = {hook: np.empty((most, plan.stored_width(hook)), dtype=dtype) for hook in hooks}
        self.slices = {
            hook: rows.reshape(-1).view(np.uint8).reshape(most // plan.rows_per_slice, -1)
            for hook, rows in self.rows.items()
        }
        """The same memory, slice by slice: [slices, bytes]."""
        self.weights = np.empty(most, dtype=np.float32)


class _Turns:
    """Where in a group's buffers each step finds its rows; the lanes shuffle in the background.

    A split that is one group stays in its buffers, unit by unit in the split's order; the units of a
    later epoch, which the order counts otherwise, are found through `slots`.
    """

    def __init__(self, order: LaneOrder, lanes: range, epoch: int, group: int, pool: Executor) -> None:
        self._order, self._units, self._most_units = order, order.units_in(group), order.units_in(0)
        self._slots: NDArray[np.int64] | None = None
        if order.groups == 1 and epoch:
            slots = {unit: number for number, unit in enumerate(order.units)}
            self._slots = np.array([slots[unit] for unit in order.units_of(epoch, group)], dtype=np.int64)
        self._rows = np.empty((order.steps_in(group), len(lanes), order.lane_batch), np.int64)
        firsts = range(0, len(lanes), SHUFFLED_TOGETHER)
        self.shuffles = [pool.submit(self._shuffle, epoch, group, lanes, first) for first in firsts]

    def _shuffle(self, epoch: int, group: int, lanes: range, first: int) -> None:
        size = self._order.lane_unit_rows
        some = self._order.lane_permutations(epoch, group, lanes[first : first + SHUFFLED_TOGETHER])
        for number, rows in enumerate(some, first):
            taken = self._rows[:, number]
            rows = rows[: taken.size]
            if self._slots is not None:
                unit, row = np.divmod(rows, size)
                rows = self._slots[unit] * size + row
            np.add(rows.reshape(taken.shape), number * self._units * size, out=taken)

    def of_unit(self, held: NDArray[Any], position: int) -> NDArray[Any]:
        """A view [L, S, ...] of buffers [rows, ...]: where a unit's rows lie, by the unit's position.

        Of buffers [slices, ...] likewise: [L, slices of a lane, ...].
        """
        slot = position if self._slots is None else int(self._slots[position])
        lanes = self._rows.shape[1]
        per_unit = len(held) // (lanes * self._most_units)
        whole = held[: lanes * self._units * per_unit]
        return whole.reshape(lanes, self._units, per_unit, *held.shape[1:])[:, slot]

    def rows(self, step_in_group: int) -> NDArray[np.int64]:
        """[B/world] rows of the buffers that a step takes, in batch order."""
        return self._rows[step_in_group].reshape(-1)


def reading_threads() -> int:
    """Threads that read a local root: more than there are cores get in each other's way."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class GroupReader:
    """Reads groups of units into buffers with a bounded number of requests in flight.

    Args:
        store: The dataset's root.
        plan: The dataset's plan.
        index: Its receipts.
        order: Which row comes when.
        hooks: Read together, aligned by row.
        lanes: The lanes of this rank.
        requests: Range requests in flight at the most; of a local root no more than there are cores.
        arrivals: Awaits the units' receipts, where the dataset is still being harvested.
        cache: Keeps slices on a local disk.
    """

    def __init__(
        self,
        store: ObjectStore,
        plan: HarvestPlan,
        index: ReceiptIndex,
        order: LaneOrder,
        hooks: tuple[str, ...],
        lanes: range,
        requests: int,
        arrivals: Arrivals | None = None,
        cache: SliceCache | None = None,
    ) -> None:
        self.cache = cache
        self.arrivals, self.closing = arrivals, threading.Event()
        self.store, self.plan, self.index = store, plan, index
        self.order, self.hooks, self.lanes = order, hooks, lanes
        self.holds = order.groups == 1
        self.before: Callable[[], object] = lambda: None
        """What a local root's threads do before each piece of reading."""
        threads = requests if store.remote else min(requests, reading_threads())
        self.pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="winnow-stream")
        self.bytes_read = 0
        """Bytes read from storage so far, refetches included; what a cache gave does not count."""
        self._counting = threading.Lock()

    def buffers(self) -> _Buffers:
        """New, unfilled buffers for one group."""
        return _Buffers(self.plan, self.order, self.hooks, len(self.lanes))

    def turns(self, epoch: int, group: int) -> _Turns:
        """Start shuffling a group's lanes."""
        return _Turns(self.order, self.lanes, epoch, group, self.pool)

    def read(self, buffers: _Buffers, turns: _Turns, units: tuple[int, ...]) -> list[Future[None]]:
        """Start filling `buffers`."""
        if self.arrivals is None:
            self.index.require(units)
        futures: list[Future[None]] = []
        for position, unit in enumerate(units):
            if self.arrivals is not None:
                self.arrivals.wait(unit, self.closing)
            futures.append(self.pool.submit(self._weights, turns.of_unit(buffers.weights, position), unit))
            for hook in self.hooks:
                slices = turns.of_unit(buffers.slices[hook], position)
                if self.index.void[unit]:
                    futures.append(self.pool.submit(slices.fill, 0))
                    continue
                for first, stop in self._runs(hook):
                    futures.append(self.pool.submit(self._fetch, slices, hook, unit, first, stop))
        return futures

    def _runs(self, hook: str) -> Iterator[tuple[int, int]]:
        """This rank's slices as runs [first, stop) of about `REQUEST_BYTES`."""
        first, last = self.lanes.start * self.order.lane_slices, self.lanes.stop * self.order.lane_slices
        step = max(1, REQUEST_BYTES // slice_bytes(self.plan, hook))
        for start in range(first, last, step):
            yield start, min(start + step, last)

    def _weights(self, places: NDArray[np.float32], unit: int) -> None:
        """A unit's weights into [L, S]."""
        share = self.index.weights(self.hooks, unit).reshape(self.order.lanes, -1)
        places[:] = share[self.lanes.start : self.lanes.stop]

    def _fetch(self, slices: NDArray[np.uint8], hook: str, unit: int, first: int, stop: int) -> None:
        """A run of slices into [L, slices of a lane, bytes]."""
        self.before()
        size, begin = self.order.lane_slices, self.lanes.start
        places = [slices[number // size - begin, number % size] for number in range(first, stop)]
        received = fetch_slices(self.store, self.plan, self.index, hook, unit, first, places, self.cache)
        with self._counting:
            self.bytes_read += received


Widen = Callable[[NDArray[Any], NDArray[np.float32]], object]
"""Writes stored values into a float32 array of their shape."""


class _Assembler:
    """Gathers steps' rows into batches, in arrays that are used again.

    An array is used again once nothing outside refers to it any more, so that the pages of a consumer
    who drops his batches are touched once, and a batch that is kept is never changed.

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
        self._most = self.run * (RUNS_AHEAD + 2) * hooks
        self.pool = pool or ThreadPoolExecutor(RUNS_AHEAD, "winnow-stream-batch")
        self._waiting: deque[tuple[Future[list[RowBatch]], Callable[[], list[RowBatch]]]] = deque()
        self._lock, self._local = threading.Lock(), threading.local()
        self._arrays: dict[tuple[int, ...], list[NDArray[Any]]] = {}

    def start(
        self, buffers: _Buffers, turns: _Turns, step_in_group: int, step: int, count: int
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
        self, buffers: _Buffers, turns: _Turns, step_in_group: int, step: int, count: int
    ) -> list[RowBatch]:
        batches: list[RowBatch] = []
        for number in range(count):
            chosen = turns.rows(step_in_group + number)
            rows = {hook: self._gather(held, chosen) for hook, held in buffers.rows.items()}
            batches.append(RowBatch(rows, buffers.weights.take(chosen), step + number))
        return batches

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


class RowStream(Closing):
    """An iterator of `RowBatch`; see `ActivationStore.stream` for the arguments.

    Reading starts when it is made. It holds no thread of its own: a small pool reads, and is gone after
    `close()`, after the last batch, or with the stream.

    Raises (on construction, before any data is read):
        ConfigError: A hook, rank, world or step that cannot be.
        MissingObject: A unit of the first group without a receipt.
    """

    def __init__(
        self,
        store: ObjectStore,
        plan: HarvestPlan,
        index: ReceiptIndex,
        order: LaneOrder,
        hooks: Sequence[str],
        *,
        split: str = "train",
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        stop_step: int | None = None,
        requests: int = 8,
        dtype: str = "float32",
        widen: Widen | None = None,
        arrivals: Arrivals | None = None,
        cache: SliceCache | None = None,
    ) -> None:
        hooks = (hooks,) if isinstance(hooks, str) else tuple(hooks)
        if not hooks or len(set(hooks)) != len(hooks):
            raise ConfigError("hooks", expected="one or more, each once", got=hooks)
        for hook in hooks:
            plan.d_model(hook)
        if requests < 1:
            raise ConfigError("prefetch", expected="1 or more requests", got=requests)
        if dtype not in ("float32", "stored"):
            raise ConfigError("dtype", expected="float32 or stored", got=repr(dtype))
        lanes = order.lanes_of(rank, world)
        self.plan, self.order, self.hooks, self.split = plan, order, hooks, split
        self.rank, self.world = rank, world
        self.stop_step = stop_step
        self.next_step = start_step
        place = order.locate(start_step)
        self.seconds_waiting = 0.0
        """Seconds the consumer has waited for data."""
        self._failed: BaseException | None = None
        self._reader = GroupReader(store, plan, index, order, hooks, lanes, requests, arrivals, cache)
        self._waiter = ThreadPoolExecutor(1, "winnow-stream-follow") if arrivals else None
        widen = widen or partial(_widen, dtype=plan.spec.dtype)
        wide = dtype == "float32" or plan.spec.dtype == "int8"
        row = sum(
            plan.d_model(hook) * 4 if wide else row_bytes(plan.spec.dtype, plan.d_model(hook))
            for hook in hooks
        )
        pool = None if store.remote else self._reader.pool
        size = row * order.batch_rows // world
        self._assembler = _Assembler(pool, widen if wide else None, size, len(hooks))
        if pool:
            self._reader.before = self._assembler.work
        self._current: _Buffers | None = None
        self._turns: _Turns | None = None
        self._first = self._last = self._asked = start_step
        """The current group's first step, one past its last, and the next one whose batch is to be begun."""
        self._ready: deque[Future[list[RowBatch]]] = deque()
        self._run: deque[RowBatch] = deque()
        self._coming: _Coming | None = None
        self._closed = False
        weakref.finalize(self, self._reader.closing.set)
        for pool in self._pools():
            weakref.finalize(self, pool.shutdown, wait=False, cancel_futures=True)
        if not self._finished(start_step):
            self._begin(place.epoch, place.group, self._reader.buffers())

    # Iterator

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RowBatch:
        if not self._run:
            self._take()
        batch = self._run.popleft()
        self.next_step += 1
        return batch

    def _take(self) -> None:
        """Wait for the next run of batches."""
        if self._failed is not None:
            raise self._failed
        if self._closed:
            raise ConfigError("the stream is closed", fix="Open another one from its state")
        if self._finished(self.next_step):
            self._release()
            raise StopIteration
        started = time.perf_counter()
        try:
            if self.next_step >= self._last:
                self._advance()
            self._ask()
            self._run.extend(self._ready.popleft().result())
            self._ask()
        except BaseException as error:
            self._failed = error
            self._release()
            raise
        finally:
            self.seconds_waiting += time.perf_counter() - started

    def _ask(self) -> None:
        """Have the group's next batches assembled."""
        assert self._current is not None
        assert self._turns is not None
        while len(self._ready) < RUNS_AHEAD and self._asked < self._last:
            count = min(self._assembler.run, self._last - self._asked)
            place = self._asked - self._first
            self._ready.append(self._assembler.start(self._current, self._turns, place, self._asked, count))
            self._asked += count

    def ready(self, seconds: float) -> bool:
        """Whether all units of the next batch are committed, after waiting so long at most.

        Where the dataset is not followed they are, or the next batch tells.
        """
        coming = self._coming
        if self.next_step < self._last or coming is None or not isinstance(coming.reads, Future):
            return True
        return bool(wait([coming.reads], seconds).done)

    def state(self) -> StreamState:
        """Where the stream stands: before its next step. Integers only."""
        return self.order.state(self.plan.fingerprint, self.split, self.hooks, self.next_step)

    @property
    def bytes_read(self) -> int:
        """Bytes read from storage so far, refetches included."""
        return self._reader.bytes_read

    @property
    def memory_bytes(self) -> int:
        """Memory of this rank's buffers, in bytes."""
        return memory_bytes(self.plan, self.order, self.hooks, self.world)

    def close(self) -> None:
        """Stop reading: requests not begun are dropped, those in flight are waited for."""
        self._closed = True
        self._release()

    def _pools(self) -> list[ThreadPoolExecutor]:
        """All of its threads; who submits work to others comes first."""
        return [*([self._waiter] if self._waiter else []), self._reader.pool, self._assembler.pool]

    def _release(self) -> None:
        self._reader.closing.set()
        self._assembler.cancel()
        for pool in self._pools():
            pool.shutdown(wait=True, cancel_futures=True)
        self._current = self._turns = self._coming = None
        self._ready.clear()
        self._run.clear()

    # Groups

    def _finished(self, step: int) -> bool:
        return self.stop_step is not None and step >= self.stop_step

    def _begin(self, epoch: int, group: int, buffers: _Buffers, *, held: bool = False) -> None:
        """Start reading a group into `buffers`, unless its rows are held there already."""
        turns = self._reader.turns(epoch, group)
        units = self.order.units_of(epoch, group)
        if held:
            reads: list[Future[None]] | Future[list[Future[None]]] = []
        elif self._waiter:  # receipts may take hours to come, while batches of this group are wanted
            reads = self._waiter.submit(self._reader.read, buffers, turns, units)
        else:
            reads = self._reader.read(buffers, turns, units)
        self._coming = _Coming(buffers, turns, reads)

    def _advance(self) -> None:
        """Make the group that is coming the current one, once it is there; have the one after it read.

        All batches of the group before are assembled, so its buffers are free, and the threads that read need
        not wait for the last of them to be done.
        """
        assert self._coming is not None
        coming, self._coming = self._coming, None
        spare, self._current, self._turns = self._current, None, None
        place = self.order.locate(self.next_step)
        epoch, group = place.epoch, place.group + 1
        if group == self.order.groups:
            epoch, group = epoch + 1, 0
        if not self._finished(self.order.first_step(epoch, group)):
            if self._reader.holds:
                self._begin(epoch, group, coming.buffers, held=True)
            else:
                self._begin(epoch, group, spare or self._reader.buffers())
        coming.result()
        self._current, self._turns = coming.buffers, coming.turns
        self._first = self.order.first_step(place.epoch, place.group)
        self._asked, self._last = self.next_step, self._first + self.order.steps_in(place.group)
        if self.stop_step is not None:
            self._last = min(self._last, self.stop_step)


class _Coming(NamedTuple):
    """A group being read."""

    buffers: _Buffers
    turns: _Turns
    reads: list[Future[None]] | Future[list[Future[None]]]
    """Or, of a dataset that is followed, the future that begins them."""

    def result(self) -> None:
        """Wait until everything is read and shuffled; or raise the first error of any of its threads."""
        reads = self.reads.result() if isinstance(self.reads, Future) else self.reads
        reads = [*self.turns.shuffles, *reads]
        done, _ = wait(reads, return_when=FIRST_EXCEPTION)
        for future in reads:
            if future in done and future.exception() is not None:
                future.result()
        for future in reads:
            future.result()


def _widen(stored: NDArray[Any], out: NDArray[np.float32], dtype: str) -> None:
    to_float32(stored, dtype, out=out)
