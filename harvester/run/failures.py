"""Decides what happens to units that fail: retry, quarantine, or the end of the harvest. Pure bookkeeping.

::

    what failed                          what happens
    storage                              retried later; it is not the unit's fault
    NaN                                  quarantined at once: the same rows would come again
    bad config                           the harvest stops at once
    anything else, a dead actor          tried `unit_attempts` times in all, then quarantined
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

# A message may quote a library's error at any length, and every reader of the dataset loads the receipts.
CAUSE_CHARS = 500
"""Longest cause that a void receipt records."""


class Failures:
    """One run's failures.

    Args:
        spec: How often a unit is tried, and when the harvest gives up.
        check_storage: Called when storage failed; raises if a retry is useless (a full disk).
    """

    def __init__(self, spec: HarvestSpec, check_storage: Callable[[], None] | None = None) -> None:
        self._spec, self._check_storage = spec, check_storage
        self._tries: Counter[int] = Counter()
        self._in_row = 0
        self._suspects: set[int] = set()
        self.total = 0
        """Failed attempts of this run."""
        self.quarantined: dict[int, WinnowError] = {}
        """Unit -> its last failure; not tried again in this run."""

    def succeeded(self, unit: int) -> None:
        """Note that `unit` was committed."""
        self._in_row = 0
        self._suspects.discard(unit)

    def alone(self, unit: int) -> bool:
        """Whether an actor died over `unit`: it is retried alone, so that it takes no other unit with it."""
        return unit in self._suspects

    def failed(self, unit: int, error: WinnowError, *, died: bool = False) -> bool:
        """Note that an attempt failed.

        Args:
            unit: Which unit.
            error: Why.
            died: The whole actor died, with every unit it had.

        Returns:
            Whether to try the unit again in this run.

        Raises:
            ConfigError: `error` itself, if it is one: no unit could be computed.
            WorkerError, NonFiniteError, StoreError: Too many failures in a row.
        """
        if isinstance(error, ConfigError):
            raise error
        self.total += 1
        self._in_row += 1
        # All units of the dead actor become suspects, since nobody knows which of them killed it: tried
        # alone, the guilty one stands out.
        if died:
            self._suspects.add(unit)
        # An object that is missing, or a put whose outcome nobody can read, belongs to this unit and may stay
        # so.
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
        # Last, so that storage failures count here too: an outage would otherwise be retried for ever.
        if self._in_row >= self._spec.abort_after_failures:
            raise self._abort(error)
        return unit not in self.quarantined

    def causes(self) -> dict[int, str]:
        """The cause of each quarantined unit, short enough for a receipt."""
        return {unit: str(error)[:CAUSE_CHARS] for unit, error in sorted(self.quarantined.items())}

    def refusal(self, units: int) -> WinnowError:
        """The error that a harvest with quarantined units ends with.

        A NonFiniteError (exit code 2) if only NaN and infinity prevent the seal.
        """
        causes = self.causes()
        listed = "; ".join(f"unit {unit}: {cause}" for unit, cause in list(causes.items())[:10])
        fix = (
            "Remove the cause and run the same command again: it does these units only; or give their rows "
            "up with --accept-quarantined"
        )
        errors = list(self.quarantined.values())
        # The one case that the same command cannot mend without another config, hence the other exit code.
        if all(isinstance(error, NonFiniteError) for error in errors):
            first = errors[0]
            others = f"{first.got}; units quarantined: {brief(sorted(causes))}"
            return NonFiniteError(first.what, expected=first.expected, got=others, fix=f"{first.fix}. {fix}")
        return WorkerError(
            f"{len(causes)} of {units} units are quarantined", expected="a receipt each", got=listed, fix=fix
        )

    def _abort(self, error: WinnowError) -> WinnowError:
        # These say themselves what to do, and have exit codes of their own.
        if isinstance(error, (NonFiniteError, StoreError)):
            return error
        return WorkerError(
            f"{self._in_row} attempts failed one after another, and no unit was committed between them",
            expected=f"fewer than harvest.abort_after_failures = {self._spec.abort_after_failures}",
            got=str(error),
            fix="Remove the cause and run the same command again, finished units are kept; if the units "
            "themselves are bad, raise harvest.abort_after_failures",
        )
