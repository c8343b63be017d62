"""The prefetching reader: checked byte ranges in the background, batches in lane order. NumPy only.

Letters: B rows in a batch, D d_model, G lanes, L lanes of this rank, U units in a group, S rows that a
lane owns of one unit.

A rank's lanes own neighbouring slices of every unit, so a rank reads one run of bytes a unit and hook,
and no byte that another rank reads. While one group is consumed, the next is read into a second set of
buffers. A split that is a single group is read once and shuffled anew each epoch.
"""

from __future__ import annotations

import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ConfigError
from schemas.harvest import DTYPE_BYTES, HarvestPlan
from schemas.training import StreamState
from store.fetch import fetch_slices
from store.index import ReceiptIndex
from store.layout import STORED_DTYPES, slice_bytes
from store.objects import ObjectStore
from store.order import LaneOrder

REQUEST_BYTES = 8 * 2**20
"""A run of slices is asked for in ranges of about this many bytes, so that several are in flight."""


class RowBatch(NamedTuple):
    """A rank's share of one step.

    The arrays may be views of the stream's buffers: copy what is kept beyond the next step.
    """

    rows: dict[str, NDArray[np.generic]]
    """Hook -> [B/world, D] in the stored dtype (bfloat16 as uint16)."""
    weights: NDArray[np.float32]
    """[B/world] 0 for marked rows and void units, else 1; equal for all hooks (they multiply)."""
    step: int
    """Counted from 0 over all epochs."""


def memory_bytes(plan: HarvestPlan, order: LaneOrder, hooks: Sequence[str], world: int = 1) -> int:
    """Memory that a rank's stream holds in buffers, in bytes.

    Rows and weights of two groups (one, when the split is one group) and two groups' turns, over the
    world size.
    """
    row = sum(plan.d_model(hook) for hook in hooks) * DTYPE_BYTES[plan.spec.dtype] + 4
    held = 1 if order.groups == 1 else 2
    return order.group_units * plan.rows_per_unit * (row * held + 2 * 8) // world


class _Buffers:
    """One group's rows of this rank: filled by the reading threads, then only read."""

    def __init__(self, plan: HarvestPlan, order: LaneOrder, hooks: Sequence[str], lanes: int) -> None:
        most = lanes * min(order.group_units, len(order.units)) * order.lane_unit_rows
        dtype = STORED_DTYPES[plan.spec.dtype]
        self.rows = {hook: np.empty((most, plan.d_model(hook)), dtype=dtype) for hook in hooks}
        self.weights = np.empty(most, dtype=np.float32)


Place = slice | NDArray[np.int64]
"""Rows of the buffers, for indexing."""


class _Layout(ABC):
    """Where in the buffers a lane's rows of a group go, and where a step finds its rows."""

    @abstractmethod
    def place(self, lane: int, position: int, first: int, stop: int) -> Place:
        """Where rows `first` to `stop - 1` of a lane's share of a unit go.

        Args:
            lane: Counted from this rank's first.
            position: The unit's position in the group, as the order counts it.
            first: Row of the lane's share of the unit.
            stop: One past the last row.
        """

    @abstractmethod
    def batch(self, step_in_group: int) -> Place:
        """Where a step's rows are, in batch order."""


class _Shuffled(_Layout):
    """Rows are shuffled as they arrive, so that a batch is one run of the buffers: no gather is left.

    What the group drops lies behind its last batch.
    """

    def __init__(self, order: LaneOrder, lanes: range, epoch: int, group: int, pool: Executor) -> None:
        self._order, self._lanes, self._group = order, lanes, group
        self._places = [pool.submit(self._shuffle, epoch, lane) for lane in lanes]

    def _shuffle(self, epoch: int, lane: int) -> NDArray[np.int64]:
        order, number = self._order, lane - self._lanes.start
        permutation = order.lane_permutation(epoch, self._group, lane)
        used, batch = order.steps_in(self._group) * order.lane_batch, order.lane_batch
        step, turn = np.divmod(np.arange(used), batch)
        places = np.empty_like(permutation)
        places[permutation[:used]] = (step * len(self._lanes) + number) * batch + turn
        tail = len(permutation) - used
        behind = used * len(self._lanes) + number * tail
        places[permutation[used:]] = np.arange(behind, behind + tail)
        return places

    def place(self, lane: int, position: int, first: int, stop: int) -> Place:
        start = position * self._order.lane_unit_rows
        return self._places[lane].result()[start + first : start + stop]

    def batch(self, step_in_group: int) -> Place:
        size = len(self._lanes) * self._order.lane_batch
        return slice(step_in_group * size, (step_in_group + 1) * size)


class _Held(_Layout):
    """A split that is one group: rows stay as they are stored, and each epoch has turns of its own."""

    def __init__(self, order: LaneOrder, lanes: range, epoch: int, group: int, pool: Executor) -> None:
        self._order, self._units = order, order.units_in(group)
        position = {unit: number for number, unit in enumerate(order.units)}
        slots = np.array([position[unit] for unit in order.units_of(epoch, group)], dtype=np.int64)
        self._slots = slots
        self._turns = [
            pool.submit(self._shuffle, slots, epoch, group, lane, lane - lanes.start) for lane in lanes
        ]

    def _shuffle(
        self, slots: NDArray[np.int64], epoch: int, group: int, lane: int, number: int
    ) -> NDArray[np.int64]:
        order = self._order
        used = order.steps_in(group) * order.lane_batch
        unit, row = np.divmod(order.lane_permutation(epoch, group, lane)[:used], order.lane_unit_rows)
        return (number * self._units + slots[unit]) * order.lane_unit_rows + row

    def place(self, lane: int, position: int, first: int, stop: int) -> Place:
        start = (lane * self._units + int(self._slots[position])) * self._order.lane_unit_rows
        return slice(start + first, start + stop)

    def batch(self, step_in_group: int) -> Place:
        turn = slice(step_in_group * self._order.lane_batch, (step_in_group + 1) * self._order.lane_batch)
        return np.concatenate([turns.result()[turn] for turns in self._turns])


class GroupReader:
    """Reads groups of units into buffers with a bounded number of requests in flight.

    Args:
        store: The dataset's root.
        plan: The dataset's plan.
        index: Its receipts.
        order: Which row comes when.
        hooks: Read together, aligned by row.
        lanes: The lanes of this rank.
        requests: Range requests in flight at the most.
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
    ) -> None:
        self.store, self.plan, self.index = store, plan, index
        self.order, self.hooks, self.lanes = order, hooks, lanes
        self.holds = order.groups == 1
        self.pool = ThreadPoolExecutor(max_workers=requests, thread_name_prefix="winnow-stream")

    def buffers(self) -> _Buffers:
        """New, unfilled buffers for one group."""
        return _Buffers(self.plan, self.order, self.hooks, len(self.lanes))

    def layout(self, epoch: int, group: int) -> _Layout:
        """Start shuffling a group's lanes."""
        return (_Held if self.holds else _Shuffled)(self.order, self.lanes, epoch, group, self.pool)

    def read(self, buffers: _Buffers, layout: _Layout, units: tuple[int, ...]) -> list[Future[int]]:
        """Start filling `buffers`; each future gives the bytes it read from storage.

        The pool takes tasks in turn, so the shuffles that these wait for have begun before them.
        """
        self.index.require(units)
        futures: list[Future[int]] = []
        for position, unit in enumerate(units):
            futures.append(self.pool.submit(self._weights, buffers, layout, position, unit))
            for hook in self.hooks:
                if self.index.void[unit]:
                    futures.append(self.pool.submit(self._blank, buffers.rows[hook], layout, position))
                    continue
                for first, stop in self._runs(hook):
                    futures.append(
                        self.pool.submit(
                            self._fetch, buffers.rows[hook], layout, position, hook, unit, first, stop
                        )
                    )
        return futures

    def _runs(self, hook: str) -> Iterator[tuple[int, int]]:
        """This rank's slices as runs [first, stop) of about `REQUEST_BYTES`."""
        first, last = self.lanes.start * self.order.lane_slices, self.lanes.stop * self.order.lane_slices
        step = max(1, REQUEST_BYTES // slice_bytes(self.plan, hook))
        for start in range(first, last, step):
            yield start, min(start + step, last)

    def _weights(self, buffers: _Buffers, layout: _Layout, position: int, unit: int) -> int:
        share = self.index.weights(self.hooks, unit).reshape(self.order.lanes, -1)
        for number, lane in enumerate(self.lanes):
            buffers.weights[layout.place(number, position, 0, self.order.lane_unit_rows)] = share[lane]
        return 0

    def _blank(self, target: NDArray[Any], layout: _Layout, position: int) -> int:
        for number in range(len(self.lanes)):
            target[layout.place(number, position, 0, self.order.lane_unit_rows)] = 0
        return 0

    def _fetch(
        self,
        target: NDArray[Any],
        layout: _Layout,
        position: int,
        hook: str,
        unit: int,
        first: int,
        stop: int,
    ) -> int:
        whole = whole_rows(target)

        def take(number: int, rows: NDArray[Any]) -> None:
            lane, part = divmod(number, self.order.lane_slices)
            start = part * len(rows)
            place = layout.place(lane - self.lanes.start, position, start, start + len(rows))
            whole[place] = whole_rows(rows)

        return fetch_slices(self.store, self.plan, self.index, hook, unit, first, stop, take)


def whole_rows(rows: NDArray[Any]) -> NDArray[Any]:
    """[R] a view of contiguous [R, D] with one opaque element a row: NumPy moves those fastest."""
    return rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))[:, 0]


class RowStream:
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
    ) -> None:
        hooks = (hooks,) if isinstance(hooks, str) else tuple(hooks)
        if not hooks or len(set(hooks)) != len(hooks):
            raise ConfigError("hooks", expected="one or more, each once", got=hooks)
        for hook in hooks:
            plan.d_model(hook)
        if requests < 1:
            raise ConfigError("prefetch", expected="1 or more requests", got=requests)
        lanes = order.lanes_of(rank, world)
        self.plan, self.order, self.hooks, self.split = plan, order, hooks, split
        self.rank, self.world = rank, world
        self.stop_step = stop_step
        self.next_step = start_step
        self.place = order.locate(start_step)
        self.seconds_waiting = 0.0
        """Seconds the consumer has waited for data."""
        self.bytes_read = 0
        """Bytes of finished groups read from storage, refetches included."""
        self._failed: BaseException | None = None
        self._reader = GroupReader(store, plan, index, order, hooks, lanes, requests)
        self._current: _Buffers | None = None
        self._layout: _Layout | None = None
        self._coming: _Coming | None = None
        self._closed = False
        weakref.finalize(self, self._reader.pool.shutdown, wait=False, cancel_futures=True)
        if not self._finished(start_step):
            self._begin(self.place.epoch, self.place.group, self._reader.buffers())

    # Iterator

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RowBatch:
        if self._failed is not None:
            raise self._failed
        if self._closed:
            raise ConfigError("the stream is closed", fix="Open another one from its state")
        if self._finished(self.next_step):
            self._release()
            raise StopIteration
        if self._layout is None:
            self._advance()
        assert self._current is not None
        assert self._layout is not None
        chosen = self._layout.batch(self.place.step_in_group)
        rows = {hook: _rows(held, chosen) for hook, held in self._current.rows.items()}
        batch = RowBatch(rows, self._current.weights[chosen], self.next_step)
        self.next_step += 1
        before, self.place = self.place, self.order.locate(self.next_step)
        if (before.epoch, before.group) != (self.place.epoch, self.place.group):
            self._layout = None
        return batch

    def state(self) -> StreamState:
        """Where the stream stands: before its next step. Integers only."""
        return self.order.state(self.plan.fingerprint, self.split, self.hooks, self.next_step)

    @property
    def memory_bytes(self) -> int:
        """Memory of this rank's buffers, in bytes."""
        return memory_bytes(self.plan, self.order, self.hooks, self.world)

    def close(self) -> None:
        """Stop reading: requests not begun are dropped, those in flight are waited for."""
        self._closed = True
        self._release()

    def _release(self) -> None:
        self._reader.pool.shutdown(wait=True, cancel_futures=True)
        self._current = self._layout = self._coming = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Groups

    def _finished(self, step: int) -> bool:
        return self.stop_step is not None and step >= self.stop_step

    def _begin(self, epoch: int, group: int, buffers: _Buffers, *, held: bool = False) -> None:
        """Start reading a group into `buffers`, unless its rows are held there already."""
        layout = self._reader.layout(epoch, group)
        units = self.order.units_of(epoch, group)
        self._coming = _Coming(buffers, layout, [] if held else self._reader.read(buffers, layout, units))

    def _advance(self) -> None:
        """Wait for the group that is coming, make it the current one, and start the one after it."""
        assert self._coming is not None
        coming, self._coming = self._coming, None
        started = time.perf_counter()
        try:
            self.bytes_read += coming.result()
        except BaseException as error:
            self._failed = error
            self._release()
            raise
        finally:
            self.seconds_waiting += time.perf_counter() - started
        spare, self._current, self._layout = self._current, coming.buffers, coming.layout
        epoch, group = self.place.epoch, self.place.group + 1
        if group == self.order.groups:
            epoch, group = epoch + 1, 0
        if self._finished(self.order.first_step(epoch, group)):
            return
        if self._reader.holds:
            self._begin(epoch, group, self._current, held=True)
        else:
            self._begin(epoch, group, spare or self._reader.buffers())


class _Coming(NamedTuple):
    """A group being read."""

    buffers: _Buffers
    layout: _Layout
    reads: list[Future[int]]

    def result(self) -> int:
        """Bytes read, once everything is; or the first error of any of its threads."""
        done, _ = wait(self.reads, return_when=FIRST_EXCEPTION)
        for future in self.reads:
            if future in done and future.exception() is not None:
                future.result()
        return sum(future.result() for future in self.reads)


def _rows(held: NDArray[Any], chosen: Place) -> NDArray[Any]:
    """The chosen rows of [R, D]: a view of a run, or a copy gathered by number."""
    if isinstance(chosen, slice):
        return held[chosen]
    return np.take(held, chosen, axis=0, mode="clip")
