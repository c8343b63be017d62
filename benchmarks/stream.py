"""How fast the stream is against reading the same bytes plainly: `python -m benchmarks.stream --json OUT`.

A synthetic dataset is written to a temporary folder, then, in one process and several times over in turn:

- floor: every shard's payload read in order with `os.pread` into one buffer, and copied once (`memcpy`);
- stream: two epochs of `ActivationStore.stream`, both read from the files (the split is several groups):
  every slice's crc32c checked, lanes shuffled, float32 torch batches; buffers are allocated anew each time.

`over_plain_read` is the stream's rate over the floor's, both best of the rounds: stored bytes a second.
`over_plain_read_cpu` is the same over CPU seconds of all threads, which a busy machine disturbs less.
The files are in the page cache for both, as they were just written.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.report import write_report
from schemas.harvest import HarvestPlan
from store import ActivationStore
from store.layout import shard_key
from store.objects import open_store
from store.testing import make_plan, write_dataset

HOOK = "resid_post.1"


def main() -> None:
    """Parse the command line, measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--units", type=int, default=12, help="training units")
    parser.add_argument("--group-units", type=int, default=6, help="units U shuffled together")
    parser.add_argument("--windows-per-unit", type=int, default=256, help="windows W in a unit")
    parser.add_argument("--context-length", type=int, default=128, help="tokens T in a window")
    parser.add_argument("--d-model", type=int, default=576, help="width D")
    parser.add_argument("--batch-rows", type=int, default=1024, help="rows B in a batch")
    parser.add_argument("--prefetch", type=int, default=8, help="range requests in flight")
    parser.add_argument("--rounds", type=int, default=3, help="times each is measured")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the consumer")
    args = parser.parse_args()
    result = measure(**{name: value for name, value in vars(args).items() if name != "json"})
    print(json.dumps(write_report("stream", result, args.json), indent=1))


def measure(
    *,
    units: int,
    group_units: int,
    windows_per_unit: int,
    context_length: int,
    d_model: int,
    batch_rows: int,
    prefetch: int,
    rounds: int,
    threads: int,
) -> dict[str, Any]:
    """Write a dataset, measure both, and return the figures."""
    plan = make_plan(
        units=units + 1,
        windows_per_unit=windows_per_unit,
        context_length=context_length,
        hooks={HOOK: d_model},
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(prefix="winnow-bench-") as folder:
            write_dataset(open_store(folder), plan, _cheap_rows)
            store = ActivationStore.open(folder)
            floors: list[_Figures] = []
            streams: list[_Figures] = []
            for _ in range(rounds):
                floors.append(_plain_read(Path(folder), plan))
                streams.append(_stream(store, batch_rows, group_units, prefetch))
    finally:
        torch.set_num_threads(before)
    payload = units * plan.rows_per_unit * d_model * 2
    rows = streams[0].rows
    stored = rows * d_model * 2
    stream, floor = min(s.seconds for s in streams), min(f.seconds for f in floors)
    stream_cpu, floor_cpu = min(s.cpu_seconds for s in streams), min(f.cpu_seconds for f in floors)
    return {
        "over_plain_read": (stored / stream) / (payload / floor),
        "over_plain_read_cpu": (stored / stream_cpu) / (payload / floor_cpu),
        "rows_per_s": rows / stream,
        "stored_bytes_per_s": stored / stream,
        "plain_read_bytes_per_s": payload / floor,
        "waiting_share": min(s.waiting / s.seconds for s in streams),
        "stream_seconds": [s.seconds for s in streams],
        "plain_read_seconds": [f.seconds for f in floors],
        "payload_bytes": payload,
        "sizes": {
            "units": units,
            "group_units": group_units,
            "windows_per_unit": windows_per_unit,
            "context_length": context_length,
            "d_model": d_model,
            "batch_rows": batch_rows,
            "prefetch": prefetch,
            "torch_threads": threads,
        },
    }


class _Figures(NamedTuple):
    seconds: float
    cpu_seconds: float
    rows: int = 0
    waiting: float = 0.0


def _cheap_rows(plan: HarvestPlan, unit: int, hook: str) -> np.ndarray:
    """Rows that cost little to make and differ from unit to unit."""
    shape = (plan.rows_per_unit, plan.d_model(hook))
    column = np.arange(shape[0], dtype=np.float32)[:, None] / shape[0] + unit
    return np.broadcast_to(column, shape) * np.linspace(1, 2, shape[1], dtype=np.float32)


def _plain_read(root: Path, plan: HarvestPlan) -> _Figures:
    """Seconds to read every training shard's payload in order into one buffer and copy it once."""
    space = np.empty(plan.shard_bytes(HOOK), np.uint8)
    copy = np.empty((len(plan.split_units("train")), space.size), np.uint8)
    copy[:] = 0  # the stream's buffers are paid for by the stream; these are not part of the floor
    started, cpu = time.perf_counter(), time.process_time()
    for number, unit in enumerate(plan.split_units("train")):
        handle = os.open(root / shard_key(HOOK, unit), os.O_RDONLY)
        try:
            done = 0
            while done < space.size:
                done += os.preadv(handle, [memoryview(space.data)[done:]], done)
        finally:
            os.close(handle)
        copy[number] = space
    return _Figures(time.perf_counter() - started, time.process_time() - cpu)


def _stream(store: ActivationStore, batch_rows: int, group_units: int, prefetch: int) -> _Figures:
    """Two epochs, every batch touched as little as a consumer could."""
    started, cpu = time.perf_counter(), time.process_time()
    rows = 0
    with store.stream(
        HOOK, batch_rows=batch_rows, seed=0, group_units=group_units, epochs=2, prefetch=prefetch
    ) as stream:
        for batch in stream:
            rows += len(batch.weights)
    seconds, used = time.perf_counter() - started, time.process_time() - cpu
    return _Figures(seconds, used, rows, stream.seconds_waiting)


if __name__ == "__main__":
    main()
