"""The prefetching reader: checked byte ranges in the background, batches in lane order. NumPy only.

Letters: B rows in a batch, D d_model, G lanes, L lanes of this rank, U units in a group, S rows that a
lane owns of one unit.

A rank's lanes own neighbouring slices of every unit, so a rank reads one run of bytes per unit and hook, and
no byte that another rank reads. Slices go from storage into the group's buffers with one copy and are checked
there; a batch gathers its rows from the whole group and widens them to float32, ahead of the consumer. While
one group is consumed, the next is read into a second set of buffers. A split that is a single group is read
once and shuffled again in each epoch.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import NamedTuple, Protocol, Self

from winnow.common.closing import Closing
from winnow.schemas.errors import ConfigError
from winnow.schemas.harvest import HarvestPlan, row_bytes
from winnow.schemas.stream import StreamState
from winnow.store.format.order import LaneOrder
from winnow.store.objects import ObjectStore
from winnow.store.read.assemble import RUNS_AHEAD, Assembler, RowBatch, Widen, assembled_bytes, widen_stored
from winnow.store.read.cache import SliceCache
from winnow.store.read.follow import Arrivals
from winnow.store.read.groups import Buffers, GroupReader, Turns
from winnow.store.records.index import ReceiptIndex


def stream_bytes(rows: int, stored: int, *, groups: int, batch_bytes: int, world: int = 1) -> int:
    """Memory of a rank's stream, in bytes: buffers of groups, orders of rows, and batches ahead.

    A consumer that keeps its batches takes more.

    Args:
        rows: Rows of a group.
        stored: Bytes of a row on disk, over all hooks.
        groups: Groups of the split.
        batch_bytes: Bytes of a rank's batch, as the consumer gets it.
        world: Ranks that share the batches.
    """
    # Rows and weights (4 bytes) of two groups, or of one if the split is one group; and for two groups an
    # int64 per row, since the next group is shuffled while this one is consumed.
    held = 1 if groups == 1 else 2
    return rows * ((stored + 4) * held + 2 * 8) // world + assembled_bytes(batch_bytes)


def memory_bytes(
    plan: HarvestPlan, order: LaneOrder, hooks: Sequence[str], world: int = 1, dtype: str = "float32"
) -> int:
    """Memory of a rank's stream, in bytes; see `stream_bytes`."""
    stored = sum(row_bytes(plan.spec.dtype, plan.d_model(hook)) for hook in hooks)
    batch = _batch_bytes(plan, order, hooks, world, dtype)
    rows = order.group_units * plan.rows_per_unit
    return stream_bytes(rows, stored, groups=order.groups, batch_bytes=batch, world=world)


def _batch_bytes(plan: HarvestPlan, order: LaneOrder, hooks: Sequence[str], world: int, dtype: str) -> int:
    """Bytes of a rank's batch in the dtype that the consumer gets."""
    wide = _widens(plan, dtype)
    row = sum(
        plan.d_model(hook) * 4 if wide else row_bytes(plan.spec.dtype, plan.d_model(hook)) for hook in hooks
    )
    return row * order.batch_rows // world


def _widens(plan: HarvestPlan, dtype: str) -> bool:
    """Whether batches in the dtype that the consumer wants are widened to float32."""
    return dtype == "float32" or (dtype == "stored" and plan.spec.dtype == "int8")


class Rows(Protocol):
    """An iterator of `RowBatch`: a `RowStream`, or several side by side."""

    @property
    def order(self) -> LaneOrder:
        """Which row comes when."""
        ...

    @property
    def next_step(self) -> int:
        """The next step, counted over all epochs."""
        ...

    @property
    def seconds_waiting(self) -> float:
        """Seconds the consumer has waited for data."""
        ...

    @property
    def bytes_read(self) -> int:
        """Bytes read from storage so far, including refetches."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Memory of this rank's buffers, in bytes."""
        ...

    def __next__(self) -> RowBatch: ...

    def ready(self, seconds: float) -> bool:
        """See `RowStream.ready`."""
        ...

    def state(self) -> StreamState:
        """See `RowStream.state`."""
        ...

    def close(self) -> None:
        """Stop reading."""
        ...


class RowStream(Closing):
    """An iterator of `RowBatch`; see `ActivationStore.stream` for the arguments.

    Reading starts on construction, in small thread pools, which end with `close()`, after the last batch, or
    with the stream.

    Raises (on construction, before any data is read):
        ConfigError: An impossible hook, rank, world or step.
        MissingObject: A unit of the first group has no receipt.
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
        hooks = _checked(plan, hooks, requests, dtype)
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
        widen = widen or partial(widen_stored, dtype=plan.spec.dtype)
        wide = _widens(plan, dtype)
        # A local root's reading threads assemble too, see `Assembler`.
        pool = None if store.remote else self._reader.pool
        self._dtype = dtype
        size = _batch_bytes(plan, order, hooks, world, dtype)
        self._assembler = Assembler(pool, widen if wide else None, size, len(hooks))
        if pool:
            self._reader.before = self._assembler.work
        self._current: Buffers | None = None
        self._turns: Turns | None = None
        self._first = self._last = self._asked = start_step
        """The current group's first step, one past its last, and the next step to be assembled."""
        self._ready: deque[Future[list[RowBatch]]] = deque()
        self._run: deque[RowBatch] = deque()
        self._coming: _Coming | None = None
        self._closed = False
        # The threads of a stream that is dropped without `close()` end too. The finalizers must not refer to
        # the stream itself, which would then never be collected.
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
        # An error is final: the buffers are released after it, so a retry must not seem to continue.
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
            # Once more, so that the next run is assembled while the consumer works on this one.
            self._ask()
        except BaseException as error:
            self._failed = error
            self._release()
            raise
        finally:
            self.seconds_waiting += time.perf_counter() - started

    def _ask(self) -> None:
        """Start assembling the group's next batches, `RUNS_AHEAD` runs at most."""
        assert self._current is not None
        assert self._turns is not None
        while len(self._ready) < RUNS_AHEAD and self._asked < self._last:
            count = min(self._assembler.run, self._last - self._asked)
            place = self._asked - self._first
            self._ready.append(self._assembler.start(self._current, self._turns, place, self._asked, count))
            self._asked += count

    def ready(self, seconds: float) -> bool:
        """Return whether all units of the next batch are committed, after waiting at most so long.

        True if the dataset is not followed: if a unit is missing after all, the next batch raises.
        """
        coming = self._coming
        if self.next_step < self._last or coming is None or not isinstance(coming.reads, Future):
            return True
        return bool(wait([coming.reads], seconds).done)

    def state(self) -> StreamState:
        """Return the stream's position, before its next step. Integers only."""
        return self.order.state(self.plan.fingerprint, self.split, self.hooks, self.next_step)

    @property
    def bytes_read(self) -> int:
        """Bytes read from storage so far, including refetches."""
        return self._reader.bytes_read

    @property
    def memory_bytes(self) -> int:
        """Memory of this rank's stream, in bytes; see the function."""
        return memory_bytes(self.plan, self.order, self.hooks, self.world, self._dtype)

    def close(self) -> None:
        """Stop reading: pending requests are dropped, those in flight are waited for."""
        self._closed = True
        self._release()

    def _pools(self) -> list[ThreadPoolExecutor]:
        """List all pools; one that submits work to another comes first, so that it is shut down first."""
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

    def _begin(self, epoch: int, group: int, buffers: Buffers, *, held: bool = False) -> None:
        """Start reading a group into `buffers`, unless it is `held` there already."""
        turns = self._reader.turns(epoch, group)
        units = self.order.units_of(epoch, group)
        if held:
            reads: list[Future[None]] | Future[list[Future[None]]] = []
        # Receipts may take hours to come, while the consumer wants this group's batches.
        elif self._waiter:
            reads = self._waiter.submit(self._reader.read, buffers, turns, units)
        else:
            reads = self._reader.read(buffers, turns, units)
        self._coming = _Coming(buffers, turns, reads)

    def _advance(self) -> None:
        """Start reading the group after the coming one, then wait for the coming one and make it current."""
        assert self._coming is not None
        coming, self._coming = self._coming, None
        # All batches of the previous group are assembled, so its buffers are free for the next one. That read
        # starts before the coming group is complete: the pool has work while its last slices arrive.
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


def _checked(plan: HarvestPlan, hooks: Sequence[str], requests: int, dtype: str) -> tuple[str, ...]:
    """Return the hooks as a tuple; ConfigError if an argument of a stream is impossible."""
    hooks = (hooks,) if isinstance(hooks, str) else tuple(hooks)
    if not hooks or len(set(hooks)) != len(hooks):
        raise ConfigError("hooks", expected="one or more, each once", got=hooks)
    for hook in hooks:
        plan.d_model(hook)
    if requests < 1:
        raise ConfigError("prefetch", expected="1 or more requests", got=requests)
    if dtype not in ("float32", "stored", "packed"):
        raise ConfigError("dtype", expected="float32, stored or packed", got=repr(dtype))
    return hooks


class _Coming(NamedTuple):
    """A group being read."""

    buffers: Buffers
    turns: Turns
    reads: list[Future[None]] | Future[list[Future[None]]]
    """The reads; of a followed dataset, the future that begins them."""

    def result(self) -> None:
        """Wait until everything is read and shuffled; raise the first error of any thread."""
        reads = self.reads.result() if isinstance(self.reads, Future) else self.reads
        reads = [*self.turns.shuffles, *reads]
        # A failed read ends the wait at once, however long the others may take.
        done, _ = wait(reads, return_when=FIRST_EXCEPTION)
        for future in reads:
            if future in done and future.exception() is not None:
                future.result()
        for future in reads:
            future.result()
