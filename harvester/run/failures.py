"""What is done about units that fail: tried again, quarantined, or the harvest stops. Pure bookkeeping.

::

    what failed                          what happens
    storage                              tried again later; the unit is not to blame
    NaN, bad config                      not tried again: the same rows would come (config: stops at once)
    anything else, a dead actor          tried again, `unit_attempts` times in all, then quarantined
    `abort_after_failures` in a row      the harvest stops: the cause is not in the units
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from winnow.schemas.errors import (
    CommitUnknown,
    ConfigError,
    MissingObject,
    NonFiniteError,
    StoreError,
    WinnowError,
    WorkerError,
)
from winnow.schemas.harvest import HarvestSpec
from winnow.store.write.writer import brief

log = logging.getLogger("winnow.harvester")

CAUSE_CHARS = 500
"""Longest cause that a void receipt carries."""


class Failures:
    """One run's failures.

    Args:
        spec: How often a unit is tried, and when the harvest gives up.
        check_storage: Called when storage failed; raises where trying on is useless (a full disk).
    """

    def __init__(self, spec: HarvestSpec, check_storage: Callable[[], None] | None = None) -> None:
        self._spec, self._check_storage = spec, check_storage
        self._tries: Counter[int] = Counter()
        self._in_row = 0
        self._suspects: set[int] = set()
        self.total = 0
        """Failed attempts of this run."""
        self.quarantined: dict[int, WinnowError] = {}
        """Unit -> its last failure; these are not tried again in this run."""

    def succeeded(self, unit: int) -> None:
        """`unit` was committed."""
        self._in_row = 0
        self._suspects.discard(unit)

    def alone(self, unit: int) -> bool:
        """Whether an actor died over `unit`: it is tried alone, so that it takes no other unit with it."""
        return unit in self._suspects

    def failed(self, unit: int, error: WinnowError, *, died: bool = False) -> bool:
        """Note that an attempt failed.

        Args:
            unit: Which unit.
            error: Why.
            died: The whole actor went down, with every unit it had.

        Returns:
            Whether to try the unit again in this run.

        Raises:
            ConfigError: `error` itself, where it is one: no unit could ever be made.
            WorkerError, NonFiniteError, StoreError: Too many failures in a row.
        """
        if isinstance(error, ConfigError):
            raise error
        self.total += 1
        self._in_row += 1
        if died:
            self._suspects.add(unit)
        storage = isinstance(error, StoreError) and not isinstance(error, (MissingObject, CommitUnknown))
        if storage:
            log.warning("unit %d: storage failed, tried again later: %s", unit, error)
            if self._check_storage:
                self._check_storage()
        else:
            self._tries[unit] += 1
            given_up = isinstance(error, NonFiniteError) or self._tries[unit] >= self._spec.unit_attempts
            if given_up:
                self.quarantined[unit] = error
            done = "quarantined" if given_up else "tried again"
            log.warning("unit %d failed (%dx), %s: %s", unit, self._tries[unit], done, error)
        if self._in_row >= self._spec.abort_after_failures:
            raise self._abort(error)
        return unit not in self.quarantined

    def causes(self) -> dict[int, str]:
        """Unit -> why it is quarantined, short enough for a receipt."""
        return {unit: str(error)[:CAUSE_CHARS] for unit, error in sorted(self.quarantined.items())}

    def refusal(self, units: int) -> WinnowError:
        """What a harvest that leaves quarantined units behind ends with.

        One of NonFiniteError (exit code 2) where nothing but NaN and infinity stands in the way.
        """
        causes = self.causes()
        listed = "; ".join(f"unit {unit}: {cause}" for unit, cause in list(causes.items())[:10])
        fix = (
            "Remove the cause and run the same command again: it does these units only; or give their rows "
            "up with --accept-quarantined"
        )
        errors = list(self.quarantined.values())
        if all(isinstance(error, NonFiniteError) for error in errors):
            first = errors[0]
            others = f"{first.got}; units quarantined: {brief(sorted(causes))}"
            return NonFiniteError(first.what, expected=first.expected, got=others, fix=f"{first.fix}. {fix}")
        return WorkerError(
            f"{len(causes)} of {units} units are quarantined", expected="a receipt each", got=listed, fix=fix
        )

    def _abort(self, error: WinnowError) -> WinnowError:
        if isinstance(error, (NonFiniteError, StoreError)):
            return error
        return WorkerError(
            f"{self._in_row} attempts failed one after another, and no unit was committed between them",
            expected=f"fewer than harvest.abort_after_failures = {self._spec.abort_after_failures}",
            got=str(error),
            fix="Remove the cause and run the same command again, finished units are kept; if the units "
            "themselves are bad, raise harvest.abort_after_failures",
        )
