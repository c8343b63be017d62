"""Slices of a remote dataset kept on a local disk: checked like those from storage, and never needed.

One file a slice, its bytes as stored with their crc32c, in a folder for each dataset; named by a digest of
what the receipt says of it, so that a slice that a repair changed is another file. Whatever the disk gives is
checked as if it came from storage. Once the cap is reached, slices of other datasets make room, the longest
unread first; those of this dataset stay, and what does not fit is read from storage every time: epochs come
round in ever new orders, and a cache that drops the oldest would drop each slice just before its next use.
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
RECOUNT_BYTES = 1 << 30
"""Other processes use the folder too: after writing so much, what is there is counted again."""
STALE_SECONDS = 3600.0
"""After this long an unfinished file is nobody's."""


class SliceCache:
    """Slices of one dataset under a folder that other datasets and processes may share. Safe from threads.

    Args:
        folder: Made if it is not there.
        max_bytes: Most bytes the folder may hold. Processes that fill it together may pass it by
            `RECOUNT_BYTES` each.
        plan: The dataset's plan.
    """

    def __init__(self, folder: str | Path, max_bytes: int, plan: HarvestPlan) -> None:
        self._top = expand_user(folder).absolute()
        self._place = self._top / plan.fingerprint[:32]
        self._max, self._lock = max_bytes, threading.Lock()
        self._held = self._written = 0
        self.off = False
        """Set by the first failed write: from then on slices are looked for and not kept."""
        self.hits = self.poisoned = 0
        """Slices that came from the disk; files that were there and wrong."""
        self._count()

    @staticmethod
    def name(hook: str, unit: int, number: int, crc: int, length: int) -> str:
        """The file of a slice: a digest of where it belongs and of what the receipt says of it."""
        return sha256_hex(f"{shard_key(hook, unit)}\n{number}\n{crc:08x}\n{length}".encode())

    def read(self, name: str, payload: NDArray[np.uint8], beside: NDArray[np.uint8]) -> bool:
        """Fill a slice's buffers (bytes, and the crc32c stored with them) from the disk, unchecked.

        Returns:
            False: the slice is not there, or the disk does not give it.
        """
        try:
            with (self._place / name).open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size != payload.size + beside.size:
                    self.drop(name)
                    return False
                whole = os.preadv(file.fileno(), [payload.data, beside.data], 0) == size
                os.utime(file.fileno())
        except OSError:
            return False
        with self._lock:
            self.hits += whole
        return whole

    def drop(self, name: str) -> None:
        """Remove a file that is not the slice it is named for."""
        size = 0
        with suppress(OSError):
            size = (self._place / name).stat().st_size
            (self._place / name).unlink()
        with self._lock:
            self.poisoned += 1
            self._held -= size

    def keep(self, name: str, payload: NDArray[np.uint8], beside: NDArray[np.uint8]) -> None:
        """Write a checked slice, if there is room; a disk that refuses is left alone from then on."""
        size = payload.size + beside.size
        if self.off or not self._room(size):
            return
        temp = self._place / f".{secrets.token_hex(8)}"
        try:
            self._place.mkdir(parents=True, exist_ok=True)
            with temp.open("xb", buffering=0) as file:
                done = os.writev(file.fileno(), [payload.data, beside.data])
                if done != size:
                    raise OSError(28, f"only {done} of {size} bytes were written")
            temp.replace(self._place / name)
        except OSError as error:
            with suppress(OSError):
                temp.unlink()
            with self._lock:
                first, self.off = not self.off, True
                self._held -= size
            if first:
                reason = error.strerror or type(error).__name__
                log.warning(
                    "the cache at %s takes no more slices (%s): reading goes on from storage",
                    self._top,
                    reason,
                )

    def _room(self, size: int) -> bool:
        """Whether `size` bytes more fit; they then count as held."""
        with self._lock:
            if self._written >= RECOUNT_BYTES:
                self._count()
            if self._held + size > self._max:
                self._evict(size)
            if self._held + size > self._max:
                return False
            self._held += size
            self._written += size
            return True

    def _files(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of every file in the folder."""
        found: list[tuple[float, int, Path]] = []
        for path in self._top.glob("*/*") if self._top.is_dir() else ():
            with suppress(OSError):
                facts = path.stat()
                if path.name.startswith(".") and time.time() - facts.st_mtime > STALE_SECONDS:
                    path.unlink()  # a killed process left it
                    continue
                found.append((facts.st_mtime, facts.st_size, path))
        return found

    def _count(self) -> None:
        self._held, self._written = sum(size for _, size, _ in self._files()), 0

    def _evict(self, size: int) -> None:
        """Make room for `size` bytes from what other datasets have there, the longest unread first."""
        for _, length, path in sorted(self._files()):
            if self._held + size <= self._max:
                return
            if path.parent != self._place:
                with suppress(OSError):
                    path.unlink()
                    self._held -= length
