"""Signals that ask a process to stop: Ctrl-C, and what schedulers and service managers send."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import FrameType

# SIGUSR1 is what SLURM is usually told to send before the time limit (`--signal=USR1@300`). Its default
# action is to end the process, so there is nothing else that it could mean here.
SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Sent by programs: schedulers, service managers."""
STOP_SIGNALS = (signal.SIGINT, *SCHEDULER_SIGNALS)
"""Also by people."""


@contextmanager
def stop_on_signals(
    stopping: threading.Event, numbers: Sequence[signal.Signals] = STOP_SIGNALS
) -> Generator[None]:
    """Set an event at the first of these signals; a second SIGINT acts as usual.

    Further SIGTERM and SIGUSR1 change nothing until the block ends.

    Args:
        stopping: The event.
        numbers: The signals.
    """
    # Python sets handlers in the main thread only; elsewhere (a worker's threads) the event stays unset.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}

    # An impatient second Ctrl-C ends a run that does not stop. A scheduler repeats itself for another reason:
    # SLURM sends SIGTERM when the grace time begins and when it ends, while a checkpoint may be written.
    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        stopping.set()
        if signal.SIGINT in before:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupted_by_signals() -> Generator[None]:
    """Let SIGTERM and SIGUSR1 raise KeyboardInterrupt, as Ctrl-C does, until the block ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SCHEDULER_SIGNALS}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
