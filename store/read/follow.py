"""Following a harvest: receipts as they come, trainers' positions, and units that a ring has deleted."""

from __future__ import annotations

import secrets
import threading
import time

from winnow.common.clock import now
from winnow.common.closing import Closing
from winnow.schemas.base import MAX_JSON_BYTES, sha256_hex
from winnow.schemas.errors import ConfigError, IntegrityError, MissingObject, StoreError
from winnow.schemas.follow import FollowerPosition, RingRecord
from winnow.schemas.harvest import HarvestPlan
from winnow.store.format.layout import FOLLOWERS_DIR, PLAN_KEY, RING_DIR, receipt_key, ring_key, shard_key
from winnow.store.format.order import LaneOrder
from winnow.store.objects import ObjectStore
from winnow.store.records.commit import list_receipts, load_receipt, settle
from winnow.store.records.index import ReceiptIndex

POLL_SECONDS = 1.0
"""Interval at which an awaited object is looked for."""
# Far below `harvest.follow.silence_seconds`: a beat or two may be lost without the harvest being parked.
BEAT_SECONDS = 10.0
"""Interval of a follower's signs of life."""


def wait_for_plan(store: ObjectStore, timeout_seconds: float) -> None:
    """Wait until the root has a plan; ConfigError after the time-out."""
    deadline = time.monotonic() + timeout_seconds
    while store.size(PLAN_KEY) is None:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"no plan appeared at {store.uri} within {timeout_seconds:g} s",
                expected=PLAN_KEY,
                got="nothing there",
                fix="Start `winnow harvest`, check the root, or raise train.follow_seconds",
            )
        time.sleep(POLL_SECONDS)


class Arrivals:
    """Adds receipts to an index while a harvest commits them. Safe to use from threads.

    Args:
        store: The dataset's root.
        plan: Its plan.
        index: Receives the receipts that are waited for.
        timeout_seconds: Longest wait in which no unit at all is committed.
    """

    def __init__(
        self, store: ObjectStore, plan: HarvestPlan, index: ReceiptIndex, timeout_seconds: float
    ) -> None:
        self._store, self._plan, self._index = store, plan, index
        self._timeout = timeout_seconds
        self._lock = threading.Lock()

    def wait(self, unit: int, stop: threading.Event | None = None) -> None:
        """Wait until a unit's receipt is in the index.

        Args:
            unit: The unit's number.
            stop: Ends the wait early, with a StoreError.

        Raises:
            MissingObject: The harvest no longer commits anything; the same command resumes later.
            IntegrityError: The receipt does not fit the plan.
        """
        stop = stop or threading.Event()
        deadline = time.monotonic() + self._timeout
        seen = -1
        while not self._index.present[unit] and not self._take(unit):
            # Any commit since is a sign of life: one slow unit, or one late in the harvest's order, is no
            # reason to give up. The first time there is no count to compare with, hence another round.
            if time.monotonic() > deadline:
                committed = len(list_receipts(self._store, self._plan))
                if committed == seen or (seen < 0 and self._timeout <= POLL_SECONDS):
                    self._give_up(unit, committed)
                seen, deadline = committed, time.monotonic() + self._timeout
            if stop.wait(POLL_SECONDS):
                raise StoreError(f"the wait for unit {unit} was interrupted")

    def _take(self, unit: int) -> bool:
        try:
            receipt = load_receipt(self._store, self._plan, unit)
        except MissingObject:
            return False
        # Looked up one by one: a listing of all receipts per unit would be a page per thousand of them.
        while self._store.size(receipt_key(unit, receipt.revision + 1)) is not None:
            receipt = load_receipt(self._store, self._plan, unit, receipt.revision + 1)
        with self._lock:
            self._index.add(receipt)
        return True

    def _give_up(self, unit: int, committed: int) -> None:
        raise MissingObject(
            f"unit {unit} has no receipt, and the harvest has committed nothing for {self._timeout:g} s",
            expected=receipt_key(unit),
            got=f"{committed} of {self._plan.units} units committed",
            fix="Start the harvest again, then this command: it resumes from its last checkpoint",
        )


# Followers


def follower_key(name: str) -> str:
    """Key of a follower's position."""
    return f"{FOLLOWERS_DIR}/{name}.json"


def units_passed(plan: HarvestPlan, order: LaneOrder, step: int) -> int:
    """Count the units, in plan order, whose rows all come before `step`; all of them after an epoch."""
    # Whole groups only: within a group rows of any unit may still come.
    place = order.locate(step)
    if place.epoch:
        return plan.units
    return plan.spec.validation_units + place.group * order.group_units


def read_followers(store: ObjectStore, plan: HarvestPlan) -> list[FollowerPosition]:
    """Read every follower's position.

    Raises:
        IntegrityError: One is damaged or follows another plan.
    """
    found: list[FollowerPosition] = []
    for key, _ in store.list(FOLLOWERS_DIR):
        position = FollowerPosition.from_json(store.get(key, MAX_JSON_BYTES), origin=f"{store.uri}/{key}")
        if position.plan_fingerprint != plan.fingerprint:
            raise IntegrityError(
                f"{store.uri}/{key}: plan_fingerprint",
                expected=plan.fingerprint,
                got=position.plan_fingerprint,
            )
        found.append(position)
    return found


class Follower(Closing):
    """A trainer's position under the root, with a thread that writes signs of life.

    Args:
        store: The dataset's root.
        plan: Its plan.
        order: The trainer's order.
        out: The run's folder; it names the follower, so that a resumed run is the same follower.
        epochs: Passes over the training split.
        sample_steps: First steps that are read together before training.
        step: Step of the checkpoint it starts from.
    """

    def __init__(
        self,
        store: ObjectStore,
        plan: HarvestPlan,
        order: LaneOrder,
        *,
        out: str,
        epochs: float,
        sample_steps: int,
        step: int,
    ) -> None:
        self._store, self._plan, self._order = store, plan, order
        # The groups of the sample, and the one that is read ahead: a harvest that paused before those are
        # committed would wait for a trainer that waits for it.
        groups = order.locate(min(sample_steps, order.steps_per_epoch - 1)).group + 2
        self._position = FollowerPosition(
            name=sha256_hex(out.encode())[:16],
            plan_fingerprint=plan.fingerprint,
            step=step,
            units_passed=units_passed(plan, order, step),
            units_ahead=groups * order.group_units,
            epochs=epochs,
            # A random start, so that a resumed follower's first beat differs from its last one.
            beat=secrets.randbelow(2**40),
        )
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="winnow-follower", daemon=True)
        self._write()
        self._thread.start()

    def at(self, step: int, *, finished: bool = False) -> None:
        """Record that a checkpoint of `step` is durable."""
        passed = self._plan.units if finished else units_passed(self._plan, self._order, step)
        self._write(step=step, units_passed=passed, finished=finished)

    def close(self) -> None:
        """Stop the signs of life."""
        self._stop.set()
        self._thread.join()

    def _write(self, **facts: object) -> None:
        with self._lock:
            # A counter and not a time: the harvest sees whether it changes, whatever the clocks say.
            facts["beat"] = self._position.beat + 1
            self._position = self._position.model_copy(update=facts)
            self._store.put(follower_key(self._position.name), self._position.to_json())

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self._write()
            except StoreError:
                continue  # the next one may get through; the harvest waits for longer than one beat


# The ring


def delete_unit(store: ObjectStore, plan: HarvestPlan, unit: int) -> None:
    """Record that a unit's shards are deleted, then delete them; safe to repeat. For the driver only."""
    # The record first: a reader that misses the shard, or `verify`, must never take it for a loss.
    keys = tuple(shard_key(hook, unit) for hook in plan.spec.hooks)
    record = RingRecord(plan_fingerprint=plan.fingerprint, unit=unit, keys=keys, deleted=now())
    settle(store, ring_key(unit), record.to_json())
    for key in keys:
        store.delete(key)


def deleted_units(store: ObjectStore, plan: HarvestPlan) -> set[int]:
    """List the units whose shards a ring has deleted, or was about to."""
    names = (key.removeprefix(f"{RING_DIR}/").removesuffix(".json") for key, _ in store.list(RING_DIR))
    units = {int(name) for name in names if name.isdecimal()}
    return {unit for unit in units if unit < plan.units}
