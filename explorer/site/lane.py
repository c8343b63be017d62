"""One subject, many visitors: who may wait for the model, and who is told to come back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from winnow.schemas.errors import WinnowError


class Busy(WinnowError, RuntimeError):
    """As many requests as are allowed are waiting for the model."""


class Lane:
    """A queue with a limit in front of something that only one thread may use.

    A request takes a *seat* for as long as it lasts, and *turns* in between: a stream of tokens takes a turn
    for each token, so that others get theirs.

    Args:
        seats: Requests at once, waiting ones included.
    """

    def __init__(self, seats: int) -> None:
        self.seats = seats
        self._free = threading.Semaphore(seats)
        self._turn = threading.Lock()

    def sit(self) -> None:
        """Take a seat; give it back with `leave`.

        Raises:
            Busy: None is free.
        """
        if not self._free.acquire(blocking=False):
            raise Busy(
                f"The model is busy: {self.seats} requests are at work or waiting",
                fix="Try again in a few seconds",
            )

    def leave(self) -> None:
        """Give a seat back."""
        self._free.release()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the model and have it alone."""
        with self._turn:
            yield

    @contextmanager
    def visit(self) -> Iterator[None]:
        """A seat and one turn."""
        self.sit()
        try:
            with self.turn():
                yield
        finally:
            self.leave()
