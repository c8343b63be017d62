"""Each peer's training step over the plain product of its shapes, and Winnow's in the same process.

    python -m benchmarks.peers -- python -m benchmarks.peer_steps --json OUT [--size full] [--rounds 15]

`benchmarks.train_step` runs this if the peers are installed and includes the result as `peers`. Every step is
on the same tensors, single precision, no latent dead; it includes normalisation, gradients, optimiser and
constraints as the library has them. A round times the product right before each step; figures are medians of
the rounds' ratios.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.peer_trainers import PEERS, Job
from benchmarks.train_step import SIZES, Size, cases_of, seconds
from winnow.common.device import torch_settings

OURS = "winnow"


def measure_peers(size: Size, rounds: int) -> dict[str, Any]:
    """`peers`: name -> step over product; `winnow`: ours; `peers_over_winnow`: the quotients."""
    device = torch.device("cpu")
    x = torch.randn(size.rows, size.width)
    W, out = torch.randn(size.latents, size.width), torch.empty(size.rows, size.latents)

    def product() -> None:
        torch.mm(x, W.T, out=out)

    ratios: dict[str, list[float]] = {}
    # One after another, because some hold gigabytes.
    for name in (OURS, *PEERS):
        case = _case(name, size)
        for number in range(rounds + 1):
            below, above = seconds(product, device), seconds(case, device)
            # The first round warms up.
            if number:
                ratios.setdefault(name, []).append(above / below)
        del case
        gc.collect()
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    ours = medians.pop(OURS)
    return {
        "peers": medians,
        OURS: ours,
        "peers_over_winnow": {name: value / ours for name, value in medians.items()},
        "peers_rounds": rounds,
    }


def _case(name: str, size: Size) -> Callable[[], object]:
    if name == OURS:
        return cases_of(size, torch.device("cpu"), eager=False)["step_over_product"]
    rows = torch.randn(size.rows, size.width, generator=torch.Generator().manual_seed(2))
    peer = PEERS[name](Job(size.width, size.latents, size.k, size.rows, rows))
    return lambda: peer.step(rows)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    # The settings of a training run of ours, for the peers too.
    with torch_settings(torch.device("cpu"), torch.get_num_threads()):
        figures = measure_peers(SIZES[args.size], args.rounds)
    args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
