"""A folder that only one rank of a mesh writes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from winnow.store.objects import Data, Digest, ObjectStore, Pieces, Ready


# so that every rank runs the same code: none of it asks who may write, and only the leading rank's store does
class Witness(ObjectStore):
    """A folder that another rank writes to: reads are unchanged, writes do nothing.

    Args:
        store: The folder.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store, self.uri = store, store.uri

    def put_new(
        self, key: str, data: Data | Pieces, ready: Ready | None = None, digest: Digest | None = None
    ) -> bool:
        """Nothing."""
        del key, data, ready, digest
        # as if it had been created: the caller then proceeds as the rank that writes does
        return True

    def put(self, key: str, data: Data) -> None:
        """Nothing."""
        del key, data

    def delete(self, key: str) -> None:
        """Nothing."""
        del key

    def get(self, key: str, limit: int = 1 << 31) -> bytes:
        """See `ObjectStore.get`."""
        return self._store.get(key, limit)

    def get_range(self, key: str, start: int, end: int) -> bytes | memoryview:
        """See `ObjectStore.get_range`."""
        return self._store.get_range(key, start, end)

    def get_ranges(self, key: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes | memoryview]:
        """See `ObjectStore.get_ranges`."""
        return self._store.get_ranges(key, starts, ends)

    def get_suffix(self, key: str, length: int) -> bytes | memoryview:
        """See `ObjectStore.get_suffix`."""
        return self._store.get_suffix(key, length)

    def size(self, key: str) -> int | None:
        """See `ObjectStore.size`."""
        return self._store.size(key)

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """See `ObjectStore.list`."""
        return self._store.list(prefix)

    def child(self, prefix: str) -> ObjectStore:
        """See `ObjectStore.child`."""
        # a folder inside it is no more this rank's to write
        return Witness(self._store.child(prefix))
