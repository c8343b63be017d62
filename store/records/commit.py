"""The commit: create-only puts whose outcome is settled by reading back what is stored.

The same table serves plan, receipts and manifest::

    put says      read back    outcome
    created       -            ours
    exists        found        found: ours (its reply was lost) or another's; the caller compares
    error         found        found: as above
    any           absent       put again, a bounded number of times, then the error
    any           unreadable   CommitUnknown: nothing is deleted, the next attempt settles it
"""

from __future__ import annotations

import re

from winnow.schemas.base import MAX_JSON_BYTES
from winnow.schemas.errors import CommitUnknown, IntegrityError, MissingObject, StoreError
from winnow.schemas.harvest import HarvestPlan, UnitReceipt
from winnow.store.format.layout import RECEIPTS_DIR, receipt_key
from winnow.store.objects import Data, ObjectStore
from winnow.store.records.index import check_receipt

# Not a retry of requests, which the object store's client owns: a second look at an outcome that was unclear.
PUT_TRIES = 3
"""Puts of one object before the error is raised."""

RECEIPT_KEY = re.compile(rf"{RECEIPTS_DIR}/(\d{{8,}})(?:\.r([1-9]\d*))?\.json")
"""Keys of receipts: unit, and revision if it is not 0."""


def settle(store: ObjectStore, key: str, body: Data) -> bytes | None:
    """Put create-only and find out what is stored at `key`.

    Returns:
        None if this call certainly created the object; otherwise the stored bytes, perhaps `body` itself.

    Raises:
        CommitUnknown: The outcome could be neither confirmed nor denied.
        StoreError: Every put was refused and nothing is stored.
    """
    failure: StoreError | None = None
    for _ in range(PUT_TRIES):
        try:
            if store.put_new(key, body):
                return None
            failure = None
        except StoreError as error:
            failure = error
        # After "exists" as well as after an error: either may be our own success, whose reply was lost.
        try:
            return store.get(key)
        except MissingObject:
            continue
        # Neither put again nor deleted: by now another process may rely on what we cannot see.
        except StoreError as error:
            raise CommitUnknown(
                f"whether {store.uri}/{key} was written is unknown",
                got=str(failure or error),
                fix="Run the same command again: it settles this first and repeats no finished work",
            ) from error
    raise failure or StoreError(
        f"{store.uri}/{key} can neither be created nor read",
        got="'already exists' from the put, 'absent' from the read",
        fix="Use a store with read-after-write consistency",
    )


def commit_receipt(store: ObjectStore, plan: HarvestPlan, receipt: UnitReceipt) -> UnitReceipt:
    """Put a receipt; the unit is part of the dataset once this returns.

    Returns:
        The stored receipt: `receipt`, or an earlier valid one for the same plan and unit.

    Raises:
        CommitUnknown: The outcome could not be read.
        IntegrityError: The stored object is no receipt of this plan and unit.
    """
    # Before the put: a receipt that does not fit could be neither overwritten nor deleted.
    check_receipt(plan, receipt)
    key = receipt_key(receipt.unit, receipt.revision)
    found = settle(store, key, receipt.to_json())
    if found is None:
        return receipt
    return parse_receipt(found, plan, receipt.unit, receipt.revision, origin=f"{store.uri}/{key}")


def parse_receipt(data: bytes, plan: HarvestPlan, unit: int, revision: int, *, origin: str) -> UnitReceipt:
    """Parse stored bytes as the receipt of this plan, unit and revision; IntegrityError otherwise."""
    # A receipt that was copied to another unit's key fits the plan all the same.
    receipt = UnitReceipt.from_json(data, origin=origin)
    if (receipt.unit, receipt.revision) != (unit, revision):
        raise IntegrityError(
            f"{origin} is the receipt of something else",
            expected=f"unit {unit}, revision {revision}",
            got=f"unit {receipt.unit}, revision {receipt.revision}",
        )
    check_receipt(plan, receipt)
    return receipt


def load_receipt(store: ObjectStore, plan: HarvestPlan, unit: int, revision: int = 0) -> UnitReceipt:
    """Read one receipt and check it against the plan.

    Raises:
        MissingObject: The unit has no such receipt.
        IntegrityError: It is damaged or belongs to something else.
    """
    key = receipt_key(unit, revision)
    data = store.get(key, MAX_JSON_BYTES)
    return parse_receipt(data, plan, unit, revision, origin=f"{store.uri}/{key}")


def list_receipts(store: ObjectStore, plan: HarvestPlan) -> dict[int, int]:
    """Find unit -> highest revision of its receipt, for every unit that has one, by listing only."""
    # Keys that are not exactly as we write them (other digits, a unit beyond the plan) are strays.
    found: dict[int, int] = {}
    for key, _ in store.list(RECEIPTS_DIR):
        match = RECEIPT_KEY.fullmatch(key)
        if match and int(match[1]) < plan.units and key == receipt_key(int(match[1]), int(match[2] or 0)):
            found[int(match[1])] = max(found.get(int(match[1]), 0), int(match[2] or 0))
    return found
