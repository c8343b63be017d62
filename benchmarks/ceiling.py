"""What a fast GPU would meet: the harvest's whole path to S3 with a subject that costs nothing.

Driver, Ray actor, tokens, permutation, encoding, digests, statistics, puts and receipts are the real ones;
only the subject hands out rows that were computed beforehand. The floor puts the same shard bytes with
bare `obstore.put` from as many threads as an actor commits with, before and after each harvest. Units are
of 75 MB, as a small user's; their receipts carry moments, as those of a dataset's first 16 units do.

What was found (CPU ms of a unit of 19 MB, 2 cores of an EPYC under load): making its rows took 97, of which
torch's `isfinite` of bfloat16 took 40 to 80; by the exponents' bits, and with the conversion before the
reshape, 27. The commit took 34, the server's share not counted. So small units are bound by requests and by
Ray's round trip rather than by bytes.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import obstore
import torch

from benchmarks.servers import s3_root
from harvester import driver
from harvester.ledger import read_ledger
from harvester.worker import UnitWorker
from schemas.config import Config
from schemas.harvest import HarvestPlan
from store.objects import S3Store, open_store
from store.testing import make_plan, write_plan

HOOK = "resid_post.1"


class PreparedWorker(UnitWorker):
    """A worker whose subject gives the same float32 rows for every batch, at once."""

    @cached_property
    def _subject(self) -> Any:
        plan = self._plan
        shape = (self._batch, plan.spec.context_length, plan.d_model(HOOK))
        rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return SimpleNamespace(
            identity=plan.subject,
            device=torch.device("cpu"),
            activations=lambda windows, hooks: {hook: rows[: len(windows)] for hook in hooks},
        )


def measure_ceiling(*, units: int, windows_per_unit: int, d_model: int, rounds: int) -> dict[str, Any]:
    """`ceiling_over_put` and what it is made of; empty where there is no S3 server."""
    plan = make_plan(units, windows_per_unit, 128, {HOOK: d_model})
    body = np.random.default_rng(0).bytes(plan.shard_bytes(HOOK))
    puts: list[float] = []
    harvests: list[float] = []
    with s3_root() as root:
        if root is None:
            return {}
        for number in range(rounds):
            puts.append(bare_puts(f"{root}/floor-{number}", plan, body))
            harvests.append(prepared_harvest(f"{root}/data-{number}", plan))
        puts.append(bare_puts(f"{root}/floor", plan, body))
    ratios = [2 * h / (a + b) for h, a, b in zip(harvests, puts, puts[1:], strict=False)]
    return {
        "ceiling_over_put": statistics.median(ratios),
        "ceiling_over_put_rounds": ratios,
        "ceiling_bytes_per_s": statistics.median(harvests),
        "put_bytes_per_s": statistics.median(puts),
    }


def bare_puts(root: str, plan: HarvestPlan, body: bytes) -> float:
    """Bytes a second of as many shards as the plan has units."""
    store = open_store(root)
    assert isinstance(store, S3Store)

    def put(number: int) -> None:
        obstore.put(store._client, store._path(f"{number}"), body, mode="create", use_multipart=False)

    with ThreadPoolExecutor(driver.UNITS_QUEUED) as pool:
        started = time.perf_counter()
        list(pool.map(put, range(plan.units)))
        seconds = time.perf_counter() - started
    for number in range(plan.units):
        store.delete(f"{number}")
    return plan.units * len(body) / seconds


def prepared_harvest(root: str, plan: HarvestPlan) -> float:
    """Bytes a second of one harvest into `root`, the actor's start left out."""
    store = open_store(root)
    write_plan(store, plan)
    config = Config.model_validate(
        {
            "root": root,
            "subject": {"model": "testing/prepared"},
            "harvest": {"threads_per_actor": 1, "batch_windows": 32},
        }
    )
    real, driver.UnitWorker = driver.UnitWorker, PreparedWorker
    try:
        driver.harvest(config, store, plan)
    finally:
        driver.UnitWorker = real
    rate = read_ledger(store).tokens_per_second or 0.0
    for unit in range(plan.units):
        store.delete(f"activations/{HOOK}/c/{unit}/0")
    return rate * plan.units * plan.shard_bytes(HOOK) / (plan.windows * plan.spec.context_length)
