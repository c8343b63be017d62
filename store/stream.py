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
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
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
    """A rank's share of one step."""

    rows: dict[str, NDArray[np.generic]]
    """Hook -> [B/world, D] in the stored dtype (bfloat16 as uint16)."""
    weights: NDArray[np.float32]
    """[B/world] 0 for marked rows and void units, else 1; equal for all hooks (they multiply)."""
    step: int
    """Counted from 0 over all epochs."""


def memory_bytes(plan: HarvestPlan, order: LaneOrder, hooks: Sequence[str], world: int = 1) -> int:
    """Memory a rank's stream holds in buffers, in bytes: two groups' rows, weights and turns over the
    world size, or one group when the split is one group."""
    row = sum(plan.d_model(hook) for hook in hooks) * DTYPE_BYTES[plan.spec.dtype] + 4 + 8
    held = 1 if order.groups == 1 else 2
    return order.group_units * plan.rows_per_unit * row * held // world


class _Buffers:
    """One group's rows of this rank: filled by the reading threads, then only read."""

    def __init__(self, plan: HarvestPlan, order: LaneOrder, hooks: Sequence[str], lanes: range) -> None:
        self.lanes = lanes
        self.lane_rows = order.lane_unit_rows
        most = len(lanes) * min(order.group_units, len(order.units)) * self.lane_rows
        dtype = STORED_DTYPES[plan.spec.dtype]
        self.flat = {hook: np.empty((most, plan.d_model(hook)), dtype=dtype) for hook in hooks}
        self.flat_weights = np.empty(most, dtype=np.float32)
        self.units: tuple[int, ...] = ()

    def hold(self, units: tuple[int, ...]) -> None:
        """Make room for these units, ascending: their slots are in this order."""
        self.units = units

    def of_unit(self, flat: NDArray[Any], slot: int) -> NDArray[Any]:
        """[L, S, ...] a view of one unit's rows in `flat`."""
        used = len(self.lanes) * len(self.units) * self.lane_rows
        shape = (len(self.lanes), len(self.units), self.lane_rows, *flat.shape[1:])
        return flat[:used].reshape(shape)[:, slot]


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
        self.pool = ThreadPoolExecutor(max_workers=requests, thread_name_prefix="winnow-stream")

    def buffers(self) -> _Buffers:
        """New, unfilled buffers for one group."""
        return _Buffers(self.plan, self.order, self.hooks, self.lanes)

    def read(self, buffers: _Buffers, units: tuple[int, ...]) -> list[Future[int]]:
        """Start filling `buffers` with `units`; each future gives the bytes it read from storage."""
        self.index.require(units)
        buffers.hold(tuple(sorted(units)))
        futures: list[Future[int]] = []
        for slot, unit in enumerate(buffers.units):
            futures.append(self.pool.submit(self._weights, buffers, slot, unit))
            for hook in self.hooks:
                if self.index.void[unit]:
                    futures.append(self.pool.submit(self._blank, buffers, slot, hook))
                    continue
                for first, stop in self._runs(hook):
                    futures.append(self.pool.submit(self._fetch, buffers, slot, hook, unit, first, stop))
        return futures

    def turns(self, buffers: _Buffers, epoch: int, group: int) -> list[Future[NDArray[np.int64]]]:
        """Start shuffling each lane; each future gives [steps * B/G] rows of the flat buffers."""
        slot_of = {unit: slot for slot, unit in enumerate(buffers.units)}
        slots = np.array([slot_of[unit] for unit in self.order.units_of(epoch, group)], dtype=np.int64)
        return [self.pool.submit(self._turns, slots, epoch, group, lane) for lane in self.lanes]

    def _runs(self, hook: str) -> Iterator[tuple[int, int]]:
        """This rank's slices as runs [first, stop) of about `REQUEST_BYTES`."""
        first, last = self.lanes.start * self.order.lane_slices, self.lanes.stop * self.order.lane_slices
        step = max(1, REQUEST_BYTES // slice_bytes(self.plan, hook))
        for start in range(first, last, step):
            yield start, min(start + step, last)

    def _turns(self, slots: NDArray[np.int64], epoch: int, group: int, lane: int) -> NDArray[np.int64]:
        order = self.order
        used = order.steps_in(group) * order.lane_batch
        unit, row = np.divmod(order.lane_permutation(epoch, group, lane)[:used], order.lane_unit_rows)
        start = (lane - self.lanes.start) * len(slots)
        return (start + slots[unit]) * order.lane_unit_rows + row

    def _weights(self, buffers: _Buffers, slot: int, unit: int) -> int:
        share = self.index.weights(self.hooks, unit).reshape(self.order.lanes, -1)
        buffers.of_unit(buffers.flat_weights, slot)[:] = share[self.lanes.start : self.lanes.stop]
        return 0

    def _blank(self, buffers: _Buffers, slot: int, hook: str) -> int:
        buffers.of_unit(buffers.flat[hook], slot)[:] = 0
        return 0

    def _fetch(self, buffers: _Buffers, slot: int, hook: str, unit: int, first: int, stop: int) -> int:
        rows = buffers.of_unit(buffers.flat[hook], slot)
        slices = self.order.lane_slices
        shape = (slices, self.plan.rows_per_slice, rows.shape[-1])
        offset = self.lanes.start * slices
        outs = [
            rows[(number - offset) // slices].reshape(shape)[(number - offset) % slices]
            for number in range(first, stop)
        ]
        return fetch_slices(self.store, self.plan, self.index, hook, unit, first, outs)


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
        self._turns: NDArray[np.int64] | None = None
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
        if self._turns is None:
            self._advance()
        assert self._current is not None
        assert self._turns is not None
        turn = self.place.step_in_group * self.order.lane_batch
        chosen = self._turns[:, turn : turn + self.order.lane_batch].reshape(-1)
        rows = {hook: np.take(flat, chosen, axis=0, mode="clip") for hook, flat in self._current.flat.items()}
        batch = RowBatch(rows, np.take(self._current.flat_weights, chosen, mode="clip"), self.next_step)
        self.next_step += 1
        before, self.place = self.place, self.order.locate(self.next_step)
        if (before.epoch, before.group) != (self.place.epoch, self.place.group):
            self._turns = None
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
        self._current = self._turns = self._coming = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Groups

    def _finished(self, step: int) -> bool:
        return self.stop_step is not None and step >= self.stop_step

    def _begin(self, epoch: int, group: int, buffers: _Buffers) -> None:
        """Start reading a group into `buffers`, unless they hold its units already."""
        units = self.order.units_of(epoch, group)
        held = buffers.units == tuple(sorted(units))
        reads = [] if held else self._reader.read(buffers, units)
        self._coming = _Coming(buffers, reads, self._reader.turns(buffers, epoch, group))

    def _advance(self) -> None:
        """Wait for the group that is coming, make it the current one, and start the one after it."""
        assert self._coming is not None
        started = time.perf_counter()
        try:
            received, turns = self._coming.result()
        except BaseException as error:
            self._failed = error
            self._release()
            raise
        finally:
            self.seconds_waiting += time.perf_counter() - started
        self.bytes_read += received
        spare, self._current, self._turns = self._current, self._coming.buffers, turns
        self._coming = None
        epoch, group = self.place.epoch, self.place.group + 1
        if group == self.order.groups:
            epoch, group = epoch + 1, 0
        if self._finished(self.order.first_step(epoch, group)):
            return
        if self.order.groups == 1:
            spare = self._current
        self._begin(epoch, group, spare or self._reader.buffers())


class _Coming(NamedTuple):
    """A group being read."""

    buffers: _Buffers
    reads: list[Future[int]]
    turns: list[Future[NDArray[np.int64]]]

    def result(self) -> tuple[int, NDArray[np.int64]]:
        """(bytes read, [L, steps * B/G] turns), or the first error of any of its threads."""
        futures: list[Future[Any]] = [*self.reads, *self.turns]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future in done and future.exception() is not None:
                future.result()
        return sum(future.result() for future in self.reads), np.stack([f.result() for f in self.turns])
