"""Holds the harvest back for the trainers that follow it, and deletes what a ring no longer needs.

States: running until the high mark is reached, then paused until no more than the low mark is held. A
paused harvest whose followers are silent for too long is parked: it ends with a message, and the same
command resumes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from winnow.common.figures import human_bytes
from winnow.common.reporter import say
from winnow.schemas.errors import ConfigError, WorkerError
from winnow.schemas.follow import FollowerPosition, FollowLimits
from winnow.schemas.harvest import HarvestPlan
from winnow.store.objects import ObjectStore
from winnow.store.read.follow import delete_unit, deleted_units, read_followers

log = logging.getLogger("winnow.harvester")

LOOK_SECONDS = 1.0
"""Seconds between two reads of the followers' positions."""


class Brake:
    """Decides whether another unit may be begun.

    Args:
        limits: The marks; None never brakes.
        store: The dataset's root.
        plan: Its plan.
        committed: Units that have a receipt already.
    """

    def __init__(
        self, limits: FollowLimits | None, store: ObjectStore, plan: HarvestPlan, committed: Iterable[int]
    ) -> None:
        self._limits, self._store, self._plan = limits, store, plan
        self._unit_bytes = sum(plan.shard_bytes(hook) for hook in plan.spec.hooks)
        # Validation units do not count: they come first and stay, so holding them back would free nothing.
        self._held = {unit for unit in committed if unit >= plan.spec.validation_units}
        self._deleted = deleted_units(store, plan) if limits and limits.ring else set[int]()
        self._followers: list[FollowerPosition] = []
        self._looked = float("-inf")
        self._beats: tuple[tuple[str, int], ...] = ()
        self._sign_of_life = time.monotonic()
        self._paused = self._warned = False

    def begin(self, unit: int) -> None:
        """Count a unit that is handed out: units in flight are held already."""
        if unit >= self._plan.spec.validation_units:
            self._held.add(unit)

    @property
    def paused(self) -> bool:
        """Whether the harvest waits for its followers."""
        return self._paused

    def may_begin(self, unit: int) -> bool:
        """Whether a unit may be handed out now; always, if it was handed out before and failed.

        Raises:
            WorkerError: The harvest is parked: no follower has shown a sign of life for too long.
            ConfigError: A follower wants more than one epoch of a ring.
        """
        limits = self._limits
        # A unit that failed is held already; keeping it back could stall a follower that waits for it, and
        # the harvest with it.
        if limits is None or unit in self._held or unit < self._plan.spec.validation_units:
            return True
        self._look(limits)
        passed = min((f.units_passed for f in self._followers), default=0)
        held = sum(1 for unit in self._held if unit >= passed) * self._unit_bytes
        high = self._high(limits)
        low = limits.high_water_bytes // 2 if limits.low_water_bytes is None else limits.low_water_bytes
        # Below the high mark by a unit at least, or a pause would never end; and if the high mark was raised
        # for a follower's groups, the low one rises with it, or the follower would wait for units as well.
        low = max(min(low, high - self._unit_bytes), high - limits.high_water_bytes)
        if self._paused:
            self._paused = held > low
        elif held + self._unit_bytes > high:
            # Silence is counted from here: while the harvest ran, nobody had to look at the followers.
            self._paused, self._sign_of_life = True, time.monotonic()
            say(f"harvest: paused, {human_bytes(held)} are stored that no follower has checkpointed yet")
        if self._paused and time.monotonic() - self._sign_of_life > limits.silence_seconds:
            self._park(limits, held)
        return not self._paused

    def _high(self, limits: FollowLimits) -> int:
        """The high mark, raised to what the followers need to make any progress."""
        need = max((f.units_ahead for f in self._followers if not f.finished), default=0) * self._unit_bytes
        if need > limits.high_water_bytes and not self._warned:
            self._warned = True
            log.warning(
                "harvest.follow.high_water_bytes is raised to %s: a follower shuffles that much together; "
                "lower its group_units to keep less",
                human_bytes(need),
            )
        return max(need, limits.high_water_bytes)

    def _look(self, limits: FollowLimits) -> None:
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        # Every free actor asks at every turn; each look is a listing and a read per follower.
        self._looked = time.monotonic()
        self._followers = read_followers(self._store, self._plan)
        # A follower is alive if its counter changes. Its time stamps would be those of another machine's
        # clock.
        beats = tuple((f.name, f.beat) for f in self._followers)
        if beats != self._beats:
            self._beats, self._sign_of_life = beats, time.monotonic()
        if limits.ring:
            self._turn()

    def _turn(self) -> None:
        """Delete what every follower has passed; validation units are kept for the evaluation at the end."""
        # Refused here, where it is first known: a second epoch would look for rows that are gone.
        for follower in self._followers:
            if follower.epochs > 1:
                raise ConfigError(
                    f"follower {follower.name} of a ring makes {follower.epochs:g} epochs",
                    expected="at most one, since rows are deleted behind it",
                    fix="Set train.epochs: 1, or harvest.follow.ring: false",
                )
        # Nothing may be deleted before the first follower has come.
        if not self._followers:
            return
        passed = min(f.units_passed for f in self._followers)
        for unit in sorted(u for u in self._held - self._deleted if u < passed):
            delete_unit(self._store, self._plan, unit)
            self._deleted.add(unit)

    def _park(self, limits: FollowLimits, held: int) -> None:
        names = ", ".join(f.name for f in self._followers) or "none has ever come"
        raise WorkerError(
            f"the harvest is parked: for {limits.silence_seconds:g} s its followers have shown no sign of "
            f"life, while {human_bytes(held)} wait for them",
            got=f"followers: {names}",
            fix="Start the training again, then the same harvest command; finished units are kept",
        )
