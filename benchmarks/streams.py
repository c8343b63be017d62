"""Rates of streams over those of their floors (`benchmarks.floors`)."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.floors import HOOK, SEED, Gets, Loop
from benchmarks.servers import s3_root
from benchmarks.timing import in_turn, kept_to
from winnow.schemas.harvest import HarvestPlan
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.store.objects.s3_store import S3Store
from winnow.store.testing import write_dataset


class SteadyStream:
    """One endless stream; each call reads an epoch and returns its rate in stored bytes per second."""

    def __init__(self, store: ActivationStore, options: argparse.Namespace, dtype: Any = "stored") -> None:
        self.stream = store.stream(
            HOOK,
            batch_rows=options.batch_rows,
            seed=SEED,
            group_units=options.group_units,
            prefetch=options.prefetch,
            dtype=dtype,
        )
        self.row_bytes = 2 * options.d_model
        # The first epoch starts threads and buffers; training is measured in the steady state.
        self()

    def __call__(self) -> float:
        """Read an epoch."""
        started = time.perf_counter()
        rows = 0
        for _ in range(self.stream.order.steps_per_epoch):
            rows += len(next(self.stream).weights)
        return rows * self.row_bytes / (time.perf_counter() - started)

    def close(self) -> None:
        """Close the stream."""
        self.stream.close()


def cheap_rows(plan: HarvestPlan, unit: int, hook: str) -> np.ndarray:
    """Rows that are cheap to make and differ from unit to unit."""
    # Not random: only the bytes count, and random numbers are slow to draw.
    shape = (plan.rows_per_unit, plan.d_model(hook))
    column = np.arange(shape[0], dtype=np.float32)[:, None] / shape[0] + unit
    return np.broadcast_to(column, shape) * np.linspace(1, 2, shape[1], dtype=np.float32)


def local_stream(root: str, plan: HarvestPlan, options: argparse.Namespace) -> dict[str, Any]:
    """`local_stream_over_loop`, and the rate of bare reads."""
    write_dataset(open_store(root), plan, cheap_rows)
    store = ActivationStore.open(root)

    @contextmanager
    def pair(dtype: Literal["stored", "float32"]) -> Generator[tuple[Loop, SteadyStream]]:
        floor, subject = Loop(Path(root), plan, options), SteadyStream(store, options, dtype)
        with closing(floor), closing(subject):
            yield floor, subject

    with closing(Loop(Path(root), plan, options)) as loop:
        bare = statistics.median(loop(read_only=True) for _ in range(options.rounds))
    found = in_turn(options.rounds, lambda: pair("stored"))
    widened = in_turn(options.rounds, lambda: pair("float32"))
    return {
        "local_stream_float32_over_loop": widened["ratio"],
        "local_stream_float32_over_loop_cpu": widened["cpu_ratio"],
        "local_stream_over_loop": found["ratio"],
        "local_stream_over_loop_rounds": found["ratios"],
        "local_stream_over_loop_cpu": found["cpu_ratio"],
        "local_stream_cpu_s_per_gb": found["cpu_s_per_gb"],
        "local_stream_bytes_per_s": found["rate"],
        "loop_bytes_per_s": found["floor"],
        "pread_bytes_per_s": bare,
    }


def s3_streams(plan: HarvestPlan, options: argparse.Namespace) -> dict[str, Any]:
    """`s3_stream_over_get` with the server on cores of its own, and `s3_shared_...` with it on all of ours.

    A server that the environment names runs on its own machine, and is measured once.
    """
    result: dict[str, Any] = {}
    cores = sorted(os.sched_getaffinity(0))
    here, there = cores[: len(cores) // 2], cores[len(cores) // 2 :]
    outside = bool(os.environ.get("AWS_ENDPOINT_URL"))
    # On all cores first: obstore starts as many threads as there are cores when it is first used.
    with s3_root() as root:
        if root is not None:
            result |= s3_stream(f"{root}/data", plan, options, "s3" if outside else "s3_shared", least=True)
    if result and here and not outside:
        with s3_root(there) as root, kept_to(here):
            result |= s3_stream(f"{root}/data", plan, options, "s3")
    return result


def s3_stream(
    root: str, plan: HarvestPlan, options: argparse.Namespace, name: str, *, least: bool = False
) -> dict[str, Any]:
    """A stream from S3 over bare gets, and with `least` the least work over them."""
    objects = open_store(root)
    assert isinstance(objects, S3Store)
    write_dataset(objects, plan, cheap_rows)
    store = ActivationStore.open(root)

    @contextmanager
    def pair(least: bool) -> Generator[tuple[Gets, Gets | SteadyStream]]:
        floor = Gets(objects, plan, options)
        subject = Gets(objects, plan, options, least=True) if least else SteadyStream(store, options)
        with closing(floor), closing(subject):
            yield floor, subject

    found = in_turn(options.rounds, lambda: pair(False))
    result = {
        f"{name}_stream_over_get": found["ratio"],
        f"{name}_stream_over_get_cpu": found["cpu_ratio"],
        f"{name}_stream_over_get_own_cpu": found["own_cpu_ratio"],
        f"{name}_cpu_s_per_gb": found["cpu_s_per_gb"],
        f"{name}_stream_over_get_rounds": found["ratios"],
        f"{name}_stream_bytes_per_s": found["rate"],
        f"{name}_get_bytes_per_s": found["floor"],
    }
    if least:
        beside = in_turn(options.rounds, lambda: pair(True))
        result |= {
            f"{name}_least_over_get": beside["ratio"],
            f"{name}_least_over_get_cpu": beside["cpu_ratio"],
            f"{name}_least_over_get_rounds": beside["ratios"],
        }
    return result
