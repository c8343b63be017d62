"""A cache on a local disk for slices of remote datasets: checked like storage, and never needed.

A folder per dataset, a file per slice: its bytes as stored, with their crc32c.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from winnow.common.paths import expand_user
from winnow.schemas.base import sha256_hex
from winnow.schemas.harvest import HarvestPlan
from winnow.store.format.layout import shard_key

log = logging.getLogger("winnow.store")
# Other processes fill the folder too, so a process's own sum goes wrong; listing the folder is slow.
_RECOUNT_BYTES = 1 << 30
"""Bytes written until the folder's content is counted again."""
# Writing one slice takes no hour: an older unfinished file is a killed process's.
_STALE_SECONDS = 3600.0
"""Age at which an unfinished file is removed."""


class SliceCache:
    """Slices of one dataset under a folder that other datasets and processes may share. Safe from threads.

    Args:
        folder: Created if it does not exist.
        max_bytes: Most bytes in the folder. Processes that fill it together may exceed it by `_RECOUNT_BYTES`
            each.
        plan: The dataset's plan.
    """

    def __init__(self, folder: str | Path, max_bytes: int, plan: HarvestPlan) -> None:
        self._top = expand_user(folder).absolute()
        self._place = self._top / plan.fingerprint[:32]
        self._max, self._lock = max_bytes, threading.Lock()
        self._held = self._written = 0
        self.off = False
        """Set by the first failed write: from then on slices are read from the folder but not written."""
        self.hits = self.poisoned = 0
        """Slices that came from the disk; files that were wrong."""
        self._count()

    @staticmethod
    def name(hook: str, unit: int, number: int, crc: int, length: int) -> str:
        """Name a slice's file by a digest of its place and of what the receipt says about it."""
        # With the receipt's crc32c, so that a slice that a repair has changed is another file.
        return sha256_hex(f"{shard_key(hook, unit)}\n{number}\n{crc:08x}\n{length}".encode())

    def read(self, name: str, payload: NDArray[np.uint8], beside: NDArray[np.uint8]) -> bool:
        """Fill a slice's buffers (bytes, and the crc32c stored with them) from the disk, unchecked.

        Returns:
            False if the slice is not there or cannot be read.
        """
        try:
            with (self._place / name).open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size != payload.size + beside.size:
                    self.drop(name)
                    return False
                whole = os.preadv(file.fileno(), [payload.data, beside.data], 0) == size
                # Eviction goes by the last read, and most file systems are mounted not to record that.
                os.utime(file.fileno())
        except OSError:
            return False
        with self._lock:
            self.hits += whole
        return whole

    def drop(self, name: str) -> None:
        """Remove a file that is not the slice that its name says."""
        size = 0
        with suppress(OSError):
            size = (self._place / name).stat().st_size
            (self._place / name).unlink()
        with self._lock:
            self.poisoned += 1
            self._held -= size

    def keep(self, name: str, payload: NDArray[np.uint8], beside: NDArray[np.uint8]) -> None:
        """Write a checked slice, if there is room; after a failure nothing more is written."""
        size = payload.size + beside.size
        if self.off or not self._room(size):
            return
        temp = self._place / f".{secrets.token_hex(8)}"
        try:
            # Renamed when complete, so that no other process reads half of it. No fsync: what a power cut
            # spoils fails its check and is read from storage again.
            self._place.mkdir(parents=True, exist_ok=True)
            with temp.open("xb", buffering=0) as file:
                done = os.writev(file.fileno(), [payload.data, beside.data])
                if done != size:
                    raise OSError(28, f"only {done} of {size} bytes were written")  # 28: ENOSPC
            temp.replace(self._place / name)
        except OSError as error:
            with suppress(OSError):
                temp.unlink()
            with self._lock:
                first, self.off = not self.off, True
                self._held -= size
            # Once, and not for each slice of an epoch.
            if first:
                reason = error.strerror or type(error).__name__
                log.warning(
                    "the cache at %s takes no more slices (%s): they are read from storage",
                    self._top,
                    reason,
                )

    def _room(self, size: int) -> bool:
        """Reserve room for `size` bytes; False if there is none."""
        with self._lock:
            if self._written >= _RECOUNT_BYTES:
                self._count()
            if self._held + size > self._max:
                self._evict(size)
            if self._held + size > self._max:
                return False
            self._held += size
            self._written += size
            return True

    def _files(self) -> list[tuple[float, int, Path]]:
        """List (last use, bytes, path) of every file in the folder."""
        found: list[tuple[float, int, Path]] = []
        for path in self._top.glob("*/*") if self._top.is_dir() else ():
            with suppress(OSError):
                facts = path.stat()
                if path.name.startswith(".") and time.time() - facts.st_mtime > _STALE_SECONDS:
                    path.unlink()  # a killed process left it
                    continue
                found.append((facts.st_mtime, facts.st_size, path))
        return found

    def _count(self) -> None:
        self._held, self._written = sum(size for _, size, _ in self._files()), 0

    def _evict(self, size: int) -> None:
        """Make room for `size` bytes by removing other datasets' slices, least recently read first."""
        # This dataset's own stay: epochs come in ever new orders, and evicting the oldest would drop each
        # slice just before its next use. What does not fit is read from storage every time: more hits.
        for _, length, path in sorted(self._files()):
            if self._held + size <= self._max:
                return
            if path.parent != self._place:
                with suppress(OSError):
                    path.unlink()
                    self._held -= length
