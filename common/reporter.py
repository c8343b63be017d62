"""Messages and progress of library code, shown by the process's reporter.

Library code calls `say` for a line and opens a `Progress` for long work. By default there is no reporter, so
a script or a notebook sees nothing until it asks::

    with reporting():  # plain lines on stderr
        train(config)

`set_reporter(Lines())` does the same for the rest of a session. The command line has its own reporter, with a
live bar on a terminal. Warnings go to `logging` instead, below the logger `winnow`, and are shown as that is
configured (by default: on stderr).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Protocol

from winnow.common.figures import human_rate

_PLAIN_SECONDS = 10.0
"""Interval of the plain lines of one `Progress`."""


class Display(Protocol):
    """Shows one `Progress` from its start to its end."""

    def update(self) -> None:
        """Show the current state of the work."""
        ...

    def close(self, finished: bool) -> None:
        """Show the final state; `finished` is False if an error ended the work."""
        ...


class Reporter(Protocol):
    """Shows messages and progress to people."""

    def say(self, message: str) -> None:
        """Show one line."""
        ...

    def begin(self, progress: Progress) -> Display:
        """Start showing a progress."""
        ...


# Of the process, not a context variable: a new thread starts with an empty context, so messages from a pool's
# threads would be lost.
_reporter: Reporter | None = None


def set_reporter(reporter: Reporter | None) -> Reporter | None:
    """Report to `reporter` from now on, in every thread; None is silence.

    Returns:
        The previous reporter.
    """
    global _reporter
    before, _reporter = _reporter, reporter
    return before


def say(message: str) -> None:
    """Show one line to people, if there is a reporter."""
    if _reporter is not None:
        _reporter.say(message)


class Progress:
    """Progress of long work, with rate and ETA, shown by the reporter that is set when it is entered.

    Args:
        label: Name of the work.
        total: Work in `unit`s; None if it is not known.
        unit: The rate's unit, such as `tokens`.
        done: Work finished by an earlier run: shown, but not counted in the rate.
    """

    def __init__(self, label: str, total: float | None, unit: str, done: float = 0) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self.facts = ""
        """Figures shown after the rate, such as `fvu 0.21`."""
        self._start_done, self._start = done, time.monotonic()
        self._display: Display | None = None

    @property
    def rate(self) -> float:
        """Units per second in this run."""
        # Monotonic: a clock that is set back would give a negative rate. The floor avoids a division by 0.
        return (self.done - self._start_done) / max(time.monotonic() - self._start, 1e-9)

    @property
    def eta_seconds(self) -> float | None:
        """Seconds left at this run's rate; None if they cannot be estimated."""
        if self.total is None or self.rate <= 0:
            return None
        return max(self.total - self.done, 0) / self.rate

    @property
    def line(self) -> str:
        """The current state, as plain text."""
        share = f"/{self.total:,.0f} ({self.done / self.total:.0%})" if self.total else ""
        eta = self.eta_seconds
        left = f", ETA {int(eta // 60)}:{int(eta % 60):02d}" if eta is not None else ""
        facts = f"  {self.facts}" if self.facts else ""
        return f"{self.label}: {self.done:,.0f}{share} {self.unit}, {human_rate(self.rate)}/s{left}{facts}"

    def __enter__(self) -> Progress:
        # Again, since it may be made long before the work begins.
        self._start = time.monotonic()
        self._display = _reporter.begin(self) if _reporter is not None else None
        return self

    def __exit__(self, *error: object) -> None:
        if self._display is not None:
            self._display.close(finished=error[0] is None)

    def advance(self, amount: float, **facts: object) -> None:
        """Count `amount` more units as done; `facts` are shown too (`fvu="0.21"`)."""
        self.update(self.done + amount, **facts)

    def update(self, done: float, **facts: object) -> None:
        """Set the units done in all."""
        self.done = done
        if facts:
            self.facts = " ".join(f"{key} {value}" for key, value in facts.items())
        if self._display is not None:
            self._display.update()


class Lines:
    """Prints plain lines on stderr; for each progress one about every `seconds`, and one at its end.

    Args:
        seconds: Interval of the lines of one progress.
    """

    def __init__(self, seconds: float = _PLAIN_SECONDS) -> None:
        self._seconds = seconds

    def say(self, message: str) -> None:
        """Print the line."""
        # To the current `sys.stderr`, which notebooks and tests replace; flushed, as logs are followed live.
        print(message, file=sys.stderr, flush=True)

    def begin(self, progress: Progress) -> Display:
        """See `Reporter.begin`."""
        return _PlainLines(progress, self.say, self._seconds)


class _PlainLines:
    """Shows one progress as a line now and then."""

    def __init__(self, progress: Progress, say: Callable[[str], None], seconds: float) -> None:
        self._progress, self._say, self._seconds = progress, say, seconds
        self._said_at, self._said_done = float("-inf"), -1.0

    def update(self) -> None:
        if time.monotonic() - self._said_at >= self._seconds:
            self._line()

    def close(self, finished: bool) -> None:
        # Not after an error, whose message is the last line, nor twice for the same state.
        if finished and self._progress.done != self._said_done:
            self._line()

    def _line(self) -> None:
        self._said_at, self._said_done = time.monotonic(), self._progress.done
        self._say(self._progress.line)


@contextmanager
def reporting(reporter: Reporter | None = Lines()) -> Generator[None]:
    """Report to `reporter` within the `with` block: plain lines on stderr by default, nothing if None."""
    before = set_reporter(reporter)
    try:
        yield
    finally:
        set_reporter(before)
