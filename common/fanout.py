"""One read, many consumers: every consumer sees every batch of one stream, and none runs far ahead.

No thread of its own: the stream already reads in the background, and whichever consumer is in front takes
its next batch for all of them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, Self, TypeVar

from winnow.common.closing import Closing
from winnow.schemas.errors import ConfigError

T = TypeVar("T")


class Consumer(Closing, Generic[T]):
    """One of a `FanOut`'s iterators; take from it in one thread."""

    def __init__(self, owner: FanOut[T], number: int) -> None:
        self._owner, self.number = owner, number
        self.closed = False
        self.seconds_waiting = 0.0
        """Seconds spent waiting for the stream or for slower consumers."""
        self.held: deque[T] = deque()
        """Batches that wait for this consumer."""
        self.thread: int | None = None
        """Who takes from it."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        started = time.perf_counter()
        self.thread = threading.get_ident()
        try:
            return self._owner.next_for(self)
        finally:
            self.seconds_waiting += time.perf_counter() - started

    def close(self) -> None:
        """Leave: the others go on, and are no longer held back. The last one closes the stream."""
        self._owner.leave(self)


class FanOut(Closing, Generic[T]):
    """Hands each batch of a stream to several consumers of this process.

    The batches are shared, not copied: consumers must not write to them. Each has its own place, at most
    `ahead` batches in front of the slowest, who holds the others back. When the stream ends or fails, every
    consumer meets that end after the batches before it. A batch's own `step` says where a consumer stands;
    the stream's state may be `ahead` batches further.

    Args:
        stream: What `ActivationStore.stream` gave, or any iterator; it belongs to the fan-out from now on.
        consumers: How many.
        ahead: Batches that the fastest may be in front of the slowest; 1 or more.

    Raises:
        ConfigError: Fewer than one consumer or batch.
    """

    def __init__(self, stream: Iterator[T], consumers: int, ahead: int = 2) -> None:
        if consumers < 1 or ahead < 1:
            raise ConfigError(
                "fan-out", expected="consumers and ahead of 1 or more", got=f"{consumers} and {ahead}"
            )
        self._stream, self._ahead = stream, ahead
        self._changed = threading.Condition()
        self._taking = False
        self._end: BaseException | None = None
        self.consumers = tuple(Consumer(self, number) for number in range(consumers))
        """The iterators, each also a context manager."""

    def close(self) -> None:
        """Close every consumer, and the stream."""
        for consumer in self.consumers:
            consumer.close()

    def _open(self) -> list[Consumer[T]]:
        return [consumer for consumer in self.consumers if not consumer.closed]

    def next_for(self, who: Consumer[T]) -> T:
        """A consumer's next batch; called by the consumer."""
        with self._changed:
            while not self._mine(who):
                if who.held:
                    self._changed.notify_all()
                    return who.held.popleft()
                if self._end is not None:
                    raise StopIteration if isinstance(self._end, StopIteration) else self._end
                self._changed.wait()
            self._taking = True
        try:
            batch = next(self._stream)
        except BaseException as error:
            with self._changed:
                self._taking, self._end = False, error
                self._changed.notify_all()
                if who.closed:
                    raise _closed(who) from None
            raise
        with self._changed:
            self._taking = False
            for consumer in self._open():
                if consumer is not who:
                    consumer.held.append(batch)
            self._changed.notify_all()
        return batch

    def _mine(self, who: Consumer[T]) -> bool:
        """Whether `who` is to take the stream's next batch for all."""
        if who.closed:
            raise _closed(who)
        if who.held or self._end is not None or self._taking:
            return False
        full = [c for c in self._open() if len(c.held) >= self._ahead]
        for other in full:
            if other.thread == who.thread:
                raise ConfigError(
                    f"consumer {who.number} is {self._ahead} batches in front of consumer {other.number}, "
                    "which the same thread reads",
                    fix="Take from them in turn, or from a thread each",
                )
        return not full

    def leave(self, who: Consumer[T]) -> None:
        """Take a consumer out; called by the consumer."""
        with self._changed:
            if who.closed:
                return
            who.closed = True
            who.held.clear()
            last = not self._open()
            self._changed.notify_all()
        close: Any = getattr(self._stream, "close", None)
        if last and close is not None:
            close()


def _closed(who: Consumer[Any]) -> ConfigError:
    return ConfigError(f"consumer {who.number} is closed", fix="Make another fan-out of a new stream")
