"""Whether batches mix as the formula says: `python -m benchmarks.mixing --json OUT`.

A dataset whose rows hold their own number is written and streamed; each row of each real batch is traced
to its window, and pairs of rows that share a window are counted.

measured_over_formula
    The share of such pairs over `LaneOrder.same_window`, the probability that the design effect is built
    on. The two differ by sampling noise and by 1/T: two rows of a batch are never the same row.
buffer_over_formula
    The same for the usual shuffle buffer of the same memory (two groups' rows): filled with windows one
    after another, shuffled, half of it emitted in batches, refilled, shuffled again. Its windows come from
    the same corpus-wide shuffle, so that only the buffer is compared.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import write_report
from winnow.schemas.harvest import HarvestPlan
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.store.testing import make_plan, write_dataset

HOOK = "resid_post.1"


def main() -> None:
    """Parse the command line, measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--units", type=int, default=24, help="training units")
    parser.add_argument("--group-units", type=int, default=4, help="units U shuffled together")
    parser.add_argument("--windows-per-unit", type=int, default=128, help="windows W per unit")
    parser.add_argument("--context-length", type=int, default=65, help="tokens T per window")
    parser.add_argument("--batch-rows", type=int, default=256, help="rows B per batch")
    parser.add_argument("--epochs", type=int, default=4, help="epochs streamed")
    options = parser.parse_args()
    sizes = {name: value for name, value in vars(options).items() if name != "json"}
    print(json.dumps(write_report("mixing", measure(**sizes) | {"sizes": sizes}, options.json), indent=1))


def measure(
    *, units: int, group_units: int, windows_per_unit: int, context_length: int, batch_rows: int, epochs: int
) -> dict[str, Any]:
    """Write, stream, count."""
    plan = make_plan(units + 1, windows_per_unit, context_length, {HOOK: 1}, dtype="float32")
    if plan.rows >= 2**24:
        raise ValueError("row numbers must be exact as float32: fewer than 2^24 rows")
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as folder:
        write_dataset(open_store(folder), plan, numbered_rows)
        store = ActivationStore.open(folder)
        lanes = Pairs()
        with store.stream(
            HOOK, batch_rows=batch_rows, seed=1, group_units=group_units, epochs=epochs
        ) as stream:
            order = stream.order
            for batch in stream:
                lanes.add(store.locate(batch.rows[HOOK][:, 0].numpy().astype(np.int64) - 1)[0])
    buffer = Pairs()
    # Two groups: the stream reads one while it yields the other.
    held = 2 * group_units * plan.rows_per_unit
    for windows in buffered(plan, held, batch_rows, epochs):
        buffer.add(windows)
    return {
        "measured_over_formula": lanes.share / order.same_window,
        "buffer_over_formula": buffer.share / order.same_window,
        "same_window_formula": order.same_window,
        "same_window_measured": lanes.share,
        "same_window_buffer": buffer.share,
        "design_effect": order.design_effect,
        "batches": lanes.batches,
        "pairs_found": lanes.same,
    }


def numbered_rows(plan: HarvestPlan, unit: int, hook: str) -> np.ndarray:
    """Each row's number in the dataset, from 1, float32 [R, 1]."""
    # From 1, so that no row's norm is 0.
    first = unit * plan.rows_per_unit
    numbers = np.arange(first + 1, first + 1 + plan.rows_per_unit, dtype=np.float32)
    return numbers.reshape(-1, plan.d_model(hook))


class Pairs:
    """Counts pairs of a batch's rows that share a window."""

    def __init__(self) -> None:
        self.same = self.all = self.batches = 0

    def add(self, windows: np.ndarray) -> None:
        """Count a batch, given the windows [B] of its rows."""
        counts = np.unique(windows, return_counts=True)[1]
        self.same += int((counts * (counts - 1)).sum())
        self.all += len(windows) * (len(windows) - 1)
        self.batches += 1

    @property
    def share(self) -> float:
        """Share of all pairs that share a window."""
        return self.same / self.all


def buffered(plan: HarvestPlan, held: int, batch_rows: int, epochs: int) -> Any:
    """Windows [B] of each batch of a shuffle buffer of `held` rows that is refilled when half is gone."""
    random = np.random.default_rng(0)
    train = plan.split_units("train")
    windows = np.arange(train.start * plan.spec.windows_per_unit, train.stop * plan.spec.windows_per_unit)
    source = np.tile(np.repeat(windows, plan.rows_per_window), epochs)
    buffer, at = random.permutation(source[:held]), held
    while at < len(source):
        half = len(buffer) // 2 // batch_rows * batch_rows
        yield from buffer[:half].reshape(-1, batch_rows)
        fresh = source[at : at + half]
        at += half
        buffer = random.permutation(np.concatenate([buffer[half:], fresh]))


if __name__ == "__main__":
    main()
