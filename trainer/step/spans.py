"""How a step's time is spent: marks in the step's code, timed only on the steps that are sampled.

`with sampling(device) as spans:` around a step; inside it `mark("encode")` attributes the time since
the last mark to `encode`. Outside a sampled step a mark costs one comparison.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch


class Marks(Protocol):
    """Is told of the marks in a step's code."""

    def mark(self, name: str) -> None:
        """The part `name` of the step ends here."""
        ...


class Spans:
    """Times between marks: the clock on a CPU, events on a GPU's stream."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self.mark("")

    def mark(self, name: str) -> None:
        """Attribute the time since the last mark to `name`."""
        if self._cuda:
            # recorded, not waited for: a wait at each mark would stall the stream that it measures
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def shares(self) -> dict[str, float]:
        """`share_<name>` of the time between the first and the last mark, each in [0, 1]."""
        seconds: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            seconds[name] = seconds.get(name, 0.0) + self._between(before, after)
        whole = sum(seconds.values())
        return {f"share_{name}": value / whole for name, value in seconds.items()} if whole > 0 else {}

    def _between(self, before: Any, after: Any) -> float:
        if not self._cuda:
            return after - before
        # an event has no time before the stream has reached it
        after.synchronize()
        return before.elapsed_time(after) / 1000


# not a parameter of every function in the step, and not shared with other threads
_active: ContextVar[Marks | None] = ContextVar("winnow_spans", default=None)


@contextmanager
def sampling(device: torch.device, wanted: bool = True) -> Iterator[Spans | None]:
    """Time the marks inside; if `wanted` is False, nothing."""
    spans = Spans(device) if wanted else None
    with telling(spans):
        yield spans


@contextmanager
def telling(marks: Marks | None) -> Iterator[None]:
    """Tell the marks inside to `marks`."""
    token = _active.set(marks)
    try:
        yield
    finally:
        _active.reset(token)


def mark(name: str) -> None:
    """Attribute the time since the last mark to `name`, if this step is sampled."""
    spans = _active.get()
    if spans is not None:
        spans.mark(name)
