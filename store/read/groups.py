"""Reading a group of units: slices into buffers, checked, and the rows of each step in them.

Letters: G lanes, L lanes of this rank, U units in a group, S rows that a lane owns of one unit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from winnow.common.cores import usable_cores
from winnow.schemas.harvest import HarvestPlan
from winnow.store.format.layout import STORED_DTYPES, slice_bytes
from winnow.store.format.order import LaneOrder
from winnow.store.objects import ObjectStore
from winnow.store.read.cache import SliceCache
from winnow.store.read.fetch import fetch_slices
from winnow.store.read.follow import Arrivals
from winnow.store.records.index import ReceiptIndex

# Large, so that there are few requests to sign, answer and parse; a group still has several to be in flight.
REQUEST_BYTES = 16 * 2**20
"""Bytes of one range request for slices, about."""
_SHUFFLED_TOGETHER = 16
"""Lanes that one task shuffles."""


class Buffers:
    """One group's rows of this rank, lane after lane: written by the reading threads, then only read."""

    def __init__(self, plan: HarvestPlan, order: LaneOrder, hooks: Sequence[str], lanes: int) -> None:
        # For the largest group: two such sets serve all groups in turn, and their pages are touched once.
        most = lanes * min(order.group_units, len(order.units)) * order.lane_unit_rows
        dtype = STORED_DTYPES[plan.spec.dtype]
        self.rows = {hook: np.empty((most, plan.stored_width(hook)), dtype=dtype) for hook in hooks}
        self.slices = {
            hook: rows.reshape(-1).view(np.uint8).reshape(most // plan.rows_per_slice, -1)
            for hook, rows in self.rows.items()
        }
        """The same memory, slice by slice: [slices, bytes]."""
        self.weights = np.empty(most, dtype=np.float32)


class Turns:
    """The rows of each step in a group's buffers; the lanes are shuffled in the background."""

    def __init__(self, order: LaneOrder, lanes: range, epoch: int, group: int, pool: Executor) -> None:
        self._order, self._units, self._most_units = order, order.units_in(group), order.units_in(0)
        # A split that is one group stays in its buffers, with its units in the split's order. Later epochs
        # number the units in another order and find them through the slots.
        self._slots: NDArray[np.int64] | None = None
        if order.groups == 1 and epoch:
            slots = {unit: number for number, unit in enumerate(order.units)}
            self._slots = np.array([slots[unit] for unit in order.units_of(epoch, group)], dtype=np.int64)
        self._rows = np.empty((order.steps_in(group), len(lanes), order.lane_batch), np.int64)
        firsts = range(0, len(lanes), _SHUFFLED_TOGETHER)
        self.shuffles = [pool.submit(self._shuffle, epoch, group, lanes, first) for first in firsts]

    def _shuffle(self, epoch: int, group: int, lanes: range, first: int) -> None:
        size = self._order.lane_unit_rows
        some = self._order.lane_turns(epoch, group, lanes[first : first + _SHUFFLED_TOGETHER])
        for number, rows in enumerate(some, first):
            taken = self._rows[:, number]
            if self._slots is not None:
                unit, row = np.divmod(rows, size)
                rows = self._slots[unit] * size + row
            np.add(rows.reshape(taken.shape), number * self._units * size, out=taken)

    def of_unit(self, held: NDArray[Any], position: int) -> NDArray[Any]:
        """View a unit's rows, by its position in the group: [L, S, ...] of buffers [rows, ...].

        Of buffers [slices, ...] likewise: [L, slices of a lane, ...].
        """
        slot = position if self._slots is None else int(self._slots[position])
        lanes = self._rows.shape[1]
        per_unit = len(held) // (lanes * self._most_units)
        whole = held[: lanes * self._units * per_unit]
        return whole.reshape(lanes, self._units, per_unit, *held.shape[1:])[:, slot]

    def rows(self, step_in_group: int, steps: int) -> NDArray[np.int64]:
        """[steps * B/world] rows of the buffers in some steps, in batch order."""
        return self._rows[step_in_group : step_in_group + steps].reshape(-1)


def reading_threads(store: ObjectStore, requests: int) -> int:
    """Threads that read, each one object at a time: so many files or connections, however many hooks."""
    # Reads of a local root are CPU work. By perf, a fifth of it went into switching between ten threads
    # that wanted the interpreter's lock.
    return requests if store.remote else min(requests, usable_cores())


class GroupReader:
    """Reads groups of units into buffers with a bounded number of requests in flight.

    Args:
        store: The dataset's root.
        plan: The dataset's plan.
        index: Its receipts.
        order: Which row comes when.
        hooks: Read together, aligned by row.
        lanes: The lanes of this rank.
        requests: Most range requests in flight; for a local root at most one per core.
        arrivals: Waits for the units' receipts, if the dataset is still being harvested.
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
        """Called by a local root's threads before each run of slices."""
        threads = reading_threads(store, requests)
        self.pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="winnow-stream")
        self.bytes_read = 0
        """Bytes read from storage so far, including refetches; bytes from a cache do not count."""
        self._counting = threading.Lock()

    def buffers(self) -> Buffers:
        """Make buffers for one group, unfilled."""
        return Buffers(self.plan, self.order, self.hooks, len(self.lanes))

    def turns(self, epoch: int, group: int) -> Turns:
        """Start shuffling a group's lanes."""
        return Turns(self.order, self.lanes, epoch, group, self.pool)

    def read(self, buffers: Buffers, turns: Turns, units: tuple[int, ...]) -> list[Future[None]]:
        """Start filling `buffers`."""
        # Before any byte is read: a unit without a receipt must not be found in the middle of a group.
        if self.arrivals is None:
            self.index.require(units)
        futures: list[Future[None]] = []
        for position, unit in enumerate(units):
            if self.arrivals is not None:
                self.arrivals.wait(unit, self.closing)
            futures.append(self.pool.submit(self._weights, turns.of_unit(buffers.weights, position), unit))
            for hook in self.hooks:
                slices = turns.of_unit(buffers.slices[hook], position)
                # Zeros of weight 0: a void unit keeps its place, so the order needs no exceptions.
                if self.index.void[unit]:
                    futures.append(self.pool.submit(slices.fill, 0))
                    continue
                for first, stop in self._runs(hook):
                    futures.append(self.pool.submit(self._fetch, slices, hook, unit, first, stop))
        return futures

    def _runs(self, hook: str) -> Iterator[tuple[int, int]]:
        """Yield this rank's slices as runs [first, stop) of about `REQUEST_BYTES`."""
        # Its lanes are neighbours, so they are one range of each unit, and no other rank reads a byte of it.
        first, last = self.lanes.start * self.order.lane_slices, self.lanes.stop * self.order.lane_slices
        step = max(1, REQUEST_BYTES // slice_bytes(self.plan, hook))
        for start in range(first, last, step):
            yield start, min(start + step, last)

    def _weights(self, places: NDArray[np.float32], unit: int) -> None:
        """Write a unit's weights into [L, S]."""
        share = self.index.weights(self.hooks, unit).reshape(self.order.lanes, -1)
        places[:] = share[self.lanes.start : self.lanes.stop]

    def _fetch(self, slices: NDArray[np.uint8], hook: str, unit: int, first: int, stop: int) -> None:
        """Read a run of slices into [L, slices of a lane, bytes]."""
        # Batches first: the consumer waits for them, and for the next group only later.
        self.before()
        size, begin = self.order.lane_slices, self.lanes.start
        places = [slices[number // size - begin, number % size] for number in range(first, stop)]
        received = fetch_slices(self.store, self.plan, self.index, hook, unit, first, places, self.cache)
        with self._counting:
            self.bytes_read += received
