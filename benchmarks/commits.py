"""Committing a shard, opening a dataset, and the arithmetic of the order."""

from __future__ import annotations

import argparse
import hashlib
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np

from benchmarks.floors import HOOK
from benchmarks.timing import in_turn
from winnow.common.clock import now
from winnow.schemas.base import sha256_hex
from winnow.schemas.harvest import SLICES, HarvestManifest, HarvestPlan, ShardRecord, UnitReceipt
from winnow.store import ActivationStore
from winnow.store.format.layout import PLAN_KEY, manifest_key, shard_key
from winnow.store.format.order import LaneOrder
from winnow.store.format.shards import crc32c, encode_chunk, encode_shard
from winnow.store.format.zarr_metadata import TOKEN_DIGESTS_KEY
from winnow.store.objects import ObjectStore, open_store
from winnow.store.records.parts import PART_UNITS, DatasetDigest, encode_part
from winnow.store.testing import make_attempt, make_plan, synthetic_digests, synthetic_tokens
from winnow.store.write.writer import commit_unit, tokens_digest


def commit(root: str, options: argparse.Namespace) -> dict[str, Any]:
    """`commit_over_loop` and `commit_over_serial_loop`."""
    plan = make_plan(
        # From unit 20 on: receipts of the first 16 also carry moments, which most units' do not.
        units=2 * options.rounds + 40,
        windows_per_unit=options.commit_windows,
        context_length=options.context_length,
        hooks={HOOK: options.d_model},
    )
    objects = open_store(root)
    shape = (plan.rows_per_unit, options.d_model)
    rows = np.random.default_rng(0).integers(0x3C00, 0x4200, shape).astype(np.uint16)
    # Joined beforehand: the floor puts one buffer, and encoding is the subject's cost alone.
    body = encode_shard(rows).data
    tokens = tokens_digest(synthetic_tokens(plan, 0))
    units = iter(range(20, plan.units))
    keys = iter(f"floor/{number}" for number in range(10**6))

    def committed() -> float:
        unit = next(units)
        started = time.perf_counter()
        commit_unit(objects, plan, unit, {HOOK: rows}, tokens_sha256=tokens, attempt=make_attempt())
        seconds = time.perf_counter() - started
        # Outside the clock, so that the disk does not fill up over the rounds.
        objects.delete(shard_key(HOOK, unit))
        return len(body) / seconds

    def floor(serial: bool = False) -> float:
        key = next(keys)
        started = time.perf_counter()
        with ThreadPoolExecutor(2) as beside:
            for part in (lambda: hashlib.sha256(body).digest(), lambda: crc32c(body)):
                done = beside.submit(part)
                if serial:
                    done.result()
            objects.put_new(key, body)
        seconds = time.perf_counter() - started
        objects.delete(key)
        return len(body) / seconds

    # A first one warms up: threads start, and code is imported when it is first used.
    committed()
    found = in_turn(options.rounds, lambda: nullcontext((floor, committed)))
    serial = in_turn(options.rounds, lambda: nullcontext((lambda: floor(serial=True), committed)))
    return {
        "commit_over_loop": found["ratio"],
        "commit_over_loop_cpu": found["cpu_ratio"],
        "commit_over_loop_rounds": found["ratios"],
        "commit_over_serial_loop": serial["ratio"],
        "commit_bytes_per_s": found["rate"],
        "commit_loop_bytes_per_s": found["floor"],
        "commit_shard_bytes": len(body),
    }


def opening(root: str, units: int) -> dict[str, Any]:
    """`open_100k_units_s`: opening a sealed dataset of receipts, parts and a manifest, without shards."""
    objects = open_store(root)
    plan = make_plan(units=units, hooks={HOOK: 8})
    objects.put(PLAN_KEY, plan.to_json())
    seal_fabricated(objects, plan)
    started = time.perf_counter()
    store = ActivationStore.open(root)
    seconds = time.perf_counter() - started
    assert store.index.present.all()
    return {"open_100k_units_s": seconds, "open_units_per_s": units / seconds, "open_units": units}


def seal_fabricated(objects: ObjectStore, plan: HarvestPlan) -> None:
    """Write a manifest and parts of fabricated receipts, of which one in ten marks two sinks."""
    random = np.random.default_rng(0)
    model = UnitReceipt(
        plan_fingerprint=plan.fingerprint,
        unit=0,
        tokens_sha256=sha256_hex(b""),
        shards={
            HOOK: ShardRecord(
                key=shard_key(HOOK, 0),
                bytes=plan.shard_bytes(HOOK),
                sha256=sha256_hex(b""),
                slice_crc32c=(0,) * SLICES,
                sum_squares=1.0,
                largest_norm=1.0,
                median_norm=1.0,
            )
        },
        attempt=make_attempt(),
    )
    shard = model.shards[HOOK]
    moments = {"rows": plan.rows_per_unit, "sums": (0.0,) * 8, "squares": (1.0,) * 8}
    tokens = synthetic_digests(plan)
    objects.put(TOKEN_DIGESTS_KEY, encode_chunk(tokens))
    digest, parts, sinks = DatasetDigest(plan), [], 0
    for first in range(0, plan.units, PART_UNITS):
        receipts: list[UnitReceipt] = []
        for unit in range(first, min(first + PART_UNITS, plan.units)):
            facts: dict[str, Any] = {
                "key": shard_key(HOOK, unit),
                "sha256": random.bytes(32).hex(),
                "slice_crc32c": tuple(random.integers(0, 2**32, SLICES).tolist()),
                "sinks": (1, 5) if unit % 10 == 0 else (),
            }
            # `model_copy` skips validation, which is not what is measured; digests and checksums are drawn,
            # because equal ones would compress as real ones never do.
            made = shard.model_copy(update=facts)
            if unit < 16:
                made = ShardRecord.model_validate(made.model_dump() | {"moments": moments})
            sinks += len(made.sinks)
            its = {"unit": unit, "shards": {HOOK: made}, "tokens_sha256": tokens[unit].tobytes().hex()}
            receipts.append(model.model_copy(update=its))
            digest.add(receipts[-1])
        body, part = encode_part(receipts)
        objects.put(part.key, body)
        parts.append(part)
    manifest = HarvestManifest(
        plan_fingerprint=plan.fingerprint,
        units=plan.units,
        rows=plan.rows,
        bytes=plan.units * plan.shard_bytes(HOOK),
        sinks={HOOK: sinks},
        dataset_sha256=digest.hexdigest(),
        parts=tuple(parts),
        created=now(),
    )
    objects.put(manifest_key(), manifest.to_json())


def order_arithmetic(steps: int = 2000) -> dict[str, Any]:
    """Time and memory to locate a step among 10^12 rows, in early and late epochs, compared to 10^7."""

    def order(rows: int) -> LaneOrder:
        return LaneOrder(range(1, 1 + rows // (64 * 508)), 508, 256, 8192, 0, 64, 64)

    def microseconds(made: LaneOrder) -> float:
        random = np.random.default_rng(0)
        asked = random.integers(0, 4 * made.steps_per_epoch, steps).tolist()
        started = time.perf_counter()
        for step in asked:
            place = made.locate(step)
            made.units_of(place.epoch, place.group)
        return (time.perf_counter() - started) / steps * 1e6

    large = microseconds(order(10**12))
    small = microseconds(order(10**7))
    # A separate run: tracing slows Python down several times.
    tracemalloc.start()
    microseconds(order(10**12))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"order_step_us": large, "order_step_over_small": large / small, "order_peak_bytes": peak}
