"""How close the store comes to the medium: `python -m benchmarks.store --json OUT`.

Every figure but two is a ratio of rates to a floor that is measured in turn with it, in the same process
(medians over the rounds; all rounds are in the file). Files are in the page cache, buffers are touched.
Beside each stands the same ratio by CPU seconds (`..._cpu`), which other work on the machine moves less.
The default sizes are a small user's: slices of 0.6 MB, requests of 16 MB, groups of 225 MB, shards of 150 MB.

local_stream_over_loop
    Stream: whole epochs of `ActivationStore.stream` in its steady state (its first epoch is left out and
    its read-ahead goes on past the last): each slice's crc32c checked, lanes shuffled, weights, batches as
    torch tensors in the stored dtype, dropped one by one. Loop: on as many threads, two groups' buffers like
    the stream: every slice is read by `preadv` straight into its place and its crc32c computed while it
    is in the cache; then the group's rows are gathered in the stream's own shuffled order, known
    beforehand, a batch at a time into one array a thread, in the stored dtype (`numpy.take`). No object,
    no comparison, no weights, no shuffling. `pread_bytes_per_s` is the bare `preadv` of it.
    `local_stream_float32_over_loop`: the same with batches widened to float32, which the loop is not.
s3_stream_over_get
    The same stream from S3 (MinIO, started for the run) over bare `obstore.get_range` of the same ranges
    with the same number in flight, the replies thrown away. The server is on this machine, so that its CPU
    is part of both sides: `s3_stream_over_get_cpu` counts the server's seconds too, `..._own_cpu` leaves
    them out. `s3_cpu_s_per_gb` has the seconds of both, own and server's: where cores are few, the server's
    are what both sides wait for.
commit_over_loop
    `commit_unit` over what it cannot do without, on as many threads (three): SHA-256 of the shard in one
    thread, its crc32c in another, while the third puts it with fsync (`LocalStore.put_new`).
    `commit_over_serial_loop`: the same three one after another.

What was found (CPU ms a GB, 2 cores of an EPYC, alone on the machine; predictions before, outcomes after)
    A stream's GB took 550 with 1.5 cores busy, a loop's 410. crc32c held the interpreter's lock, and even
    with it released a fifth went, by perf, into switching between ten threads that wanted the lock. With
    batches handed over in runs of 4 MB, and no more threads than cores, which gather too, 465 were
    predicted: 490 to 500 found, and `local_stream_over_loop` 0.81 from 0.62 (0.75 before the lanes were
    shuffled several at a time). The loop got faster by a third meanwhile: it has as few threads, and full
    garbage collections, which mostly fell into it, are off. What a stream does beside the loop: shuffling
    30, the consumer's thread 30, Python. POSIX_FADV_WILLNEED costs 70 where all is cached; runs of 2 MB
    and of 8 MB were slower than of 4.
    From MinIO a stream's GB took 700 of its own where the bare one takes 380. A slice filled in one call,
    asleep in the kernel, and requests of 16 MB (fewer to sign, answer and parse) were predicted to make
    it 550 and `s3_stream_over_get` 0.8: 590 and 0.72 found, from 0.64. The gather takes 210 of it, and a
    bare range has none; crc32c 50, shuffling 30, the rest the socket and Python. Fewer threads in flight
    changed nothing.
    Rows put where their turn is while they are read (a scatter, then no gather) were predicted to save 50
    and cost 80 more; they were dropped.
    A commit took 1,650 where the loop takes 980: statistics 350, encoding (a copy) 140, a look for NaN 80.
    Pieces are now written as they lie (`os.writev`, no copy), statistics work in place, look for NaN on the
    way, and go on beside the digest: 0.75 predicted for `commit_over_loop_cpu`, 0.81 found.
    In wall time, ms of a shard of 150 MB on two idle cores: SHA-256 takes 85, statistics 50, writing 40,
    fsync 45 to 65 of waiting, crc32c 13. The digest began after the crc32c, and the statistics took a core
    from it and from the writing. Now the digest begins with the first slice, the writing follows, and the
    statistics are made while fsync waits: 0.85 to 0.9 predicted for `commit_over_loop`, 0.79 before, 0.88 and
    0.86 found. The CPU is as it was. Squares of even and odd values apart would save 9 of the 50 and move the
    last bits of receipts; that was dropped.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import statistics
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import torch

from benchmarks.report import write_report
from benchmarks.servers import s3_root
from schemas.base import sha256_hex
from schemas.harvest import SLICES, HarvestManifest, HarvestPlan, ShardRecord, UnitReceipt
from store import ActivationStore
from store.cores import usable_cores
from store.groups import REQUEST_BYTES
from store.layout import PLAN_KEY, manifest_key, shard_key, slice_bytes, slice_range
from store.objects import ObjectStore, S3Store, open_store
from store.order import LaneOrder
from store.parts import PART_UNITS, DatasetDigest, encode_part
from store.shards import crc32c, encode_chunk, encode_shard
from store.testing import make_attempt, make_plan, synthetic_digests, synthetic_tokens, write_dataset
from store.writer import commit_unit, now, tokens_digest
from store.zarr_metadata import TOKEN_DIGESTS_KEY

HOOK = "resid_post.1"
SEED = 3


def main() -> None:
    """Parse the command line, measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--units", type=int, default=12, help="training units")
    parser.add_argument("--group-units", type=int, default=6, help="units U shuffled together")
    parser.add_argument("--windows-per-unit", type=int, default=256, help="windows W in a unit")
    parser.add_argument("--commit-windows", type=int, default=1024, help="windows W in a committed unit")
    parser.add_argument("--context-length", type=int, default=128, help="tokens T in a window")
    parser.add_argument("--d-model", type=int, default=576, help="width D")
    parser.add_argument("--batch-rows", type=int, default=1024, help="rows B in a batch")
    parser.add_argument("--prefetch", type=int, default=8, help="range requests in flight")
    parser.add_argument("--rounds", type=int, default=5, help="times each is measured")
    parser.add_argument("--open-units", type=int, default=100_000, help="units of the dataset to open")
    parser.add_argument("--folder", help="where the data goes; the system's temporary folder by default")
    parser.add_argument(
        "--only", nargs="*", choices=["stream", "s3", "commit", "open", "order"], help="measure these alone"
    )
    options = parser.parse_args()
    print(json.dumps(write_report("store", measure(options), options.json), indent=1))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for."""
    wanted = options.only or ["stream", "s3", "commit", "open", "order"]
    plan = make_plan(
        units=options.units + 1,
        windows_per_unit=options.windows_per_unit,
        context_length=options.context_length,
        hooks={HOOK: options.d_model},
    )
    result: dict[str, Any] = {"sizes": {k: v for k, v in vars(options).items() if isinstance(v, int)}}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a full collection looks at all of torch: 100 ms, and mostly in a floor
    try:
        with tempfile.TemporaryDirectory(prefix="winnow-bench-", dir=options.folder) as folder:
            if "stream" in wanted:
                result |= local_stream(f"{folder}/local", plan, options)
            if "commit" in wanted:
                result |= commit(f"{folder}/commit", options)
            if "open" in wanted:
                result |= opening(f"{folder}/open", options.open_units)
        if "s3" in wanted:
            with s3_root() as root:
                if root is not None:
                    result |= s3_stream(f"{root}/data", plan, options)
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)
    return result | (order_arithmetic() if "order" in wanted else {})


def interleaved(rounds: int, floor: Callable[[], float], subject: Callable[[], float]) -> dict[str, Any]:
    """Rates of both in turn; the ratio of a round is to the mean of the floors before and after it."""
    floors, subjects = [floor()], []
    for _ in range(rounds):
        subjects.append(subject())
        floors.append(floor())
    ratios = [2 * s / (a + b) for s, a, b in zip(subjects, floors, floors[1:], strict=False)]
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "rate": statistics.median(subjects),
        "floor": statistics.median(floors),
    }


# Streams


class SteadyStream:
    """One endless stream; each call takes an epoch and gives its rate in stored bytes a second."""

    def __init__(self, store: ActivationStore, options: argparse.Namespace, dtype: Any = "stored") -> None:
        self.stream = store.stream(
            HOOK,
            batch_rows=options.batch_rows,
            seed=SEED,
            group_units=options.group_units,
            prefetch=options.prefetch,
            dtype=dtype,
        )
        self.row_bytes = 2 * options.d_model
        self()

    def __call__(self) -> float:
        """Take an epoch."""
        started = time.perf_counter()
        rows = 0
        for _ in range(self.stream.order.steps_per_epoch):
            rows += len(next(self.stream).weights)
        return rows * self.row_bytes / (time.perf_counter() - started)


def local_stream(root: str, plan: HarvestPlan, options: argparse.Namespace) -> dict[str, Any]:
    """`local_stream_over_loop` and the bare reads beside it."""
    write_dataset(open_store(root), plan, cheap_rows)
    store = ActivationStore.open(root)
    loop = Loop(Path(root), plan, options)
    bare = statistics.median(loop(read_only=True) for _ in range(options.rounds))
    steady = SteadyStream(store, options)
    found = cpu_beside(options.rounds, loop, steady)
    steady.stream.close()
    wide = SteadyStream(store, options, "float32")
    widened = cpu_beside(options.rounds, loop, wide)
    wide.stream.close()
    loop.pool.shutdown()
    return {
        "local_stream_float32_over_loop": widened["ratio"],
        "local_stream_float32_over_loop_cpu": widened["cpu_ratio"],
        "local_stream_over_loop": found["ratio"],
        "local_stream_over_loop_rounds": found["ratios"],
        "local_stream_over_loop_cpu": found["cpu_ratio"],
        "local_stream_bytes_per_s": found["rate"],
        "loop_bytes_per_s": found["floor"],
        "pread_bytes_per_s": bare,
    }


def cpu_beside(
    rounds: int, floor: Callable[[], float], subject: Callable[[], float], *, server: bool = False
) -> dict[str, Any]:
    """As `interleaved`, with the ratio of bytes a CPU second beside it: a busy machine moves it less.

    Args:
        rounds: Of each.
        floor: Gives its rate.
        subject: Gives its rate.
        server: Count the CPU seconds of this process's children (MinIO) too.
    """
    used: dict[tuple[str, str], list[float]] = {
        (who, whose): [] for who in ("floor", "subject") for whose in ("own", "server")
    }

    def counted(who: str, run: Callable[[], float]) -> float:
        cpu, wall, other = time.process_time(), time.perf_counter(), children_cpu() if server else 0.0
        rate = run()
        read = (time.perf_counter() - wall) * rate
        used[who, "own"].append((time.process_time() - cpu) / read)
        used[who, "server"].append((children_cpu() - other if server else 0.0) / read)
        return rate

    found = interleaved(rounds, lambda: counted("floor", floor), lambda: counted("subject", subject))
    own = {who: statistics.median(used[who, "own"]) for who in ("floor", "subject")}
    both = {
        who: statistics.median(map(sum, zip(used[who, "own"], used[who, "server"], strict=True)))
        for who in own
    }
    return found | {
        "cpu_ratio": both["floor"] / both["subject"],
        "own_cpu_ratio": own["floor"] / own["subject"],
        "cpu_s_per_gb": {
            f"{who}, {whose}": statistics.median(values) * 1e9 for (who, whose), values in used.items()
        },
    }


def children_cpu() -> float:
    """CPU seconds of this process's children so far, those that are running included; 0 without /proc."""
    seconds, ticks = 0.0, os.sysconf("SC_CLK_TCK")
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            seconds += (int(fields[11]) + int(fields[12])) / ticks
    return seconds


class Loop:
    """The floor of the local stream; a call takes an epoch and gives its rate in bytes a second."""

    def __init__(self, root: Path, plan: HarvestPlan, options: argparse.Namespace) -> None:
        order = LaneOrder.for_plan(
            plan, batch_rows=options.batch_rows, seed=SEED, group_units=options.group_units
        )
        self.plan, self.order, self.row_bytes = plan, order, 2 * options.d_model
        self.pool = ThreadPoolExecutor(min(options.prefetch, usable_cores()))
        most = options.group_units * plan.rows_per_unit
        self.buffers = [np.zeros((most, options.d_model), np.uint16) for _ in range(2)]
        self.files = {
            unit: os.open(root / shard_key(HOOK, unit), os.O_RDONLY) for unit in plan.split_units("train")
        }
        self.local = threading.local()
        self.turns: list[list[np.ndarray]] = []
        for group in range(order.groups):
            first = order.first_step(0, group)
            slots = {unit: number for number, unit in enumerate(order.units_of(0, group))}
            steps = [order.rows_at(first + step) for step in range(order.steps_in(group))]
            place = np.vectorize(lambda unit, slots=slots: slots[unit])
            self.turns.append(
                [
                    place(rows // plan.rows_per_unit) * plan.rows_per_unit + rows % plan.rows_per_unit
                    for rows in steps
                ]
            )

    def __call__(self, read_only: bool = False) -> float:
        """Take an epoch."""
        started = time.perf_counter()
        waiting: list[list[Future[None]]] = [[], []]
        for group, turns in enumerate(self.turns):
            buffer, number = self.buffers[group % 2], group % 2
            self._wait(waiting[number])  # its rows of the group before last are gathered
            reads = [
                self.pool.submit(self._read, buffer, slot, unit, *run, read_only)
                for slot, unit in enumerate(self.order.units_of(0, group))
                for run in runs(self.plan)
            ]
            self._wait(reads)
            if not read_only:
                waiting[number] = [self.pool.submit(self._gather, buffer, rows) for rows in turns]
        self._wait(waiting[0] + waiting[1])
        rows = len(self.order.units) * self.plan.rows_per_unit if read_only else self.order.rows_per_epoch
        return rows * self.row_bytes / (time.perf_counter() - started)

    def _wait(self, futures: list[Future[None]]) -> None:
        for future in futures:
            future.result()

    def _read(self, buffer: Any, slot: int, unit: int, first: int, stop: int, read_only: bool) -> None:
        raw = buffer.view(np.uint8).reshape(-1)
        beside = np.empty(4, np.uint8)
        size = slice_bytes(self.plan, HOOK) - 4
        for number in range(first, stop):
            payload = raw[(slot * SLICES + number) * size : (slot * SLICES + number + 1) * size]
            os.preadv(self.files[unit], [payload.data, beside.data], number * (size + 4))
            if not read_only:
                crc32c(payload)

    def _gather(self, buffer: Any, rows: np.ndarray) -> None:
        out = getattr(self.local, "out", None)
        if out is None:
            out = self.local.out = np.zeros((len(rows), buffer.shape[1]), np.uint16)
        np.take(buffer, rows, axis=0, out=out, mode="clip")


def runs(plan: HarvestPlan) -> list[tuple[int, int]]:
    """Slices [first, stop) as the stream asks for them."""
    step = max(1, REQUEST_BYTES // slice_bytes(plan, HOOK))
    return [(first, min(first + step, SLICES)) for first in range(0, SLICES, step)]


def s3_stream(root: str, plan: HarvestPlan, options: argparse.Namespace) -> dict[str, Any]:
    """`s3_stream_over_get`."""
    objects = open_store(root)
    assert isinstance(objects, S3Store)
    write_dataset(objects, plan, cheap_rows)
    ranges = [
        (objects._path(shard_key(HOOK, unit)), *slice_range(plan, HOOK, *run))
        for unit in plan.split_units("train")
        for run in runs(plan)
    ]

    def one(item: tuple[str, int, int]) -> int:
        return len(obstore.get_range(objects._client, item[0], start=item[1], end=item[2]))

    with ThreadPoolExecutor(options.prefetch) as pool:

        def bare() -> float:
            started = time.perf_counter()
            return sum(pool.map(one, ranges)) / (time.perf_counter() - started)

        steady = SteadyStream(ActivationStore.open(root), options)
        found = cpu_beside(options.rounds, bare, steady, server=True)
        steady.stream.close()
    return {
        "s3_stream_over_get": found["ratio"],
        "s3_stream_over_get_cpu": found["cpu_ratio"],
        "s3_stream_over_get_own_cpu": found["own_cpu_ratio"],
        "s3_cpu_s_per_gb": found["cpu_s_per_gb"],
        "s3_stream_over_get_rounds": found["ratios"],
        "s3_stream_bytes_per_s": found["rate"],
        "s3_get_bytes_per_s": found["floor"],
    }


def cheap_rows(plan: HarvestPlan, unit: int, hook: str) -> np.ndarray:
    """Rows that cost little to make and differ from unit to unit."""
    shape = (plan.rows_per_unit, plan.d_model(hook))
    column = np.arange(shape[0], dtype=np.float32)[:, None] / shape[0] + unit
    return np.broadcast_to(column, shape) * np.linspace(1, 2, shape[1], dtype=np.float32)


# Commit


def commit(root: str, options: argparse.Namespace) -> dict[str, Any]:
    """`commit_over_loop` and `commit_over_serial_loop`."""
    plan = make_plan(
        units=2 * options.rounds + 40,  # the first units also carry moments: they are left out
        windows_per_unit=options.commit_windows,
        context_length=options.context_length,
        hooks={HOOK: options.d_model},
    )
    objects = open_store(root)
    shape = (plan.rows_per_unit, options.d_model)
    rows = np.random.default_rng(0).integers(0x3C00, 0x4200, shape).astype(np.uint16)
    body = encode_shard(rows).data  # in one piece, made once
    tokens = tokens_digest(synthetic_tokens(plan, 0))
    units = iter(range(20, plan.units))
    keys = iter(f"floor/{number}" for number in range(10**6))

    def committed() -> float:
        unit = next(units)
        started = time.perf_counter()
        commit_unit(objects, plan, unit, {HOOK: rows}, tokens_sha256=tokens, attempt=make_attempt())
        seconds = time.perf_counter() - started
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

    committed()
    found = cpu_beside(options.rounds, floor, committed)
    serial = interleaved(options.rounds, lambda: floor(serial=True), committed)
    return {
        "commit_over_loop": found["ratio"],
        "commit_over_loop_cpu": found["cpu_ratio"],
        "commit_over_loop_rounds": found["ratios"],
        "commit_over_serial_loop": serial["ratio"],
        "commit_bytes_per_s": found["rate"],
        "commit_loop_bytes_per_s": found["floor"],
        "commit_shard_bytes": len(body),
    }


# Opening


def opening(root: str, units: int) -> dict[str, Any]:
    """`open_100k_units_s`: a sealed dataset that has receipts, parts and a manifest, and no shards."""
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
    """Manifest and parts of made-up receipts: one unit in ten marks two rows."""
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


# Order


def order_arithmetic(steps: int = 2000) -> dict[str, Any]:
    """Time and memory to find a step among 10^12 rows, in early and late epochs, beside 10^7."""

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
    tracemalloc.start()
    microseconds(order(10**12))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"order_step_us": large, "order_step_over_small": large / small, "order_peak_bytes": peak}


if __name__ == "__main__":
    main()
