"""The one seam to object storage: a small interface that local folders and S3 implement."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.errors import StoreError
from winnow.store.objects.probe import Probe

Data = bytes | bytearray | memoryview
"""What a store takes; ranges come back as `bytes` or a read-only `memoryview` without a copy."""
Pieces = tuple[Data, ...]
"""One object's bytes, in order, so that nobody has to copy them together first."""

Ready = Callable[[], object]
"""Raises where an object must not come to be after all."""
Digest = Callable[[], str]
"""Gives an object's SHA-256 in hex, once it is known."""

MAX_GET_BYTES = 1 << 31
"""Largest object that `get` reads whole unless told otherwise, in bytes."""

MAX_KEY = 512
"""Longest key below a root, in characters, all of them ASCII."""

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


def joined(data: Data | Pieces) -> Data:
    """An object's bytes in one buffer; a copy only where they lie in pieces."""
    return b"".join(data) if isinstance(data, tuple) else data


def check_key(key: str) -> str:
    """`key`, or a StoreError where it could leave the root (see `winnow.schemas.base.RelativeKey`)."""
    if len(key) > MAX_KEY or not _KEY.fullmatch(key):
        raise StoreError(f"object key {key[:80]!r} is not allowed", expected="relative, without '..'")
    return key


class ObjectStore(ABC):
    """Objects under one root. Safe to use from threads; never pickled, so that no secret travels.

    Every method raises StoreError where storage is unreachable, refuses, or is full.
    """

    uri: str
    """The root, without credentials."""
    remote = True
    """Whether reading costs a network's time, so that a local copy may pay."""

    @abstractmethod
    def put_new(
        self, key: str, data: Data | Pieces, ready: Ready | None = None, digest: Digest | None = None
    ) -> bool:
        """Create an object, in one part, durable on return.

        Args:
            key: The object.
            data: What it holds.
            ready: Called before the object can be seen, and as late as the storage allows; where it raises,
                nothing is created. For checks that can be made while the bytes get durable.
            digest: For large objects whose digest is taken anyway: storage that wants it need not take it
                again, and refuses bytes that do not have it.

        Returns:
            True: this call created it. False: something is there already, perhaps from this very
            call, whose reply was lost on the first try.
        """

    @abstractmethod
    def put(self, key: str, data: Data) -> None:
        """Create or overwrite. For run outputs and repair only, never for a dataset's hot path."""

    def version(self, key: str) -> str | None:
        """A mark that changes with the object (an ETag); None where there is no object or no mark."""
        del key
        return None

    def replace(self, key: str, data: Data, version: str | None) -> None:
        """Overwrite an object that is damaged. For repair only.

        Args:
            key: The object.
            data: What it shall hold.
            version: What `version` gave before the damage was looked at. Where the storage can, it refuses
                if the object has changed since.

        Raises:
            StoreError: Somebody else wrote the object meanwhile.
        """
        del version
        self.put(key, data)

    @abstractmethod
    def get(self, key: str, limit: int = MAX_GET_BYTES) -> bytes:
        """The whole object.

        Raises:
            MissingObject: Nothing is there.
            IntegrityError: It is longer than `limit` bytes; it was not read.
        """

    @abstractmethod
    def get_range(self, key: str, start: int, end: int) -> bytes | memoryview:
        """Bytes [start, end), exactly.

        Raises:
            MissingObject: Nothing is there.
            IntegrityError: The object ends before `end`.
        """

    @abstractmethod
    def get_ranges(self, key: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes | memoryview]:
        """Several ranges of one object, near ones in one request; errors as in `get_range`."""

    @abstractmethod
    def get_suffix(self, key: str, length: int) -> bytes | memoryview:
        """The last `length` bytes in one request; errors as in `get_range`."""

    def read_into(self, key: str, start: int, parts: Sequence[Sequence[NDArray[np.uint8]]]) -> Iterator[None]:
        """Fill buffers with the run of bytes that begins at `start`; errors as in `get_range`.

        Args:
            key: The object.
            start: Where the first part begins.
            parts: Buffers [bytes], writable, that lie one after another in the object. A buffer may be in
                several parts, to be looked at in between.

        Yields:
            Once after each part is filled, so that it can be looked at while it is in the cache.
        """
        data = np.frombuffer(
            self.get_range(key, start, start + sum(buffer.size for part in parts for buffer in part)),
            np.uint8,
        )
        done = 0
        for part in parts:
            for buffer in part:
                buffer[:] = data[done : done + buffer.size]
                done += buffer.size
            yield

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Length in bytes, or None where nothing is there."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(key, bytes) of every object in the folder `prefix` and below, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""

    @abstractmethod
    def child(self, prefix: str) -> ObjectStore:
        """The same storage, rooted at the folder `prefix`."""

    def free_bytes(self) -> int | None:
        """Bytes free for new objects, or None where the storage does not say."""
        return None

    probe_races = 4
    """Races of the probe: a server that looks first and writes later escapes each one time in twenty."""
    probe_race_bytes = 1 << 20
    """Bytes of each body in such a race."""

    def probe(self, single_writer: bool = False) -> None:
        """Check, with objects of its own, that the storage keeps what the commit relies on.

        What passed is remembered: this object does not ask again.

        Args:
            single_writer: Accept a store that ignores if-none-match.

        Raises:
            StoreError: What the store got wrong.
        """
        if single_writer not in self._passed:
            Probe(self, single_writer).run()
            self._passed |= {single_writer, True}  # what several writers may use, one may

    _passed = frozenset[bool]()
    """The `single_writer` of the probes that this store would pass."""

    def examine(self, key: Callable[[], str]) -> None:
        """Find out what else is good to know of the storage; for what has no bearing on other stores.

        Args:
            key: Gives a key to write to, which the caller removes.
        """
        del key

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.uri}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is never pickled (it may hold credentials): pass its uri")
