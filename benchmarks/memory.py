"""Memory that `encode_topk` adds, and whether saving it costs time.

    python -m benchmarks.memory --json OUT [--rounds 5] [--threads 0] [--tiny]

- `encode_topk_extra_mib`: peak memory while it runs, minus what was allocated before and its outputs. On a
  CPU the process's peak RSS after a reset (Linux), on a GPU the allocator's peak.
- `dense_extra_mib`: the same for `torch.addmm(...).topk(k)`, which holds [B, N].
- `encode_topk_over_dense`: time over product and top-k into a buffer that exists already; median of paired
  rounds.
- `million`: memory and seconds of `encode_topk` alone at N = 1,048,576.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import write_report
from benchmarks.train_step import seconds
from winnow.trainer.kernels import choose, encode_topk

ROWS, WIDTH, K = 1024, 576, 32
LATENTS, MILLION = 262_144, 1_048_576
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def extra_mib(call: Callable[[], tuple[Tensor, ...]], device: torch.device) -> float:
    """Peak memory of a call, minus what was allocated before and what it returns, in MiB."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outputs = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        # 5 resets VmHWM, the process's peak, to what is resident now (man 5 proc).
        RESET.write_text("5")
        before = _status("VmRSS")
        outputs = call()
        peak = _status("VmHWM")
    returned = sum(tensor.numel() * tensor.element_size() for tensor in outputs)
    return (peak - before - returned) / 2**20


def _status(key: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return int(lines[key].split()[0]) * 1024


def measure(rows: int, width: int, latents: int, million: int, rounds: int) -> dict[str, Any]:
    """All figures of the benchmark."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = choose("auto", device)
    x = torch.randn(rows, width, device=device)
    figures: dict[str, Any] = {"rows": rows, "width": width, "k": K, "kernels": backend}

    def problem(count: int) -> tuple[Tensor, Tensor]:
        W = torch.randn(count, width, device=device).mul_(width**-0.5)
        return W, torch.zeros(count, device=device)

    W, b = problem(latents)
    # A small call first: threads of the libraries and compiled code stay in memory, and are not its cost.
    encode_topk(x[:64], W[:1024], b[:1024], K, backend)

    def sparse() -> tuple[Tensor, ...]:
        return encode_topk(x, W, b, K, backend)

    def dense() -> tuple[Tensor, ...]:
        return tuple(torch.addmm(b, x, W.T).topk(K, dim=1))

    figures |= {"latents": latents, "encode_topk_extra_mib": extra_mib(sparse, device)}
    figures["dense_extra_mib"] = extra_mib(dense, device)
    figures |= over_dense(sparse, x, W, b, rounds)

    W, b = problem(million)
    found: list[Tensor] = []
    took: list[float] = []

    def timed() -> tuple[Tensor, ...]:
        took.append(seconds(lambda: found.extend(sparse()), device))
        return tuple(found)

    extra = extra_mib(timed, device)
    figures["million"] = {"latents": million, "encode_topk_extra_mib": extra, "seconds": took[0]}
    return figures


def over_dense(sparse: Callable[[], object], x: Tensor, W: Tensor, b: Tensor, rounds: int) -> dict[str, Any]:
    """Paired times of `sparse` over the product into a buffer, and its top-k."""
    # [B, N] is allocated once, outside the clock: fetching 1 GB of fresh pages per call would flatter us.
    held = torch.empty(len(x), len(W), device=x.device)
    ratios: list[float] = []
    for number in range(rounds + 1):
        below = seconds(lambda: torch.addmm(b, x, W.T, out=held).topk(K, dim=1), x.device)
        above = seconds(sparse, x.device)
        # The first round warms up.
        if number:
            ratios.append(above / below)
    return {
        "encode_topk_over_dense": statistics.median(ratios),
        "ratios": ratios,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes = (64, 24, 16_384, 32_768) if args.tiny else (ROWS, WIDTH, LATENTS, MILLION)
    print(json.dumps(write_report("memory", measure(*sizes, rounds=args.rounds), args.json), indent=1))


if __name__ == "__main__":
    main()
