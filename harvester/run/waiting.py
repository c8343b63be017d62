"""Measures how long the LM of one worker works, and how long it waits for storage."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager


class StorageWait:
    """Two sums of seconds over a worker's units; safe to use from its threads.

    The LM waits for storage while a unit's tokens are read for it, and while it has nothing to do because
    units are being committed. Such a pause counts once the LM resumes: what is committed after the
    last unit delays no LM.

    Args:
        clock: Returns seconds; replaced in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock, self._clock, self._since = threading.Lock(), clock, clock()
        self._working, self._reading, self._committing = 0, 0, 0
        self._lm = self._waited = self._pause = 0.0

    def _tick(self) -> None:
        now = self._clock()
        passed, self._since = now - self._since, now
        # In this order: a commit, or a read of the next unit's tokens, that overlaps the LM delays nothing.
        if self._working:
            self._lm += passed
        elif self._reading:
            self._waited += passed
        elif self._committing:
            self._pause += passed

    def _enter(self, *, working: int = 0, reading: int = 0, committing: int = 0) -> None:
        with self._lock:
            self._tick()
            self._working += working
            self._reading += reading
            self._committing += committing
            # The LM resumes, so the pause has delayed it.
            if working + reading > 0:
                self._waited, self._pause = self._waited + self._pause, 0.0

    @contextmanager
    def lm(self) -> Generator[None]:
        """Mark the time in which the LM runs."""
        self._enter(working=1)
        try:
            yield
        finally:
            self._enter(working=-1)

    @contextmanager
    def tokens(self) -> Generator[None]:
        """Mark the time in which a unit's tokens are read for an idle LM."""
        self._enter(reading=1)
        try:
            yield
        finally:
            self._enter(reading=-1)

    @contextmanager
    def commit(self) -> Generator[None]:
        """Mark the time in which a unit is encoded and stored."""
        self._enter(committing=1)
        try:
            yield
        finally:
            self._enter(committing=-1)

    def take(self) -> tuple[float, float]:
        """Return (seconds the LM worked, seconds it waited) since the last call."""
        with self._lock:
            self._tick()
            taken = self._lm, self._waited
            self._lm = self._waited = 0.0
            return taken
