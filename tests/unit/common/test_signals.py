"""Signals that ask for a stop."""

from __future__ import annotations

import signal
import threading

import pytest

from winnow.common.signals import (
    SCHEDULER_SIGNALS,
    STOP_SIGNALS,
    interrupted_by_signals,
    stop_on_signals,
)


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


@pytest.mark.parametrize("number", SCHEDULER_SIGNALS)
def test_a_scheduler_may_repeat_itself(number):
    stopping = threading.Event()
    with stop_on_signals(stopping):
        for _ in range(3):
            signal.raise_signal(number)
        assert stopping.is_set()


def test_a_second_ctrl_c_ends_what_does_not_stop():
    stopping = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop_on_signals(stopping):
            signal.raise_signal(signal.SIGINT)
            assert stopping.is_set()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SCHEDULER_SIGNALS)
def test_elsewhere_they_are_a_ctrl_c(number):
    with pytest.raises(KeyboardInterrupt), interrupted_by_signals():
        signal.raise_signal(number)


def test_other_threads_leave_the_handlers_alone():
    found = []

    def work() -> None:
        with stop_on_signals(threading.Event()), interrupted_by_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]
