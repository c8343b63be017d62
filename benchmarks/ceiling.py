"""What a fast GPU would meet: the harvest's whole path to S3 with a subject that costs nothing.

Driver, Ray actor, tokens, permutation, encoding, digests, statistics, puts and receipts are the real ones;
only the subject hands out rows that were computed beforehand. The floor puts the same shard bytes with
bare `obstore.put` from as many threads as an actor commits with, before and after each harvest. Units are
of 75 MB, as a small user's.

ceiling_over_put
    Units beyond a dataset's first 16, as nearly all are. (Those stand as void ones already.)
ceiling_first_units_over_put
    The first 16 themselves, whose receipts also carry moments.

What was found (CPU ms a GB, 2 cores of an EPYC; both cores are busy for 80 % of the time, so CPU is what
everybody waits for). A bare put takes 770 and the server 2,900 for it. The harvest added 2,700: rows 590 (of
which their look for NaN 350), statistics 310, moments 520, crc32c 120, SHA-256 590, pieces joined for the put
580; and its ledger counted the 1.5 s in which Ray is shut down. Ratio 0.26, moments included. A look for NaN
by a sum, pieces sent as they lie, the rows' memory used again, and a clock that stops at the last receipt
were predicted to take 1,000 away and to give 0.6 with moments and 0.65 without; 0.65 and 0.68 were found
(medians of three rounds, which spread from 0.57 to 0.81).
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
from schemas.harvest import MOMENT_UNITS, HarvestPlan
from store.layout import shard_key
from store.objects import S3Store, open_store
from store.testing import make_attempt, make_plan, synthetic_digests, write_plan
from store.writer import commit_void

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
    first = make_plan(units, windows_per_unit, 128, {HOOK: d_model})
    later = make_plan(MOMENT_UNITS + units, windows_per_unit, 128, {HOOK: d_model})
    body = np.random.default_rng(0).bytes(first.shard_bytes(HOOK))
    puts: list[float] = []
    harvests: list[float] = []
    with s3_root() as root:
        if root is None:
            return {}
        for number in range(2 * rounds):  # in turn
            puts.append(bare_puts(f"{root}/floor-{number}", units, body))
            harvests.append(prepared_harvest(f"{root}/data-{number}", (later, first)[number % 2], units))
        puts.append(bare_puts(f"{root}/floor", units, body))
    ratios = [2 * h / (a + b) for h, a, b in zip(harvests, puts, puts[1:], strict=False)]
    return {
        "ceiling_over_put": statistics.median(ratios[::2]),
        "ceiling_over_put_rounds": ratios[::2],
        "ceiling_first_units_over_put": statistics.median(ratios[1::2]),
        "ceiling_first_units_over_put_rounds": ratios[1::2],
        "ceiling_bytes_per_s": statistics.median(harvests[::2]),
        "put_bytes_per_s": statistics.median(puts),
        "ceiling_units": units,
        "ceiling_unit_bytes": len(body),
    }


def bare_puts(root: str, units: int, body: bytes) -> float:
    """Bytes a second of as many shards as there are units."""
    store = open_store(root)
    assert isinstance(store, S3Store)

    def put(number: int) -> None:
        obstore.put(store._client, store._path(f"{number}"), body, mode="create", use_multipart=False)

    with ThreadPoolExecutor(driver.UNITS_QUEUED) as pool:
        started = time.perf_counter()
        list(pool.map(put, range(units)))
        seconds = time.perf_counter() - started
    for number in range(units):
        store.delete(f"{number}")
    return units * len(body) / seconds


def prepared_harvest(root: str, plan: HarvestPlan, units: int) -> float:
    """Bytes a second of a harvest of a plan's last units into `root`, the actor's start left out."""
    store = open_store(root)
    write_plan(store, plan)
    for unit, digest in enumerate(synthetic_digests(plan)[: plan.units - units]):
        facts = {"tokens_sha256": digest.tobytes().hex(), "attempt": make_attempt()}
        commit_void(store, plan, unit, "measured without", **facts)
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
    (run,) = read_ledger(store).runs
    for unit in range(plan.units - units, plan.units):
        store.delete(shard_key(HOOK, unit))
    return run.bytes / run.seconds
