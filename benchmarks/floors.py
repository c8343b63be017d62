"""Floors of streams: loops that do the least work for the same bytes, without a store around them."""

from __future__ import annotations

import argparse
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import obstore

from winnow.common.cores import usable_cores
from winnow.schemas.harvest import SLICES, HarvestPlan
from winnow.store.format.layout import shard_key, slice_bytes, slice_range
from winnow.store.format.order import LaneOrder
from winnow.store.format.shards import crc32c
from winnow.store.objects.s3_store import S3Store
from winnow.store.read.assemble import ASSEMBLING
from winnow.store.read.groups import REQUEST_BYTES

HOOK = "resid_post.1"
SEED = 3


class Groups:
    """Buffers of two groups, and the places in them of the rows of each step of an epoch.

    Args:
        plan: The dataset's plan.
        options: Sizes.
        order: Which row comes when; None is that of all rows.
    """

    def __init__(
        self, plan: HarvestPlan, options: argparse.Namespace, order: LaneOrder | None = None
    ) -> None:
        self.order = order or LaneOrder.for_plan(
            plan, batch_rows=options.batch_rows, seed=SEED, group_units=options.group_units
        )
        self.row_bytes, size = 2 * options.d_model, plan.rows_per_unit
        shape = (options.group_units * size, options.d_model)
        # Filled, because all pages that were never written are one page of zeros, always in the cache.
        self.buffers = [np.full(shape, 1, np.uint16) for _ in range(2)]
        # Computed beforehand, so that the floor gathers in the stream's own order without shuffling.
        self.turns: list[list[np.ndarray]] = []
        for group in range(self.order.groups):
            first = self.order.first_step(0, group)
            units = np.array(self.order.units_of(0, group))
            slots = np.zeros(units.max() + 1, np.int64)
            slots[units] = np.arange(len(units))
            steps = (self.order.rows_at(first + step) for step in range(self.order.steps_in(group)))
            self.turns.append([slots[rows // size] * size + rows % size for rows in steps])
        self._local = threading.local()

    def gather(self, group: int, rows: np.ndarray) -> None:
        """Gather a step's rows into this thread's own array."""
        # One array per thread, reused: a fresh one per batch would measure the allocator.
        buffer = self.buffers[group % 2]
        out = getattr(self._local, "out", None)
        if out is None:
            out = self._local.out = np.zeros((len(rows), buffer.shape[1]), np.uint16)
        # `clip` writes straight to `out`; the default mode goes through a buffer, to raise before writing.
        np.take(buffer, rows, axis=0, out=out, mode="clip")


class Loop:
    """The floor of the local stream; a call reads an epoch and returns its rate in bytes per second."""

    def __init__(
        self, root: Path, plan: HarvestPlan, options: argparse.Namespace, order: LaneOrder | None = None
    ) -> None:
        self.plan, self.groups = plan, Groups(plan, options, order)
        self.pool = ThreadPoolExecutor(min(options.prefetch, usable_cores()))
        self.files = {
            unit: os.open(root / shard_key(HOOK, unit), os.O_RDONLY) for unit in plan.split_units("train")
        }

    def __call__(self, read_only: bool = False) -> float:
        """Read an epoch."""
        started = time.perf_counter()
        waiting: list[list[Future[None]]] = [[], []]
        order, row_bytes = self.groups.order, self.groups.row_bytes
        for group, turns in enumerate(self.groups.turns):
            buffer, number = self.groups.buffers[group % 2], group % 2
            # The buffer may be overwritten once all rows of the group before last are gathered from it.
            _wait(waiting[number])
            reads = [
                self.pool.submit(self._read, buffer, slot, unit, *run, read_only)
                for slot, unit in enumerate(order.units_of(0, group))
                for run in runs(self.plan)
            ]
            _wait(reads)
            if not read_only:
                waiting[number] = [self.pool.submit(self.groups.gather, group, rows) for rows in turns]
        _wait(waiting[0] + waiting[1])
        rows = len(order.units) * self.plan.rows_per_unit if read_only else order.rows_per_epoch
        return rows * row_bytes / (time.perf_counter() - started)

    def _read(self, buffer: Any, slot: int, unit: int, first: int, stop: int, read_only: bool) -> None:
        raw = buffer.view(np.uint8).reshape(-1)
        beside = np.empty(4, np.uint8)
        size = slice_bytes(self.plan, HOOK) - 4
        for number in range(first, stop):
            payload = raw[(slot * SLICES + number) * size : (slot * SLICES + number + 1) * size]
            # Straight to its place, the checksum aside; then checked while it is in the CPU's cache.
            os.preadv(self.files[unit], [payload.data, beside.data], number * (size + 4))
            if not read_only:
                crc32c(payload)

    def close(self) -> None:
        """Stop its threads and close its files."""
        self.pool.shutdown()
        for handle in self.files.values():
            os.close(handle)


def _wait(futures: list[Future[None]]) -> None:
    for future in futures:
        future.result()


class Gets:
    """The floor of the stream from S3: the same ranges of an epoch, as many in flight, replies discarded.

    Args:
        objects: The store of the dataset.
        plan: The dataset's plan.
        options: Sizes.
        least: Also compute each slice's crc32c in its reply, and meanwhile gather as many rows as the epoch
            has, on as many threads as the stream uses for it. The rows come from buffers that are never
            filled: no loader that checks and shuffles does less.
    """

    def __init__(
        self, objects: S3Store, plan: HarvestPlan, options: argparse.Namespace, *, least: bool = False
    ) -> None:
        self.client, self.slice = objects._client, slice_bytes(plan, HOOK)
        self.ranges = [
            (objects._path(shard_key(HOOK, unit)), *slice_range(plan, HOOK, *run))
            for unit in plan.split_units("train")
            for run in runs(plan)
        ]
        self.groups = Groups(plan, options) if least else None
        self.pool, self.gathering = ThreadPoolExecutor(options.prefetch), ThreadPoolExecutor(ASSEMBLING)

    def __call__(self) -> float:
        """Read an epoch; returns its rate in bytes per second."""
        started = time.perf_counter()
        gathers: list[Future[None]] = []
        if self.groups:
            for group, steps in enumerate(self.groups.turns):
                gathers += [self.gathering.submit(self.groups.gather, group, rows) for rows in steps]
        received = sum(self.pool.map(self._get, self.ranges))
        _wait(gathers)
        return received / (time.perf_counter() - started)

    def close(self) -> None:
        """Stop its threads."""
        self.pool.shutdown()
        self.gathering.shutdown()

    def _get(self, item: tuple[str, int, int]) -> int:
        reply = obstore.get_range(self.client, item[0], start=item[1], end=item[2])
        if self.groups:
            body = np.frombuffer(memoryview(reply), np.uint8)
            for first in range(0, len(body), self.slice):
                crc32c(body[first : first + self.slice - 4])
        return len(reply)


def runs(plan: HarvestPlan) -> list[tuple[int, int]]:
    """Slices [first, stop) of each request, as the stream makes them."""
    step = max(1, REQUEST_BYTES // slice_bytes(plan, HOOK))
    return [(first, min(first + step, SLICES)) for first in range(0, SLICES, step)]
