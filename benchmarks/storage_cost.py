"""The cost of storing and reading a row, by dtype and codec, and the cost of 8 bits to an SAE.

`python -m benchmarks.storage_cost --root data/quickstart --json OUT` rewrites the dataset's training rows in
every dtype with every codec, and reads them with the stream (from the page cache, verified, as float32):

bytes_per_token
    Shard bytes, including checksums and index, over rows of one hook.
read_tokens_per_s
    Rows per second of the stream (median over the rounds), on all cores.
read_cpu_over_raw
    CPU seconds per row (medians over the rounds, each measured in turn) over those of raw bfloat16.
write_cpu_over_raw
    CPU seconds to encode and commit a row over those of raw bfloat16.

The rows are those of `--root`: from a bfloat16 dataset, float32 rows end in 16 zero bits, which zstd removes
as it could not from a float32 harvest (`--set plan.dtype=float32`); `source_dtype` records it.

`--train CONFIG [--set FIELD=VALUE ...]` trains an SAE with the config, once on the stream as it is and once
for each of `--simulate int8 fp8_e4m3 fp8_e5m2`: the stream's training rows are rounded to that format and
back (`simulate`), with one float32 scale per row, and everything else is the same, including seed and
held-out rows. `fvu_cost` and `delta_ce_cost` (with `--delta-ce`, which runs the subject) are differences to
the first run. Without `--train` only bytes and times are measured, which requires a quiet machine; with
`--train-only` only the training, which does not.

A format of 8 bits is worth having in the store if its `fvu_cost` is under 0.002; int8 is in the store.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import write_report
from winnow.common.config_file import load_config
from winnow.common.reporter import reporting
from winnow.evaluator.heldout import measure_in_subject
from winnow.schemas.config import Config
from winnow.schemas.harvest import Compress, Dtype, HarvestPlan, row_bytes
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.store.read.torch_stream import Batch
from winnow.store.testing import make_plan, write_dataset
from winnow.trainer.run import loop

DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16", "float32", "int8")
CODECS: tuple[Compress, ...] = ("none", "zstd")
FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def main() -> None:
    """Parse the command line, measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", required=True, help="a sealed dataset with two training units or more")
    parser.add_argument("--hook", help="the first one by default")
    parser.add_argument("--units", type=int, default=8, help="largest number of training units")
    parser.add_argument("--rounds", type=int, default=5, help="epochs read per dtype and codec")
    parser.add_argument("--batch-rows", type=int, default=64, help="rows per batch")
    parser.add_argument("--train-only", action="store_true", help="do not measure bytes and read times")
    parser.add_argument("--train", type=Path, help="a config with a section `train`; its root is not used")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="as `winnow train`")
    parser.add_argument("--simulate", nargs="*", choices=["int8", *FP8], default=["int8", *FP8])
    parser.add_argument("--delta-ce", action="store_true", help="run the subject too")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    if not options.train_only:
        figures |= storage(options.root, options.hook, options.units, options.rounds, options.batch_rows)
    if options.train:
        config = load_config(options.train, [*options.set, f"root={options.root}"])
        figures["training"] = training(config, options.simulate, delta_ce=options.delta_ce)
    print(json.dumps(write_report("storage_cost", figures, options.json), indent=1))


# Bytes and time


def storage(root: str, hook: str | None, units: int, rounds: int, batch_rows: int = 64) -> dict[str, Any]:
    """Measure a dataset's rows in every dtype with every codec: `figures[dtype][codec]`."""
    source = ActivationStore.open(root)
    hook = hook or source.hooks[0]
    taken = source.plan.split_units("train")[:units]
    size = source.plan.rows_per_unit

    def rows(_: HarvestPlan, unit: int, name: str) -> Any:
        number = taken[unit - 1] if unit else source.plan.split_units("validation")[0]
        return source.read_rows(name, number * size, (number + 1) * size)

    figures: dict[str, dict[str, dict[str, float]]] = {dtype: {} for dtype in DTYPES}
    read: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as folder:
        for dtype in DTYPES:
            for codec in CODECS:
                plan = _plan(source.plan, len(taken) + 1, hook, dtype, codec)
                place, before = f"{folder}/{dtype}-{codec}", time.process_time()
                manifest = write_dataset(open_store(place), plan, rows)
                assert manifest is not None
                figures[dtype][codec] = {
                    "bytes_per_token": manifest.bytes / plan.rows,
                    "write_cpu": (time.process_time() - before) / plan.rows,
                }
                read[dtype, codec] = []
        # One epoch of each per round, so that a drift of the machine affects all alike.
        for _ in range(rounds):
            for dtype, codec in read:
                read[dtype, codec].append(_read(f"{folder}/{dtype}-{codec}", hook, batch_rows))
    cpu = {kind: statistics.median(used for used, _ in taken) for kind, taken in read.items()}
    raw_read, raw_write = cpu["bfloat16", "none"], figures["bfloat16"]["none"]["write_cpu"]
    for (dtype, codec), its_rounds in read.items():
        its = figures[dtype][codec]
        its["read_tokens_per_s"] = 1 / statistics.median(seconds for _, seconds in its_rounds)
        its["read_cpu_over_raw"] = cpu[dtype, codec] / raw_read
        its["write_cpu_over_raw"] = its.pop("write_cpu") / raw_write
    return {
        "bytes": {"hook": hook, "d_model": source.d_model(hook), "source_dtype": source.plan.spec.dtype}
        | {"units": len(taken), "rows_per_unit": size, "batch_rows": batch_rows}
        | {"by_dtype": figures},
        "simulated_bytes_per_token": row_bytes("int8", source.d_model(hook)),
    }


def _plan(like: HarvestPlan, units: int, hook: str, dtype: Dtype, codec: Compress) -> HarvestPlan:
    spec = like.spec
    return make_plan(
        units,
        spec.windows_per_unit,
        spec.context_length,
        {hook: like.d_model(hook)},
        drop_leading=spec.drop_leading,
        dtype=dtype,
        compress=codec,
    )


def _read(root: str, hook: str, batch_rows: int) -> tuple[float, float]:
    """CPU seconds and seconds per row of an epoch in which every group is read from the store."""
    store = ActivationStore.open(root)
    units = len(store.plan.split_units("train"))
    before, started = time.process_time(), time.perf_counter()
    with store.stream(hook, batch_rows=batch_rows, seed=0, group_units=-(-units // 2), epochs=1) as stream:
        rows = sum(len(batch.weights) for batch in stream)
    return (time.process_time() - before) / rows, (time.perf_counter() - started) / rows


# Eight bits


def simulate(name: str, rows: torch.Tensor) -> torch.Tensor:
    """Round float32 rows [B, D] to a format of 8 bits with one float32 scale per row, and back.

    A row's largest magnitude becomes 127 of `int8`, or the largest value of an fp8 format.
    """
    most = rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if name == "int8":
        scale = most / 127
        return (rows / scale).round() * scale
    scale = most / torch.finfo(FP8[name]).max
    return (rows / scale).to(FP8[name]).float() * scale


class SimulatedStore(ActivationStore):
    """A dataset whose training stream is rounded to a format; everything else is as stored."""

    format = "int8"

    def stream(self, *arguments: Any, **options: Any) -> Any:
        """As `ActivationStore.stream`."""
        return SimulatedStream(super().stream(*arguments, **options), self.format)


class SimulatedStream:
    """A stream's batches with their rows rounded; everything else is the stream's."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._stream)
        return batch._replace(rows={hook: simulate(self._name, x) for hook, x in batch.rows.items()})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()


def training(config: Config, formats: list[str], *, delta_ce: bool) -> dict[str, Any]:
    """Train an SAE on the stream as it is and on each simulated format; returns held-out figures."""
    assert config.train is not None
    after: loop.AfterTrain | None = measure_in_subject if delta_ce else None
    kept = ("fvu", "fvu_raw", "delta_ce", "delta_ce_low", "delta_ce_high", "l0", "steps")
    found: dict[str, Any] = {}
    for name in ("as_stored", *formats):
        with tempfile.TemporaryDirectory(prefix="winnow-bench-") as out:
            its = config.model_copy(update={"train": config.train.model_copy(update={"out": out})})
            summary = _trained(its, name, after)
            found[name] = {key: summary[key] for key in kept if key in summary}
    first = found["as_stored"]
    for name in formats:
        found[name]["fvu_cost"] = found[name]["fvu"] - first["fvu"]
        if delta_ce:
            found[name]["delta_ce_cost"] = found[name]["delta_ce"] - first["delta_ce"]
    return found


def _trained(config: Config, name: str, after: Callable[..., dict[str, float]] | None) -> dict[str, Any]:
    # The training loop opens its dataset by this name; its validation rows do not pass the stream.
    real = loop.open_roots
    if name != "as_stored":
        simulated = type("Simulated", (SimulatedStore,), {"format": name})
        loop.open_roots = lambda root, _, storage, **options: simulated.open(root, storage, **options)
    try:
        return loop.train(config, after_train=after)
    finally:
        loop.open_roots = real


if __name__ == "__main__":
    with reporting():
        main()
