"""Checked byte ranges: the one place where stored slices are fetched, and fetched again if they are bad.

Letters: D d_model, P rows in a slice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import IntegrityError, MissingObject
from schemas.harvest import HarvestPlan
from store.index import ReceiptIndex
from store.layout import shard_key, slice_bytes, slice_range
from store.objects import Data, ObjectStore
from store.shards import decode_slices

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
    take: Callable[[int, NDArray[Any]], None],
) -> int:
    """Read neighbouring slices of a shard, each checked against the unit's receipt.

    Args:
        store: The dataset's root.
        plan: The dataset's plan.
        index: Holds the unit's receipt; a void unit has no slices to fetch.
        hook: Which shard.
        unit: Which shard.
        first: The first slice.
        stop: One past the last slice.
        take: Called with each slice's number and its rows [P, D], a read-only view that is valid during
            the call.

    Returns:
        Bytes read from storage.

    Raises:
        MissingObject: The shard is not there.
        IntegrityError: A slice differs from the receipt, thrice; or the shard's length does.
    """
    crcs: list[int] = index.hooks[hook].crc32c[unit].tolist()
    size = slice_bytes(plan, hook)
    data = np.frombuffer(_read(store, plan, hook, unit, first, stop), np.uint8)
    received = data.size
    for number in range(first, stop):
        start = (number - first) * size
        piece: Data = data[start : start + size].data
        for left in range(REFETCHES, -1, -1):
            try:
                rows = decode_slices(piece, number, number + 1, plan=plan, hook=hook, unit=unit, crc=crcs)
            except IntegrityError:
                if not left:
                    raise
                piece = _read(store, plan, hook, unit, number, number + 1)
                received += len(piece)
            else:
                take(number, rows[0])
                break
    return received


def describe(hook: str, unit: int, first: int, stop: int) -> str:
    """`unit 3, hook 'resid_post.9', slice 7` (or `slices 0-63`), for messages."""
    slices = f"slice {first}" if stop == first + 1 else f"slices {first}-{stop - 1}"
    return f"unit {unit}, hook {hook!r}, {slices}"


def _read(store: ObjectStore, plan: HarvestPlan, hook: str, unit: int, first: int, stop: int) -> Data:
    """The bytes of slices [first, stop), or an error that says what is wrong with their shard."""
    key = shard_key(hook, unit)
    start, end = slice_range(plan, hook, first, stop)
    where = describe(hook, unit, first, stop)
    try:
        data = store.get_range(key, start, end)
    except MissingObject as error:
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
    if len(data) != end - start:
        raise IntegrityError(
            f"{where}: a range of {key} came back with another length",
            expected=f"{end - start} bytes",
            got=f"{len(data)} bytes",
        )
    return data
