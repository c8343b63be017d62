"""Checked byte ranges: the one place where stored slices are fetched, and fetched again if they are bad.

Letters: D d_model, P rows in a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import IntegrityError, MissingObject
from schemas.harvest import HarvestPlan
from store.index import ReceiptIndex
from store.layout import ring_key, shard_key, slice_bytes, slice_range
from store.objects import ObjectStore
from store.shards import check_slice

REFETCHES = 2
"""A slice that fails its check is fetched this many times more before it counts as rotten."""


def fetch_slices(
    store: ObjectStore,
    plan: HarvestPlan,
    index: ReceiptIndex,
    hook: str,
    unit: int,
    first: int,
    stop: int,
    place: Callable[[int], NDArray[Any]],
) -> int:
    """Read neighbouring slices of a shard into place, each checked against the unit's receipt.

    Args:
        store: The dataset's root.
        plan: The dataset's plan.
        index: Holds the unit's receipt; a void unit has no slices to fetch.
        hook: Which shard.
        unit: Which shard.
        first: The first slice.
        stop: One past the last slice.
        place: A slice's number -> where its rows go: contiguous [P, D] in the dtype on disk.

    Returns:
        Bytes read from storage.

    Raises:
        MissingObject: The shard is not there.
        IntegrityError: A slice differs from the receipt, thrice; or the shard's length does. What is
            in place then is worthless.
    """
    crcs: list[int] = index.hooks[hook].crc32c[unit].tolist()
    beside = np.empty(4, np.uint8)
    payloads = [place(number).reshape(-1).view(np.uint8) for number in range(first, stop)]
    received = (stop - first) * slice_bytes(plan, hook)
    reads = _read(store, plan, hook, unit, first, stop, [(payload, beside) for payload in payloads])
    for number, payload, _ in zip(range(first, stop), payloads, reads, strict=True):
        for left in range(REFETCHES, -1, -1):
            stored = int.from_bytes(beside.tobytes(), "little")
            try:
                check_slice(payload, stored, crcs[number], unit=unit, hook=hook, number=number)
                break
            except IntegrityError:
                if not left:
                    raise
            for _ in _read(store, plan, hook, unit, number, number + 1, [(payload, beside)]):
                received += slice_bytes(plan, hook)
    return received


def describe(hook: str, unit: int, first: int, stop: int) -> str:
    """`unit 3, hook 'resid_post.9', slice 7` (or `slices 0-63`), for messages."""
    slices = f"slice {first}" if stop == first + 1 else f"slices {first}-{stop - 1}"
    return f"unit {unit}, hook {hook!r}, {slices}"


def _read(
    store: ObjectStore,
    plan: HarvestPlan,
    hook: str,
    unit: int,
    first: int,
    stop: int,
    parts: Sequence[Sequence[NDArray[np.uint8]]],
) -> Iterator[None]:
    """Slices [first, stop) into `parts`, or an error that says what is wrong with their shard."""
    key = shard_key(hook, unit)
    where = describe(hook, unit, first, stop)
    try:
        yield from store.read_into(key, slice_range(plan, hook, first, stop)[0], parts)
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
            expected=f"{plan.shard_bytes(hook)} bytes",
            got=f"{store.size(key)} bytes",
            fix=f"`winnow verify {store.uri}` says what else is damaged",
        ) from error
