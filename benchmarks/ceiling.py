"""The limit for a fast GPU: the harvest's whole path to S3 with a subject that costs nothing.

Driver, Ray actor, tokens, permutation, encoding, digests, statistics, puts and receipts are the real ones;
only the subject returns rows that were computed beforehand. The floor puts shards' bytes with bare
`obstore.put` from as many threads as an actor commits with: in the actor, right before its harvest, and right
after it. Units are of 75 MB, as a small user's.

ceiling_over_put
    Units beyond a dataset's first 16, as nearly all are. (The first 16 are committed as void beforehand.)
ceiling_first_units_over_put
    The first 16 themselves, whose receipts also carry moments.

Findings (CPU ms per GB, 2 cores of an EPYC; both cores are busy for 80 % of the time, so CPU is the limit). A
bare put takes 770 and the server 2,900 for it. The harvest added 2,700: rows 590 (of which checking for NaN
350), statistics 310, moments 520, crc32c 120, SHA-256 590, joining pieces for the put 580; and its ledger
counted the 1.5 s in which Ray is shut down. Ratio 0.26, moments included. Checking for NaN by a sum, sending
pieces unjoined, reusing the rows' memory, and stopping the clock at the last receipt were predicted to save
1,000 and to give 0.6 with moments and 0.65 without; 0.65 and 0.68 were measured (medians of three rounds,
which spread from 0.57 to 0.81).

On another day's host the same code gave 0.53, for two reasons. (1) The floor was at an advantage: a virtual
machine returns free memory to its host within seconds, and fetching pages anew costs MinIO system time, as
after Ray's start, but not for a floor right after another. So the floor is now measured at the beginning and
the end of the harvest, and rows' memory is allocated beforehand, as after the first two units. (2) A shard's
SHA-256 was computed twice: for its receipt, and by obstore to sign the put, which by a profile was a fifth of
the harvest's own cost. Now the put is signed with the receipt's (`winnow.store.objects.direct`). Predicted:
0.7. Measured: 0.62 to 0.84 (medians of five rounds), and 0.62 twice with the puts left to obstore
(`AWS_UNSIGNED_PAYLOAD=false` does that), so most of the difference to 0.53 is the floor's.
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
from winnow.harvester.run import driver
from winnow.harvester.run.ledger import read_ledger
from winnow.harvester.run.worker import UnitWorker
from winnow.schemas.config import Config
from winnow.schemas.harvest import MOMENT_UNITS, HarvestPlan
from winnow.store.format.layout import shard_key
from winnow.store.objects import open_store
from winnow.store.objects.s3_store import S3Store
from winnow.store.testing import make_attempt, make_plan, synthetic_digests, write_plan
from winnow.store.write.writer import commit_void

HOOK = "resid_post.1"
FLOOR = "put-bytes-per-second"
"""The object in the dataset's root to which an actor writes the floor that it measures before its harvest."""
FLOOR_UNITS = 8


class PreparedWorker(UnitWorker):
    """A worker whose subject returns the same float32 rows for every batch, at once."""

    def ready(self) -> str:
        """See `UnitWorker.ready`."""
        device = super().ready()
        # The harvest's clock starts after `ready`, so the floor before it is measured here, in the actor.
        self._store.put(FLOOR, str(bare_puts(self._plan, self._store.uri)).encode())
        # Memory as in mid-harvest, where a unit's rows overwrite those of an earlier one. Filled, because
        # pages that were never written cost their allocation on first use.
        for _ in range(driver.UNITS_QUEUED):
            space = self._space()
            for rows in space.values():
                rows.fill(1)
            self._spare.append(space)
        return device

    @cached_property
    def _subject(self) -> Any:
        plan = self._plan
        shape = (self._batch, plan.spec.context_length, plan.d_model(HOOK))
        rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return SimpleNamespace(
            identity=plan.subject,
            device=torch.device("cpu"),
            activations=lambda windows, hooks, **_: {hook: rows[: len(windows)] for hook in hooks},
        )


def measure_ceiling(*, units: int, windows_per_unit: int, d_model: int, rounds: int) -> dict[str, Any]:
    """`ceiling_over_put` and its components; empty if there is no S3 server."""
    first = make_plan(units, windows_per_unit, 128, {HOOK: d_model})
    later = make_plan(MOMENT_UNITS + units, windows_per_unit, 128, {HOOK: d_model})
    found: list[tuple[float, float]] = []
    with s3_root() as root:
        if root is None:
            return {}
        # Alternately: the machine's speed drifts by more than the two differ.
        for number in range(2 * rounds):
            found.append(prepared_harvest(f"{root}/data-{number}", (later, first)[number % 2], units))
    ratios = [harvest / floor for harvest, floor in found]
    return {
        "ceiling_over_put": statistics.median(ratios[::2]),
        "ceiling_over_put_rounds": ratios[::2],
        "ceiling_first_units_over_put": statistics.median(ratios[1::2]),
        "ceiling_first_units_over_put_rounds": ratios[1::2],
        "ceiling_bytes_per_s": statistics.median(harvest for harvest, _ in found[::2]),
        "put_bytes_per_s": statistics.median(floor for _, floor in found),
        "ceiling_units": units,
        "ceiling_unit_bytes": first.shard_bytes(HOOK),
    }


def bare_puts(plan: HarvestPlan, root: str) -> float:
    """Bytes per second of putting `FLOOR_UNITS` shards."""
    # Random bytes, which no layer below can compress.
    store, body = open_store(root), np.random.default_rng(0).bytes(plan.shard_bytes(HOOK))
    assert isinstance(store, S3Store)

    def put(number: int) -> None:
        obstore.put(store._client, store._path(f"floor/{number}"), body, mode="create", use_multipart=False)

    with ThreadPoolExecutor(driver.UNITS_QUEUED) as pool:
        started = time.perf_counter()
        list(pool.map(put, range(FLOOR_UNITS)))
        seconds = time.perf_counter() - started
    for number in range(FLOOR_UNITS):
        store.delete(f"floor/{number}")
    return FLOOR_UNITS * len(body) / seconds


def prepared_harvest(root: str, plan: HarvestPlan, units: int) -> tuple[float, float]:
    """Bytes per second of a harvest of a plan's last units to `root`, and of the floors around it."""
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
    # The driver makes the Ray actor from this name, so replacing it reaches the worker's process.
    real, driver.UnitWorker = driver.UnitWorker, PreparedWorker
    try:
        driver.harvest(config, store, plan)
    finally:
        driver.UnitWorker = real
    (run,) = read_ledger(store).runs
    # Deleted at once: 600 MB per round would fill a small disk, or the page cache that the next round needs.
    for unit in range(plan.units - units, plan.units):
        store.delete(shard_key(HOOK, unit))
    before, after = float(store.get(FLOOR)), bare_puts(plan, root)
    return run.bytes / run.seconds, (before + after) / 2
