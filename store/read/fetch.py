"""Checked byte ranges: the one place where stored slices are fetched, and fetched again if they are bad.

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

REFETCHES = 2
"""A slice that fails its check is fetched this many times more before it counts as rotten."""
PART_BYTES = 2 * 2**20
"""Slices are received about so many bytes at a time, at least one: each time asks for the interpreter's lock,
and much more would not be in the cache any longer when it is checked."""


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
        index: Holds the unit's receipt; a void unit has no slices to fetch.
        hook: Which shard.
        unit: Which shard.
        first: The first slice.
        places: [bytes] Where the rows of each slice from the first on go, in the dtype on disk.
        cache: Looked into first, and given what storage gave.

    Returns:
        Bytes read from storage.

    Raises:
        MissingObject: The shard is not there.
        IntegrityError: A slice differs from the receipt, thrice; or the shard's length does. What is
            in place then is worthless.
    """
    crcs: list[int] = index.hooks[hook].crc32c[unit].tolist()
    starts: list[int] = index.starts(hook, unit).tolist()
    stop = first + len(places)
    beside = np.empty((len(places), 4), np.uint8)
    packed = plan.spec.compress != "none"
    payloads, together = places, max(1, PART_BYTES // places[0].size)
    if packed:  # a slice is checked and unpacked before the next one takes its place
        sizes = [starts[number + 1] - starts[number] - 4 for number in range(first, stop)]
        space = np.empty(max(sizes), np.uint8)
        payloads, together = [space[:size] for size in sizes], 1

    def buffers(number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return payloads[number - first], beside[number - first]

    def settle(number: int) -> None:
        payload, stored = buffers(number)
        promised = int.from_bytes(stored.tobytes(), "little")
        check_slice(payload, promised, crcs[number], unit=unit, hook=hook, number=number)
        if packed:
            unpack(payload, places[number - first], unit=unit, hook=hook, number=number)

    def settle_in_the_end(number: int) -> int:
        """Settle a slice, which is fetched again while it is bad; bytes read for that."""
        size = starts[number + 1] - starts[number]
        for fetched in range(REFETCHES):
            with suppress(IntegrityError):
                settle(number)
                return fetched * size
            for _ in _read(store, hook, unit, number, number + 1, starts, [buffers(number)]):
                pass
        settle(number)
        return REFETCHES * size

    def name(number: int) -> str:
        return SliceCache.name(hook, unit, number, crcs[number], payloads[number - first].size)

    def cached(number: int) -> bool:
        if not cache or not cache.read(name(number), *buffers(number)):
            return False
        try:
            settle(number)
        except IntegrityError:
            cache.drop(name(number))
            return False
        return True

    received = 0
    wanted = [number for number in range(first, stop) if not cached(number)] if cache else range(first, stop)
    for begin, end in _runs(wanted):
        parts = [range(number, min(number + together, end)) for number in range(begin, end, together)]
        received += starts[end] - starts[begin]
        filled = [[buffer for number in part for buffer in buffers(number)] for part in parts]
        reads = _read(store, hook, unit, begin, end, starts, filled)
        for part, _ in zip(parts, reads, strict=True):
            for number in part:
                received += settle_in_the_end(number)
                if cache is not None:
                    cache.keep(name(number), *buffers(number))
    return received


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as runs [first, stop) of neighbours."""
    if isinstance(numbers, range):
        yield numbers.start, numbers.stop
        return
    edges = [place for place in range(1, len(numbers)) if numbers[place] != numbers[place - 1] + 1]
    for first, stop in pairwise([0, *edges, len(numbers)] if numbers else [0]):
        yield numbers[first], numbers[stop - 1] + 1


def describe(hook: str, unit: int, first: int, stop: int) -> str:
    """`unit 3, hook 'resid_post.9', slice 7` (or `slices 0-63`), for messages."""
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
    """Slices [first, stop) into `parts`, or an error that says what is wrong with their shard."""
    key = shard_key(hook, unit)
    where = describe(hook, unit, first, stop)
    try:
        yield from store.read_into(key, starts[first], parts)
    except MissingObject as error:
        if store.size(ring_key(unit)) is not None:
            raise MissingObject(
                f"{where}: the harvest's ring has deleted the shard behind its followers",
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
