"""Harvest speed: end-to-end tokens/s over the bare truncated forward pass.

The floor is the subject, truncated after the deepest hook, run over the same windows with the same
batch and threads, and its output discarded: no hook read, no permutation, no encoding, no store. The floor is
measured before and after the harvest, half each, since machines drift.

`ceiling_over_put` is the whole path with a subject that costs nothing (see `benchmarks.ceiling`).

    python -m benchmarks.harvest --json OUT [--config configs/quickstart.yaml] [--units 4]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ceiling import measure_ceiling
from benchmarks.report import write_report
from winnow.common.config_file import load_config
from winnow.common.cores import cores_each
from winnow.common.reporter import reporting
from winnow.harvester.run import batching
from winnow.harvester.run.driver import ensure_plan, harvest
from winnow.harvester.run.ledger import read_ledger
from winnow.schemas.config import Config, section
from winnow.store.objects import ObjectStore, open_store
from winnow.store.read.reader import load_plan, read_tokens
from winnow.subject.load import Subject


def bare_forward_seconds(config: Config, store: ObjectStore, units: range) -> float:
    """Seconds of the truncated subject alone over the windows of `units`."""
    plan = load_plan(store)
    subject = Subject.load(section(config.subject, "subject"), until=plan.spec.hooks)
    batch = config.harvest.batch_windows
    assert batch != "auto", "floor and harvest must run the same shape"
    windows = np.concatenate([read_tokens(store, plan, unit) for unit in units]).astype(np.int64)
    ids = torch.from_numpy(windows).to(subject.device)
    blocks = subject.model.base_model
    with torch.no_grad():
        # Warms up: the first batch allocates, and on a GPU chooses kernels.
        blocks(input_ids=ids[:batch], use_cache=False)
        start = time.perf_counter()
        for first in range(0, len(ids), batch):
            blocks(input_ids=ids[first : first + batch], use_cache=False)
        if subject.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def measure(config: Config) -> dict[str, Any]:
    """Run the floor, the harvest, the floor again."""
    threads = config.harvest.threads_per_actor or cores_each(config.harvest.actors)
    torch.set_num_threads(threads)
    store = open_store(config.root, config.storage)
    plan = ensure_plan(config, store)
    # Resolved here, since floor and harvest must run the same shape.
    if config.harvest.batch_windows == "auto":
        subject = Subject.load(section(config.subject, "subject"), until=plan.spec.hooks)
        chosen = config.harvest.model_copy(update={"batch_windows": batching.measure_batch(subject, plan)[0]})
        config = config.model_copy(update={"harvest": chosen})
        del subject
    # Different halves, so that the two floors together cover the windows of the harvest.
    half = plan.units // 2
    before = bare_forward_seconds(config, store, range(half))
    harvest(config, store, plan)
    after = bare_forward_seconds(config, store, range(half, plan.units))
    ledger = read_ledger(store)
    tokens = plan.windows * plan.spec.context_length
    rate = ledger.tokens_per_second or 0.0
    return {
        "over_truncated_forward": rate / (tokens / (before + after)),
        "harvest_tokens_per_s": rate,
        "forward_tokens_per_s": tokens / (before + after),
        "forward_drift": (after / (plan.units - half)) / (before / half),
        "tokens": tokens,
        "units": plan.units,
        "batch_windows": config.harvest.batch_windows,
        "threads": threads,
        "hooks": list(plan.spec.hooks),
        "subject": plan.subject.model,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--units", type=int, default=6, help="units harvested, one of them held out")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument(
        "--ceiling-units", type=int, default=8, help="units of `ceiling_over_put`; 0 omits it"
    )
    parser.add_argument("--ceiling-windows", type=int, default=512, help="windows per such unit")
    parser.add_argument("--ceiling-only", action="store_true", help="measure `ceiling_over_put` alone")
    args = parser.parse_args()
    result: dict[str, Any] = {}
    if args.ceiling_units:
        result |= measure_ceiling(
            units=args.ceiling_units, windows_per_unit=args.ceiling_windows, d_model=576, rounds=5
        )
    if args.ceiling_only:
        print(json.dumps(write_report("harvest", result, args.json), indent=1))
        return
    with tempfile.TemporaryDirectory() as folder:
        sets = [f"root={folder}/data", f"plan.train_units={args.units - 1}", *args.set]
        result |= measure(load_config(args.config, sets))
    print(json.dumps(write_report("harvest", result, args.json), indent=1))


if __name__ == "__main__":
    with reporting():
        main()
