"""`benchmarks.ceiling` at toy size: the whole path runs, and moves the bytes that it says."""

from __future__ import annotations

import ray

from benchmarks import ceiling
from winnow.schemas.harvest import MOMENT_UNITS
from winnow.store.read.reader import load_plan, read_receipt


def test_the_whole_path_with_rows_made_beforehand(s3_environment, monkeypatch):
    seen = []
    real = ceiling.prepared_harvest

    def harvest(root, plan, units):
        rate = real(root, plan, units)
        store = ceiling.open_store(root)
        receipts = [read_receipt(store, load_plan(store), unit) for unit in range(plan.units)]
        seen.append(
            [(r.void is not None, bool(r.shards and r.shards[ceiling.HOOK].moments)) for r in receipts]
        )
        return rate

    monkeypatch.setattr(ceiling, "prepared_harvest", harvest)
    ray.init(
        "local", num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False
    )
    try:
        found = ceiling.measure_ceiling(units=2, windows_per_unit=64, d_model=8, rounds=1)
    finally:
        ray.shutdown()
    assert seen == [[(True, False)] * MOMENT_UNITS + [(False, False)] * 2, [(False, True)] * 2]
    assert found["ceiling_unit_bytes"] == 64 * 127 * 8 * 2 + 64 * 4 + 64 * 16 + 4
    assert min(found["ceiling_over_put"], found["ceiling_first_units_over_put"]) > 0
