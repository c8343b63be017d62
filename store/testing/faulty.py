"""A store that fails on purpose, and damage to single objects."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, TypeVar

from winnow.schemas.errors import MissingObject, StoreError
from winnow.store.objects import MAX_GET_BYTES, Data, Digest, ObjectStore, Pieces, Ready, joined

T = TypeVar("T")


class Crash(BaseException):
    """The process dies here; only a test catches it."""

    # A BaseException: `except Exception` in the code under test must not survive its own death.


class FaultyStore(ObjectStore):
    """A store around another one, whose n-th call fails.

    Calls are counted from 1 over all methods that reach storage; `calls` lists them, so that a clean run
    shows how many crash points there are.

    Args:
        inner: The real store.
        faults: Call number -> a name of `FAULTS`.
    """

    FAULTS: ClassVar[Mapping[str, str]] = {
        "crash_before": "Crash; storage never saw the call",
        "crash_after": "Crash; the call took effect",
        "error_before": "StoreError; storage never saw the call",
        "error_after": "StoreError although the call took effect",
        "lost_reply": "a create-only put succeeds, is retried below, and says 'already exists'",
        "truncate": "a put stores half of the bytes and succeeds",
        "absent": "a read says the object is missing",
    }

    def __init__(self, inner: ObjectStore, faults: Mapping[int, str] | None = None) -> None:
        unknown = set((faults or {}).values()) - set(self.FAULTS)
        if unknown:
            raise ValueError(f"no such faults: {sorted(unknown)}")
        self.inner, self.faults, self.uri = inner, dict(faults or {}), inner.uri
        self.calls: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def _before(self, name: str, key: str) -> str | None:
        with self._lock:
            self.calls.append((name, key))
            fault = self.faults.get(len(self.calls))
        if fault == "crash_before":
            raise Crash(name, key)
        if fault == "error_before":
            raise StoreError(f"injected before {name} {key}")
        if fault == "absent":
            raise MissingObject(f"injected: {key} does not exist")
        return fault

    def _after(self, fault: str | None, name: str, key: str) -> None:
        if fault == "crash_after":
            raise Crash(name, key)
        if fault == "error_after":
            raise StoreError(f"injected after {name} {key}")

    def _call(self, name: str, key: str, act: Callable[[], T]) -> T:
        fault = self._before(name, key)
        result = act()
        self._after(fault, name, key)
        return result

    def put_new(
        self, key: str, data: Data | Pieces, ready: Ready | None = None, digest: Digest | None = None
    ) -> bool:
        """See `ObjectStore.put_new`."""
        # In one buffer: a fault may hand on half of the bytes.
        data = joined(data)
        fault = self._before("put_new", key)
        if fault == "truncate":
            # Without the digest, which the half does not have: S3 would refuse it.
            created = self.inner.put_new(key, _half(data), ready)
        else:
            created = self.inner.put_new(key, data, ready, digest)
        self._after(fault, "put_new", key)
        return created and fault != "lost_reply"

    def put(self, key: str, data: Data) -> None:
        """See `ObjectStore.put`."""
        fault = self._before("put", key)
        self.inner.put(key, _half(data) if fault == "truncate" else data)
        self._after(fault, "put", key)

    def get(self, key: str, limit: int = MAX_GET_BYTES) -> bytes:
        """See `ObjectStore.get`."""
        return self._call("get", key, lambda: self.inner.get(key, limit))

    def get_range(self, key: str, start: int, end: int) -> bytes | memoryview:
        """See `ObjectStore.get_range`."""
        return self._call("get_range", key, lambda: self.inner.get_range(key, start, end))

    def get_ranges(self, key: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes | memoryview]:
        """See `ObjectStore.get_ranges`."""
        return self._call("get_ranges", key, lambda: self.inner.get_ranges(key, starts, ends))

    def get_suffix(self, key: str, length: int) -> bytes | memoryview:
        """See `ObjectStore.get_suffix`."""
        return self._call("get_suffix", key, lambda: self.inner.get_suffix(key, length))

    def size(self, key: str) -> int | None:
        """See `ObjectStore.size`."""
        return self._call("size", key, lambda: self.inner.size(key))

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """See `ObjectStore.list`."""
        return self._call("list", prefix, lambda: self.inner.list(prefix))

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        self._call("delete", key, lambda: self.inner.delete(key))

    def child(self, prefix: str) -> ObjectStore:
        """The inner store's child, without faults."""
        return self.inner.child(prefix)


def _half(data: Data) -> bytes:
    return bytes(data)[: len(data) // 2]


def flip_bit(store: ObjectStore, key: str, byte: int) -> None:
    """Flip the lowest bit of one byte of a stored object; a negative `byte` counts from the end."""
    body = bytearray(store.get(key))
    body[byte] ^= 1
    store.put(key, body)
