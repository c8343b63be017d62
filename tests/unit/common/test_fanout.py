"""The fan-out: every batch to everyone, nobody far ahead, nobody stopped by another's leaving."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from winnow.common.fanout import FanOut
from winnow.schemas.errors import ConfigError, IntegrityError


class Source:
    """Numbers up to `stop`, then an end; counts what was taken, and its closing."""

    def __init__(self, stop: int, error: Exception | None = None) -> None:
        self.stop, self.error, self.taken, self.closed = stop, error, 0, 0

    def __iter__(self):
        return self

    def __next__(self) -> int:
        if self.taken == self.stop:
            raise self.error or StopIteration
        self.taken += 1
        return self.taken - 1

    def close(self) -> None:
        self.closed += 1


def test_every_consumer_sees_every_batch():
    source = Source(200)
    with FanOut(source, 4) as fan, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(list, fan.consumers)) == [list(range(200))] * 4
    assert (source.taken, source.closed) == (200, 1)


def test_a_slow_consumer_holds_the_others_back():
    source = Source(50)
    fan = FanOut(source, 2, ahead=3)
    fast, slow = fan.consumers
    seen: list[int] = []
    reached = threading.Event()

    def run() -> None:
        for number in fast:
            seen.append(number)
            if len(seen) == 3:
                reached.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert reached.wait(30)
    assert next(slow) == 0  # makes room for one more
    while source.taken < 4:
        assert thread.is_alive()
    assert source.taken == 4  # a fifth would be four in front
    assert list(slow) == list(range(1, 50))
    thread.join(30)
    assert seen == list(range(50))
    assert fast.seconds_waiting > 0


def test_closing_one_does_not_stop_the_rest():
    source = Source(20)
    one, two, three = (fan := FanOut(source, 3, ahead=1)).consumers
    assert [next(c) for c in (one, two, three)] == [0, 0, 0]
    two.close()
    two.close()
    for number in range(1, 20):
        assert next(one) == next(three) == number
    with pytest.raises(ConfigError, match="consumer 1 is closed"):
        next(two)
    with pytest.raises(StopIteration):
        next(one)
    assert source.closed == 0
    fan.close()
    assert source.closed == 1


def test_closing_the_slow_one_lets_a_waiting_one_go_on():
    fan = FanOut(Source(5), 2, ahead=1)
    fast, slow = fan.consumers
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, fast)
        slow.close()
        assert rest.result(30) == [0, 1, 2, 3, 4]


def test_an_error_reaches_everyone_after_the_batches_before_it():
    fan = FanOut(Source(2, IntegrityError("unit 7 is rotten")), 3, ahead=3)
    for consumer in fan.consumers:
        assert [next(consumer), next(consumer)] == [0, 1]
        for _ in range(2):
            with pytest.raises(IntegrityError, match="unit 7"):
                next(consumer)


def test_one_thread_that_would_wait_for_itself_is_told():
    one, two = FanOut(Source(10), 2, ahead=2).consumers
    assert next(two) == 0
    assert [next(one), next(one), next(one)] == [0, 1, 2]
    with pytest.raises(ConfigError, match="2 batches in front of consumer 1, which the same thread reads"):
        next(one)
    assert [next(two), next(one)] == [1, 3]


def test_arguments():
    for consumers, ahead in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError, match="fan-out"):
            FanOut(Source(1), consumers, ahead)
