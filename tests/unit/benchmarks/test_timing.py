"""The benchmarks' own clock."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

import pytest

from benchmarks.timing import Rate, in_turn, kept_to


def test_a_ratio_is_to_the_floors_around_it_and_each_round_has_its_own():
    rates = iter([2.0, 3.0, 4.0, 1.0, 5.0, 1.0, 10.0, 1.0, 10.0])
    made: list[int] = []

    def rate() -> float:
        time.process_time()
        return next(rates)

    @contextmanager
    def pair() -> Generator[tuple[Rate, Rate]]:
        made.append(len(made))
        yield rate, rate

    found = in_turn(3, pair)
    assert found["ratios"] == [1.0, 5.0, 0.1]
    assert (found["ratio"], found["rate"], found["floor"]) == (1.0, 3.0, 3.0)
    assert made == [0, 1, 2]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_all_threads_keep_to_some_cores_and_are_let_go_again():
    before = os.sched_getaffinity(0)
    found: list[set[int]] = []
    go = threading.Event()
    waiting = threading.Thread(target=lambda: (go.wait(), found.append(os.sched_getaffinity(0))))
    waiting.start()
    with kept_to([min(before)]):
        go.set()
        waiting.join()
        later = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
        later.start()
        later.join()
    assert found == [{min(before)}] * 2
    assert os.sched_getaffinity(0) == before
