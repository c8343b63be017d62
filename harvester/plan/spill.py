"""Windows in keyed order, however many: an external sort through one file on local disk.

Windows are gathered in a buffer; when it is full they are grouped by the high bits of their hash and appended
to the file, and the places of each bucket's pieces stay in memory. Reading takes one bucket at a time and
sorts it.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from winnow.common.hashing import keyed_hash
from winnow.harvester.plan.packing import Windows
from winnow.schemas.errors import StoreError

_BUCKET_BYTES = 16 * 2**20
"""Target size of a bucket; sorting takes about twice that in memory."""
# Each bucket takes PIECE_BYTES of the buffer: 4,096 of them are a buffer of 64 MiB, and beyond a spill of
# 64 GiB it is the buckets that grow.
_MAX_BUCKETS = 4096
_BUCKETS_WHEN_UNKNOWN = 1024
_HASH_BYTES = 8
_PIECE_BYTES = 16 * 2**10
"""Smallest share of the buffer per bucket, so that buckets are not read back in tiny pieces."""


def record_bytes(window: np.dtype[np.generic]) -> int:
    """Size of one window on disk."""
    return _HASH_BYTES + window.itemsize


def bucket_count(spill_bytes: int | None) -> int:
    """The number of buckets, a power of two, for a forecast of `spill_bytes` (None: unknown)."""
    if spill_bytes is None:
        return _BUCKETS_WHEN_UNKNOWN
    return 1 << min(max(spill_bytes // _BUCKET_BYTES, 0).bit_length(), _MAX_BUCKETS.bit_length() - 1)


def check_space(folder: str, needed: int, what: str) -> None:
    """Check that `folder` has `needed` bytes free.

    Raises:
        StoreError: It has fewer.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StoreError(
            f"disk too small for {what} in {folder}",
            expected=f"about {needed / 1e9:.2f} GB free",
            got=f"{free / 1e9:.2f} GB",
            fix="Free some space, or name a larger folder in harvest.temp_dir",
        )


class WindowSpill:
    """Takes windows [n] in any number of calls, and returns them in keyed order, as often as asked.

    Args:
        window: dtype of a window.
        key: Key of the order (`packing.order_key`).
        folder: Local folder for the file.
        buckets: A power of two; the order does not depend on it.
        keep: Return only this many windows, the first in keyed order; windows that can no longer be
            among them are not written. None keeps all.
        buffer_bytes: Size of the windows gathered in memory before they are written.
    """

    def __init__(
        self,
        window: np.dtype[np.generic],
        key: int,
        *,
        folder: str,
        buckets: int = _BUCKETS_WHEN_UNKNOWN,
        keep: int | None = None,
        buffer_bytes: int = _BUCKET_BYTES,
    ) -> None:
        if buckets < 1 or buckets & (buckets - 1):
            raise ValueError(f"buckets must be a power of two, got {buckets}")
        self._record = np.dtype([("hash", "<u8"), ("window", window)])
        self._key, self._keep, self._folder = key, keep, folder
        # The hash's high bits name the bucket, so that buckets in order are windows in order.
        self._shift = 65 - buckets.bit_length()
        self._pieces: list[list[tuple[int, int]]] = [[] for _ in range(buckets)]  # (offset, windows)
        self._sizes = np.zeros(buckets, np.int64)
        self._open = buckets
        room = max(buffer_bytes, buckets * _PIECE_BYTES) // self._record.itemsize
        self._buffer = np.empty(max(room, 1), self._record)
        self._filled = 0
        self.windows = 0
        """Windows taken, kept or not."""
        self.bytes = 0
        """Size of the file."""
        # It has no name, or loses it at once, so that a killed planner leaves nothing behind.
        self._file = tempfile.TemporaryFile(prefix="winnow-plan-", dir=folder)  # noqa: SIM115 (closed on exit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, windows: Windows) -> None:
        """Take windows [n], whose ordinals follow those of the last call.

        Raises:
            StoreError: The disk is full.
        """
        if not len(self._buffer):
            raise ValueError("nothing can be added after ordered()")
        hashes = keyed_hash(np.arange(self.windows, self.windows + len(windows)), self._key)
        self.windows += len(windows)
        # With `keep`, most windows of a large corpus end here and cost no disk.
        if self._open < len(self._pieces):
            chosen = self._bucket(hashes) < self._open
            hashes, windows = hashes[chosen], windows[chosen]
        while len(hashes):
            count = min(len(hashes), len(self._buffer) - self._filled)
            target = self._buffer[self._filled : self._filled + count]
            target["hash"], target["window"] = hashes[:count], windows[:count]
            hashes, windows = hashes[count:], windows[count:]
            self._filled += count
            if self._filled == len(self._buffer):
                self._flush()

    def ordered(self) -> Iterator[Windows]:
        """Yield blocks [n] of the kept windows, ascending in keyed hash over all blocks."""
        self._flush()
        # The buffer's memory is free for the sort; an empty one also marks the end of adding.
        self._buffer = self._buffer[:0].copy()
        left = self.windows if self._keep is None else self._keep
        for pieces, size in zip(self._pieces, self._sizes, strict=True):
            if left <= 0:
                return
            records = np.empty(int(size), self._record)
            at = 0
            for offset, count in pieces:
                self._read(records[at : at + count], offset)
                at += count
            # Stable: windows with equal hashes stay in reading order, on every machine.
            order = np.argsort(records["hash"], kind="stable")[:left]
            left -= len(order)
            if len(order):
                yield records["window"][order]

    def _bucket(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        # One bucket: a shift by all 64 bits is undefined in C.
        if self._shift == 64:
            return np.zeros(len(hashes), np.int64)
        return (hashes >> np.uint64(self._shift)).astype(np.int64)

    def _flush(self) -> None:
        records, self._filled = self._buffer[: self._filled], 0
        if not len(records):
            return
        bucket = self._bucket(records["hash"])
        counts = np.bincount(bucket, minlength=len(self._pieces))
        counts[self._open :] = 0
        total = int(counts.sum())
        blob = records[np.argsort(bucket, kind="stable")[:total]]
        try:
            self._file.write(blob.view(np.uint8).data)
            # Out of Python's buffer: `_read` goes to the descriptor.
            self._file.flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise StoreError("the planner's spill file cannot be written", got=str(error)) from error
            check_space(self._folder, blob.nbytes * 2, "the planner's spill file")
            raise StoreError(f"disk full in {self._folder}", got=str(error)) from error
        starts = self.bytes + (np.cumsum(counts) - counts) * self._record.itemsize
        for number in np.flatnonzero(counts):
            self._pieces[number].append((int(starts[number]), int(counts[number])))
        self.bytes += blob.nbytes
        self._sizes += counts
        # Buckets after the one in which the first `keep` windows end are closed, and stay so: their windows
        # would all come later in the order.
        if self._keep is not None:
            enough = np.flatnonzero(np.cumsum(self._sizes) >= self._keep)
            if len(enough):
                self._open = min(self._open, int(enough[0]) + 1)

    def _read(self, records: NDArray[np.void], offset: int) -> None:
        # preadv into the records: no second copy of a bucket, and no shared position in the file.
        view = memoryview(records.view(np.uint8).data).cast("B")
        done = 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise StoreError("the planner's spill file is shorter than what was written to it")
            done += count
