"""A queue of bounded length in front of the one subject that all visitors share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from winnow.schemas.errors import WinnowError


class Busy(WinnowError, RuntimeError):
    """The limit of requests that use the model or wait for it is reached."""


class Lane:
    """A queue of bounded length in front of something that only one thread may use.

    A request holds a *seat* for its whole duration, and takes *turns*: a stream of tokens takes one turn per
    token, so that other requests run in between.

    Args:
        seats: Requests at a time, including those that wait.
    """

    def __init__(self, seats: int) -> None:
        self.seats = seats
        self._free = threading.Semaphore(seats)
        self._turn = threading.Lock()

    def sit(self) -> None:
        """Take a seat; `leave` gives it back.

        Raises:
            Busy: None is free.
        """
        # Refused at once instead of queued: a waiting request holds one of the server's threads, and pages
        # that need no model would stop with them.
        if not self._free.acquire(blocking=False):
            raise Busy(
                f"The model is busy: {self.seats} requests are running or waiting",
                fix="Try again in a few seconds",
            )

    def leave(self) -> None:
        """Give a seat back."""
        self._free.release()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the model and hold it exclusively."""
        with self._turn:
            yield

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Take a seat and one turn; give both back on exit."""
        self.sit()
        try:
            with self.turn():
                yield
        finally:
            self.leave()
