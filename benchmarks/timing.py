"""Rates of a subject and of its floor, measured alternately in one process, on chosen cores."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

Rate = Callable[[], float]
"""Does its work once and returns its rate in bytes per second."""


class Taken(NamedTuple):
    """Figures of one run."""

    rate: float
    """Bytes per second."""
    own: float
    """CPU seconds of this process per byte."""
    server: float
    """CPU seconds of its children (MinIO) per byte."""


def in_turn(rounds: int, pair: Callable[[], AbstractContextManager[tuple[Rate, Rate]]]) -> dict[str, Any]:
    """Ratios of the rates of subject and floor, and of their bytes per CPU second.

    Args:
        rounds: Number of rounds of floor, subject, floor; a round's ratio is to the mean of its floors.
        pair: Makes floor and subject anew for each round.
    """
    floors: list[Taken] = []
    subjects: list[Taken] = []
    for _ in range(rounds):
        # Anew, because the pages of memory that they happen to get change either rate by a tenth for as long
        # as they keep them; around the subject, because machines drift.
        with pair() as (floor, subject):
            floors.append(_taken(floor))
            subjects.append(_taken(subject))
            floors.append(_taken(floor))
    median = statistics.median
    ratios = [
        2 * s.rate / (a.rate + b.rate) for s, a, b in zip(subjects, floors[::2], floors[1::2], strict=True)
    ]
    cpu = {
        f"{who}, {whose}": median(getattr(one, whose) for one in taken)
        for who, taken in (("floor", floors), ("subject", subjects))
        for whose in ("own", "server")
    }
    total = {who: cpu[f"{who}, own"] + cpu[f"{who}, server"] for who in ("floor", "subject")}
    return {
        "ratio": median(ratios),
        "ratios": ratios,
        "rate": median(one.rate for one in subjects),
        "floor": median(one.rate for one in floors),
        "cpu_ratio": total["floor"] / total["subject"],
        "own_cpu_ratio": cpu["floor, own"] / cpu["subject, own"],
        "cpu_s_per_gb": {which: seconds * 1e9 for which, seconds in cpu.items()},
    }


def _taken(run: Rate) -> Taken:
    cpu, wall, other = time.process_time(), time.perf_counter(), children_cpu()
    rate = run()
    size = (time.perf_counter() - wall) * rate
    return Taken(rate, (time.process_time() - cpu) / size, (children_cpu() - other) / size)


def children_cpu() -> float:
    """CPU seconds of this process's children so far, including running ones; 0 without /proc."""
    # `os.times` counts children only once they have ended, and the server still runs.
    seconds, ticks = 0.0, os.sysconf("SC_CLK_TCK")
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the last bracket: a program's name, in brackets, may contain spaces and brackets.
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            seconds += (int(fields[11]) + int(fields[12])) / ticks
    return seconds


@contextmanager
def kept_to(cores: list[int]) -> Generator[None]:
    """Keep all threads of this process, and those that they start, on some cores."""

    def settle(on: list[int]) -> None:
        # Thread by thread, because affinity belongs to a thread, not to the process.
        for task in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):  # a thread that has just ended
                os.sched_setaffinity(int(task.name), on)

    before = sorted(os.sched_getaffinity(0))
    settle(cores)
    try:
        yield
    finally:
        settle(before)
