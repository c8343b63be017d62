"""Checked byte ranges: the only place where stored slices are fetched, and fetched again if they are bad.

Letters: D d_model, P rows in a slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.errors import IntegrityError, MissingObject
from winnow.schemas.harvest import HarvestPlan
from winnow.store.format.layout import ring_key, shard_key
from winnow.store.format.shards import INDEX_BYTES, check_slice, unpack
from winnow.store.objects import ObjectStore
from winnow.store.read.cache import SliceCache
from winnow.store.records.index import ReceiptIndex

# A bit flipped on the way is gone at the next try; one in storage is not.
_REFETCHES = 2
"""Times that a slice which fails its check is fetched again before it counts as damaged."""
# Less would ask for the interpreter's lock more often; much more would have left the CPU's cache when it is
# checked.
PART_BYTES = 2 * 2**20
"""Bytes of slices that are received at a time, about; at least one slice."""


def fetch_slices(
    store: ObjectStore,
    plan: HarvestPlan,
    index: ReceiptIndex,
    hook: str,
    unit: int,
    first: int,
    places: Sequence[NDArray[np.uint8]],
    cache: SliceCache | None = None,
) -> int:
    """Read neighbouring slices of a shard into place, each checked against the unit's receipt.

    Args:
        store: The dataset's root.
        plan: The dataset's plan.
        index: Contains the unit's receipt; a void unit has no slices to fetch.
        hook: The shard's hook.
        unit: The shard's unit.
        first: Number of the first slice.
        places: [bytes] per slice: receives its rows, in the dtype on disk.
        cache: Read first, and given what came from storage.

    Returns:
        Bytes read from storage.

    Raises:
        MissingObject: The shard does not exist.
        IntegrityError: A slice still differs from the receipt after `_REFETCHES`, or the shard's length does.
            The content of `places` is then undefined.
    """
    slices = _Slices(store, plan, index, hook, unit, first, places, cache)
    received, wanted, step = 0, range(first, first + len(places)), slices.together
    for begin, end in _runs([number for number in wanted if not slices.cached(number)] if cache else wanted):
        parts = [range(number, min(number + step, end)) for number in range(begin, end, step)]
        received += slices.starts[end] - slices.starts[begin]
        for part, _ in zip(parts, slices.read(begin, end, parts), strict=True):
            for number in part:
                received += slices.check_or_refetch(number)
                # After its check: what is wrong must not reach the cache.
                if cache is not None:
                    cache.keep(slices.name(number), *slices.buffers(number))
    return received


class _Slices:
    """Neighbouring slices of one shard on their way into place; arguments as in `fetch_slices`."""

    def __init__(
        self,
        store: ObjectStore,
        plan: HarvestPlan,
        index: ReceiptIndex,
        hook: str,
        unit: int,
        first: int,
        places: Sequence[NDArray[np.uint8]],
        cache: SliceCache | None,
    ) -> None:
        self._store, self._hook, self._unit, self._cache = store, hook, unit, cache
        self._first, self._places = first, places
        # As lists: single elements of an array are slow to take in Python.
        self._crcs: list[int] = index.hooks[hook].crc32c[unit].tolist()
        self.starts: list[int] = index.starts(hook, unit).tolist()
        """Offset of each slice of the shard, and the last one's end."""
        self._beside = np.empty((len(places), 4), np.uint8)
        self._packed = plan.spec.compress != "none"
        self._payloads, self.together = places, max(1, PART_BYTES // places[0].size)
        # Compressed slices share one buffer: each is checked and unpacked before the next one is received.
        if self._packed:
            stop = first + len(places)
            sizes = [self.starts[number + 1] - self.starts[number] - 4 for number in range(first, stop)]
            space = np.empty(max(sizes), np.uint8)
            self._payloads, self.together = [space[:size] for size in sizes], 1

    def buffers(self, number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Buffers of a slice's payload and of the crc32c stored beside it."""
        return self._payloads[number - self._first], self._beside[number - self._first]

    def name(self, number: int) -> str:
        """A slice's file in the cache."""
        size = self._payloads[number - self._first].size
        return SliceCache.name(self._hook, self._unit, number, self._crcs[number], size)

    def read(self, first: int, stop: int, parts: Sequence[range]) -> Iterator[None]:
        """Receive slices [first, stop), and yield after each part of them."""
        filled = [[buffer for number in part for buffer in self.buffers(number)] for part in parts]
        return _read(self._store, self._hook, self._unit, first, stop, self.starts, filled)

    def cached(self, number: int) -> bool:
        """Read and check a slice from the cache, if it is there; False otherwise."""
        if not self._cache or not self._cache.read(self.name(number), *self.buffers(number)):
            return False
        # A disk is trusted no more than storage. A file that is wrong would be wrong for ever: it goes.
        try:
            self._check(number)
        except IntegrityError:
            self._cache.drop(self.name(number))
            return False
        return True

    def check_or_refetch(self, number: int) -> int:
        """Check a slice, fetching it again while it is bad; return the bytes read for that."""
        size = self.starts[number + 1] - self.starts[number]
        for fetched in range(_REFETCHES):
            with suppress(IntegrityError):
                self._check(number)
                return fetched * size
            for _ in self.read(number, number + 1, [range(number, number + 1)]):
                pass
        self._check(number)
        return _REFETCHES * size

    def _check(self, number: int) -> None:
        """Check a received slice and unpack it; IntegrityError if it is wrong."""
        payload, stored = self.buffers(number)
        promised = int.from_bytes(stored.tobytes(), "little")
        unit, hook = self._unit, self._hook
        check_slice(payload, promised, self._crcs[number], unit=unit, hook=hook, number=number)
        # Only what has passed its check: a decompressor is no place for bytes that nobody vouches for.
        if self._packed:
            unpack(payload, self._places[number - self._first], unit=unit, hook=hook, number=number)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield ascending numbers as runs [first, stop) of neighbours."""
    if isinstance(numbers, range):
        yield numbers.start, numbers.stop
        return
    edges = [place for place in range(1, len(numbers)) if numbers[place] != numbers[place - 1] + 1]
    for first, stop in pairwise([0, *edges, len(numbers)] if numbers else [0]):
        yield numbers[first], numbers[stop - 1] + 1


def _name_slices(hook: str, unit: int, first: int, stop: int) -> str:
    """Name slices for messages: `unit 3, hook 'resid_post.9', slice 7` (or `slices 0-63`)."""
    slices = f"slice {first}" if stop == first + 1 else f"slices {first}-{stop - 1}"
    return f"unit {unit}, hook {hook!r}, {slices}"


def _read(
    store: ObjectStore,
    hook: str,
    unit: int,
    first: int,
    stop: int,
    starts: Sequence[int],
    parts: Sequence[Sequence[NDArray[np.uint8]]],
) -> Iterator[None]:
    """Read slices [first, stop) into `parts`; an error says what is wrong with their shard."""
    key = shard_key(hook, unit)
    where = _name_slices(hook, unit, first, stop)
    try:
        yield from store.read_into(key, starts[first], parts)
    except MissingObject as error:
        # Only after the read has failed: the hot path has no request to spare.
        if store.size(ring_key(unit)) is not None:
            raise MissingObject(
                f"{where}: the harvest's ring has deleted the shard after all followers had passed it",
                expected=key,
                fix="Harvest again without harvest.follow.ring to keep the rows",
            ) from error
        raise MissingObject(
            f"{where}: the shard is missing",
            expected=key,
            fix=f"Restore it; `winnow verify {store.uri}` says what else is missing",
        ) from error
    except IntegrityError as error:
        raise IntegrityError(
            f"{where}: {key} has another length than its receipt says",
            expected=f"{starts[-1] + INDEX_BYTES} bytes",
            got=f"{store.size(key)} bytes",
            fix=f"`winnow verify {store.uri}` says what else is damaged",
        ) from error
