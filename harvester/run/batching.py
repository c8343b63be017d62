"""How many windows go through the LM at once: measured once, remembered beside the dataset.

Letters: T context length.

The rows' last bits depend on the batch shape, so a choice that is made by the clock must be made once:
the first worker of a kind of device measures and creates `batches/<device>.json`, and every worker of
that kind on this root takes what it says, also after a restart. If memory runs out later, the batch is
halved, and `batches/<device>/<windows>.json` tells the others.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from winnow.common.memory import out_of_memory
from winnow.schemas.harvest import BatchRecord, HarvestPlan
from winnow.store.format.layout import batch_key, batches_prefix
from winnow.store.objects import ObjectStore
from winnow.store.records.commit import settle
from winnow.subject.divided import DividedSubject
from winnow.subject.engine import EngineReader
from winnow.subject.load import Subject

log = logging.getLogger("winnow.harvester")

_GAIN = 1.05
"""How many times as fast a larger batch must be to be worth its memory."""
# Two, not one: a single slow measurement must not end the search.
PATIENCE = 2
"""Sizes without gain, one after another, that end the search."""
_MOST_TOKENS = 1 << 20
"""Largest batch in tokens, however fast."""
MEASURE_SECONDS = 0.2
"""Shortest time that one size is measured for."""


def smallest_best(rate: Callable[[int], float], most: int) -> tuple[int, dict[int, float]]:
    """The smallest of 1, 2, 4, ... that is as fast as any, within `_GAIN`.

    Args:
        rate: Measures a size, in tokens/s; raises torch's error if memory runs out, which ends the
            search below that size.
        most: The largest size tried.

    Returns:
        The size, and size -> tokens/s as measured.

    Raises:
        torch.OutOfMemoryError, RuntimeError: From `rate`, if not even 1 fits.
    """
    rates: dict[int, float] = {}
    size, idle = 1, 0
    while size <= most and idle < PATIENCE:
        try:
            found = rate(size)
        except RuntimeError as error:
            if not rates or not out_of_memory(error):
                raise
            break
        idle = 0 if found > _GAIN * max(rates.values(), default=0.0) else idle + 1
        rates[size] = found
        size *= 2
    # The smallest within GAIN, not the fastest: the rest of the memory is left to whoever shares the device.
    best = max(rates.values())
    return min(size for size, found in rates.items() if found * _GAIN >= best), rates


def measure_batch(
    subject: Subject | EngineReader | DividedSubject, plan: HarvestPlan
) -> tuple[int, dict[int, float]]:
    """Windows per pass with which this subject is fastest here, and tokens/s by size."""
    T = plan.spec.context_length
    vocabulary, cuda = plan.subject.vocabulary, subject.device.type == "cuda"
    # Two documents a window: attention inside documents takes a mask, and so other kernels and more memory.
    split = torch.cat([torch.arange(T // 2), torch.arange(T - T // 2)])

    # Without it the clock would measure how fast kernels are queued.
    def run(tokens: torch.Tensor) -> None:
        positions = split.expand(len(tokens), -1) if plan.spec.attend == "document" else None
        subject.activations(tokens, plan.spec.hooks, positions=positions)
        if cuda:
            torch.cuda.synchronize(subject.device)

    def rate(size: int) -> float:
        tokens = (torch.arange(size * T) % vocabulary).view(size, T)
        # Not timed: the first pass of a shape pays for more than itself.
        if cuda or size == 1:
            run(tokens)
        passes, start = 0, time.perf_counter()
        while not passes or time.perf_counter() - start < MEASURE_SECONDS:
            run(tokens)
            passes += 1
        return passes * tokens.numel() / (time.perf_counter() - start)

    most = max(1, min(plan.spec.windows_per_unit, _MOST_TOKENS // T))
    try:
        return smallest_best(rate, most)
    finally:
        # The largest size tried left its memory in torch's cache, where other actors on the card lack it.
        free_memory(subject.device)


class Batch(NamedTuple):
    """Windows per pass, and where the number comes from."""

    windows: int
    source: str
    """For people; names the record to delete for measuring again."""


def choose_batch(
    store: ObjectStore, plan: HarvestPlan, subject: Subject | EngineReader | DividedSubject, threads: int
) -> Batch:
    """The batch of this root for workers of this kind, measured if no worker has done so; see the module."""
    kind = kind_of(subject.device, threads)
    known = store.size(batch_key(kind)) is not None
    if not known:
        size, rates = measure_batch(subject, plan)
        log.info("%d windows per pass; tokens/s by size: %s", size, rates)
        record = BatchRecord(plan_fingerprint=plan.fingerprint, batch_windows=size, tokens_per_s=rates)
        settle(store, batch_key(kind), record.to_json())
    # Read back also after measuring: of two workers that measured at once, one has created the record, and
    # both must use it.
    key = batch_key(kind)
    size = BatchRecord.from_json(store.get(key), origin=f"{store.uri}/{key}").batch_windows
    names = (key.rpartition("/")[2].removesuffix(".json") for key, _ in store.list(batches_prefix(kind)))
    less = min([size, *(int(name) for name in names if name.isdecimal() and int(name) > 0)])
    # A measurement on a busy machine is kept like any other: who finds the harvest slow must learn of it.
    source, records = "as an earlier run measured" if known else "measured now", f"{store.uri}/{key}"
    if less < size:
        source = f"less than the {size} that were measured, since memory ran out"
        records += f" and {store.uri}/{batches_prefix(kind)}/"
    return Batch(less, f"{source}; to measure again, delete {records}")


def record_smaller_batch(
    store: ObjectStore, plan: HarvestPlan, device: torch.device, threads: int, to: int
) -> None:
    """Record for later workers that memory ran out and `to` windows per pass are left."""
    # A record per size, since records are create-only: the smallest one counts.
    record = BatchRecord(plan_fingerprint=plan.fingerprint, batch_windows=to)
    settle(store, batch_key(kind_of(device, threads), to), record.to_json())


def kind_of(device: torch.device, threads: int) -> str:
    """What decides the speed of a pass, as a name: `cpu-8`, `nvidia-h100-80gb-hbm3`."""
    if device.type != "cuda":
        return f"cpu-{threads}"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def free_memory(device: torch.device) -> None:
    """Give the memory in torch's cache back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
