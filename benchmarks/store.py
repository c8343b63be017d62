"""How close the store comes to the medium: `python -m benchmarks.store --json OUT`.

Every figure but two is a ratio of rates to a floor that is measured alternately with it, in the same process
(medians over the rounds; all rounds are in the file). Files are in the page cache, and buffers have been
written to. A stream and its floor get new buffers in every round: the pages that they happen to get change
either rate by a tenth. The same ratio by CPU seconds (`..._cpu`) is reported beside each; other work on the
machine affects it less. The default sizes are a small user's: slices of 0.6 MB, requests of 16 MB, groups of
225 MB, shards of 150 MB.

local_stream_over_loop
    Stream: whole epochs of `ActivationStore.stream` in its steady state (its first epoch is not counted, and
    it reads ahead beyond the last): each slice's crc32c verified, lanes shuffled, weights, batches as torch
    tensors in the stored dtype, dropped one by one. Loop: on as many threads, with buffers of two groups like
    the stream: every slice is read by `preadv` straight to its place, and its crc32c is computed while it is
    in the CPU's cache; then the group's rows are gathered in the stream's own shuffled order, known
    beforehand, one batch at a time into one array per thread, in the stored dtype (`numpy.take`). No objects,
    no comparison, no weights, no shuffling. `pread_bytes_per_s` is its bare `preadv`.
    `local_stream_float32_over_loop`: the same with batches widened to float32, over the loop in the stored
    dtype.
s3_stream_over_get
    The same stream from S3 (MinIO, started for the run) over bare `obstore.get_range` of the same ranges
    with the same number in flight, replies discarded. A real S3 server does not use its reader's cores, so
    each of the two gets half of them. A server that AWS_ENDPOINT_URL names is used as it is.
    `s3_shared_stream_over_get`: with MinIO on all the cores of the stream. If cores are few, this ratio is
    that of the CPU seconds of both sides, including the server's (`..._cpu`; `..._own_cpu` excludes them,
    `s3_shared_cpu_s_per_gb` lists all), and shows the cost of checking and shuffling compared to a loop that
    does neither. `s3_shared_least_over_get` is the best possible value: the bare ranges, crc32c of each slice
    in its reply, and as many rows gathered as the epoch has, from buffers that nothing is copied to.
commit_over_loop
    `commit_unit` over its least work on as many threads (three): SHA-256 of the shard in one thread, its
    crc32c in another, while the third writes it with fsync (`LocalStore.put_new`).
    `commit_over_serial_loop`: the same three one after another.

Findings (CPU ms per GB, 2 cores of an EPYC, alone on the machine; predictions before measurements)
    A GB took the stream 550 with 1.5 cores busy, the loop 410. crc32c held the interpreter's lock, and even
    with it released a fifth was spent, by perf, on switching between ten threads that wanted the lock. With
    batches handed over in runs of 4 MB, and no more threads than cores, which also gather, 465 were
    predicted: 490 to 500 measured, and `local_stream_over_loop` 0.81 instead of 0.62 (0.75 before several
    lanes were shuffled at a time). The loop became faster by a third meanwhile: it has as few threads, and
    full garbage collections, which mostly fell into it, are off. What a stream does beyond the loop:
    shuffling 30, the consumer's thread 30, Python. POSIX_FADV_WILLNEED costs 70 if everything is cached; runs
    of 2 MB and of 8 MB were slower than of 4.
    Slices received 2 MB at a time, a run of batches gathered in one go, three runs of 2.5 MB ahead instead of
    two of 4 (a thread that had finished its run waited for the consumer to ask), and one Philox generator
    that is set for each lane instead of a new one (which asks the system for entropy: 35 us): a tenth was
    predicted of all four. Alternately with the former code, on the same buffers and a slower day: 0.75
    before, 0.81 after.
    From MinIO a GB took 700 of the stream's own where the bare loop takes 380. A slice filled in one call,
    asleep in the kernel, and requests of 16 MB (fewer to sign, answer and parse) were predicted to make it
    550 and the ratio on shared cores 0.8: 590 and 0.72 measured, instead of 0.64. The rest is the gather
    (most of it), which a bare range does not need, crc32c and the shuffle: without all three the ratio is 1.
    `s3_shared_least_over_get` shows what any loader could reach there, about 0.7; on cores of its own the
    stream keeps up with the server. No help: fewer threads, smaller socket buffers, fewer wakes
    (SO_RCVLOWAT), crc32c under the interpreter's lock, touching rows before they are gathered, turns in runs
    of 2 to 8 neighbouring rows, a consumer that assembles what no thread has begun.
    Writing rows to their final place while they are read (a scatter instead of the gather) was predicted to
    save 50 and to cost 80 more; it was dropped.
    A commit took 1,650 where the loop takes 980: statistics 350, encoding (a copy) 140, checking for NaN 80.
    Pieces are now written unjoined (`os.writev`, no copy); statistics work in place, check for NaN on the
    way, and run beside the digest: 0.75 predicted for `commit_over_loop_cpu`, 0.81 measured.
    In wall time, ms per shard of 150 MB on two idle cores: SHA-256 takes 85, statistics 50, writing 40,
    fsync 45 to 65 of waiting, crc32c 13. The digest began after the crc32c, and the statistics took a core
    from it and from the writing. Now the digest begins with the first slice, the writing follows, and the
    statistics are computed while fsync waits: 0.85 to 0.9 predicted for `commit_over_loop`, 0.79 before, 0.88
    and 0.86 measured. The CPU time is unchanged. Separate squares of even and odd values would save 9 of the
    50 and change the last bits of receipts; that was dropped.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.commits import commit, opening, order_arithmetic
from benchmarks.floors import HOOK
from benchmarks.report import write_report
from benchmarks.streams import local_stream, s3_streams
from winnow.store.testing import make_plan


def main() -> None:
    """Parse the command line, measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--units", type=int, default=12, help="training units")
    parser.add_argument("--group-units", type=int, default=6, help="units U shuffled together")
    parser.add_argument("--windows-per-unit", type=int, default=256, help="windows W per unit")
    parser.add_argument("--commit-windows", type=int, default=1024, help="windows W in a committed unit")
    parser.add_argument("--context-length", type=int, default=128, help="tokens T per window")
    parser.add_argument("--d-model", type=int, default=576, help="width D")
    parser.add_argument("--batch-rows", type=int, default=1024, help="rows B per batch")
    parser.add_argument("--prefetch", type=int, default=8, help="range requests in flight")
    parser.add_argument("--rounds", type=int, default=5, help="measurements per figure")
    parser.add_argument("--open-units", type=int, default=100_000, help="units of the dataset to open")
    parser.add_argument("--folder", help="where the data goes; the system's temporary folder by default")
    parser.add_argument(
        "--only", nargs="*", choices=["stream", "s3", "commit", "open", "order"], help="measure these alone"
    )
    options = parser.parse_args()
    print(json.dumps(write_report("store", measure(options), options.json), indent=1))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all figures, or those of `--only`."""
    wanted = options.only or ["stream", "s3", "commit", "open", "order"]
    plan = make_plan(
        units=options.units + 1,
        windows_per_unit=options.windows_per_unit,
        context_length=options.context_length,
        hooks={HOOK: options.d_model},
    )
    result: dict[str, Any] = {"sizes": {k: v for k, v in vars(options).items() if isinstance(v, int)}}
    before = torch.get_num_threads()
    # One thread, so that torch's own do not compete with the stream's.
    torch.set_num_threads(1)
    # A full collection traverses all of torch: 100 ms, and mostly in a floor.
    gc.collect()
    gc.freeze()
    try:
        with tempfile.TemporaryDirectory(prefix="winnow-bench-", dir=options.folder) as folder:
            if "stream" in wanted:
                result |= local_stream(f"{folder}/local", plan, options)
            if "commit" in wanted:
                result |= commit(f"{folder}/commit", options)
            if "open" in wanted:
                result |= opening(f"{folder}/open", options.open_units)
        if "s3" in wanted:
            result |= s3_streams(plan, options)
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)
    return result | (order_arithmetic() if "order" in wanted else {})


if __name__ == "__main__":
    main()
