"""The one seam to object storage: a small interface that local folders and S3 implement."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.errors import ConditionFailed, MissingObject, StoreError
from winnow.store.objects.probe import Probe

Data = bytes | bytearray | memoryview
"""Bytes that a store takes; ranges come back as `bytes` or a read-only `memoryview` without a copy."""
Pieces = tuple[Data, ...]
"""One object's bytes, in order, in several buffers: joining them would copy a whole shard."""

Ready = Callable[[], object]
"""Raises to veto the object's creation."""
Digest = Callable[[], str]
"""Returns an object's SHA-256 in hex; may wait until it is computed."""

MAX_GET_BYTES = 1 << 31
"""Largest object that `get` reads whole unless told otherwise, in bytes."""

# S3 allows 1,024 bytes for prefix and key together; the rest is left to the root's prefix.
MAX_KEY = 512
"""Longest key below a root, in characters, all of them ASCII."""

# Each turn in vain is another process's success: so many at one moment do not rewrite one object.
_UPDATES = 20
"""How often `update` tries."""

# No name begins with a dot: that rules out `..`, and leaves `.tmp` to `LocalStore`.
_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


def joined(data: Data | Pieces) -> Data:
    """Return an object's bytes in one buffer, copied only if they are in pieces."""
    return b"".join(data) if isinstance(data, tuple) else data


def check_key(key: str) -> str:
    """Return `key`; StoreError if it could leave the root (see `winnow.schemas.base.RelativeKey`)."""
    # `fullmatch`, since `$` would also match before a final newline.
    if len(key) > MAX_KEY or not _KEY.fullmatch(key):
        raise StoreError(f"object key {key[:80]!r} is not allowed", expected="relative, without '..'")
    return key


class ObjectStore(ABC):
    """Objects under one root. Safe to use from threads; never pickled, so that no secret travels.

    Every method raises StoreError if storage is unreachable, refuses, or is full.
    """

    uri: str
    """The root, without credentials."""
    remote = True
    """Whether reads cross a network, so that a local copy may pay."""

    @abstractmethod
    def put_new(
        self, key: str, data: Data | Pieces, ready: Ready | None = None, digest: Digest | None = None
    ) -> bool:
        """Create an object, in one part, durable on return.

        Args:
            key: The object's key.
            data: The object's bytes.
            ready: Called before the object becomes visible, as late as the storage allows; if it raises,
                nothing is created. For checks that can run while the bytes become durable.
            digest: SHA-256 of `data`, for large objects whose digest is computed anyway: storage that needs
                it does not compute it again, and refuses bytes that do not match.

        Returns:
            True if this call created the object. False if one exists already, perhaps created by this very
            call, whose first reply was lost.
        """

    @abstractmethod
    def put(self, key: str, data: Data) -> None:
        """Create or overwrite an object. For run outputs and repair only, never on a dataset's hot path."""

    def version(self, key: str) -> str | None:
        """Return a mark that changes with the object (an ETag); None without an object or a mark."""
        del key
        return None

    def replace(self, key: str, data: Data, version: str | None) -> None:
        """Overwrite an object that is damaged. For repair only.

        Args:
            key: The object's key.
            data: The object's new bytes.
            version: Result of `version` from before the damage was examined. Storage that can refuses if the
                object has changed since.

        Raises:
            ConditionFailed: Somebody else wrote the object meanwhile.
        """
        del version
        self.put(key, data)

    def update(self, key: str, change: Callable[[bytes | None], bytes]) -> None:
        """Rewrite an object that other processes rewrite too, such that none of their changes is lost.

        Args:
            key: The object's key.
            change: Returns the object's new bytes for those that are stored, None without an object. It is
                called again if another process has written meanwhile. Its errors are raised.

        Raises:
            ConditionFailed: Others created or removed the object at every try.
        """
        for left in range(_UPDATES, -1, -1):
            version = self.version(key)
            try:
                stored = self.get(key)
            except MissingObject:
                stored = None
            data = change(stored)
            if data == stored or (stored is None and self.put_new(key, data)):
                return
            # None: it was created since, or is gone again; or this storage has no marks.
            if stored is None or (version is None and self.version(key) is not None):
                continue
            with suppress(ConditionFailed):
                # At last without a condition, for servers that fail every one.
                self.replace(key, data, version if left else None)
                return
        raise ConditionFailed(f"{self.uri}/{key} was created or removed by others at every try")

    @abstractmethod
    def get(self, key: str, limit: int = MAX_GET_BYTES) -> bytes:
        """Read a whole object.

        Raises:
            MissingObject: It does not exist.
            IntegrityError: It is longer than `limit` bytes; it was not read.
        """

    @abstractmethod
    def get_range(self, key: str, start: int, end: int) -> bytes | memoryview:
        """Read bytes [start, end), exactly.

        Raises:
            MissingObject: The object does not exist.
            IntegrityError: The object ends before `end`.
        """

    @abstractmethod
    def get_ranges(self, key: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes | memoryview]:
        """Read several ranges of one object, near ones in one request; errors as in `get_range`."""

    @abstractmethod
    def get_suffix(self, key: str, length: int) -> bytes | memoryview:
        """Read the last `length` bytes in one request; errors as in `get_range`."""

    def read_into(self, key: str, start: int, parts: Sequence[Sequence[NDArray[np.uint8]]]) -> Iterator[None]:
        """Fill buffers with the run of bytes that begins at `start`; errors as in `get_range`.

        Args:
            key: The object's key.
            start: Offset of the first part's first byte.
            parts: Writable buffers [bytes] for consecutive bytes of the object. A buffer may be in several
                parts, if the caller uses its content in between.

        Yields:
            Once after each part is filled, so that the caller checks it while it is in the CPU's cache.
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
        """Return an object's length in bytes, or None if it does not exist."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """List (key, bytes) of every object in the folder `prefix` and below, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object if it exists."""

    @abstractmethod
    def child(self, prefix: str) -> ObjectStore:
        """Return the same storage, rooted at the folder `prefix`."""

    def free_bytes(self) -> int | None:
        """Return the bytes free for new objects, or None if the storage does not say."""
        return None

    # A server that looks first and writes later escapes one race in twenty: all four, once in 160,000 probes.
    probe_races = 4
    """Races of the probe."""
    # Bodies that take the server a while widen the gap between its look and its write.
    probe_race_bytes = 1 << 20
    """Bytes of each body in such a race."""

    def probe(self, single_writer: bool = False) -> None:
        """Check, with temporary objects, that the storage guarantees what the commit relies on.

        A passed probe is remembered and not repeated by this object.

        Args:
            single_writer: Accept a store that ignores if-none-match.

        Raises:
            StoreError: The store fails; the message names the request.
        """
        if single_writer not in self._passed:
            Probe(self, single_writer).run()
            # A store that is safe for several writers is safe for one.
            self._passed |= {single_writer, True}

    _passed = frozenset[bool]()
    """Values of `single_writer` with which this store would pass the probe."""

    def examine(self, key: Callable[[], str]) -> None:
        """Test what matters to this kind of storage only; called at the end of the probe.

        Args:
            key: Returns a new key to write to; the probe removes the object.
        """
        del key

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.uri}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is never pickled (it may hold credentials): pass its uri")
