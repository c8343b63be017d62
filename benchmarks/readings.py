"""A reading's stream over its floor: the chosen rows of a dataset by their labels, a third of all.

    python -m benchmarks.readings --json OUT

The floor is a loop that reads the same units whole, checks every slice, and gathers the chosen rows into
batches, in an order made beforehand: it reads no labels and shuffles nothing. Rates are of chosen rows.

- `reading_over_loop`: the stream of the reading over the floor.
- `whole_over_loop`: the stream of all rows over the floor of all rows, in the same run, for comparison.
- `count_rows_per_s`: rows counted per second when a reading is first opened.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path

from benchmarks.floors import HOOK, SEED, Loop
from benchmarks.report import write_report
from benchmarks.streams import SteadyStream, cheap_rows
from benchmarks.timing import in_turn
from winnow.schemas.readings import RowsSpec
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.store.testing import make_plan, write_dataset

ROWS = RowsSpec(min_offset=350)
"""Three rows in ten: the synthetic offsets are uniform below 500."""


def measure(root: str, options: argparse.Namespace) -> dict[str, object]:
    """All figures, on a dataset written to `root`."""
    plan = make_plan(
        units=options.units + 1,
        hooks={HOOK: options.d_model},
        windows_per_unit=options.windows_per_unit,
        context_length=options.context_length,
        labels=True,
    )
    write_dataset(open_store(root), plan, cheap_rows)
    whole = ActivationStore.open(root)
    reading = whole.only(ROWS)
    assert reading.reading is not None
    started = time.perf_counter()
    chosen = reading.reading.counts.chosen
    counted = plan.rows / (time.perf_counter() - started)
    order = reading.order(batch_rows=options.batch_rows, seed=SEED, group_units=options.group_units)

    @contextmanager
    def pair(store: ActivationStore) -> Generator[tuple[Loop, SteadyStream]]:
        floor = Loop(Path(root), plan, options, order if store is reading else None)
        subject = SteadyStream(store, options)
        with closing(floor), closing(subject):
            yield floor, subject

    found = in_turn(options.rounds, lambda: pair(reading))
    beside = in_turn(options.rounds, lambda: pair(whole))
    return {
        "reading_over_loop": found["ratio"],
        "reading_over_loop_rounds": found["ratios"],
        "reading_over_loop_cpu": found["cpu_ratio"],
        "chosen_rows_per_s": found["rate"] / (2 * options.d_model),
        "whole_over_loop": beside["ratio"],
        "whole_over_loop_rounds": beside["ratios"],
        "count_rows_per_s": counted,
        "chosen_share": chosen / plan.rows,
        "dropped_share": order.dropped_rows / (order.dropped_rows + order.rows_per_epoch),
        "dataset_bytes": sum(plan.shard_bytes(HOOK) for _ in range(plan.units)),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--units", type=int, default=16)
    parser.add_argument("--windows-per-unit", type=int, default=256)
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--batch-rows", type=int, default=1024)
    parser.add_argument("--group-units", type=int, default=8)
    parser.add_argument("--prefetch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as root:
        result = measure(root, options)
    result |= {name: value for name, value in vars(options).items() if name != "json"}
    print(json.dumps(write_report("readings", result, options.json), indent=1))


if __name__ == "__main__":
    main()
