"""A whole training step over the one dense product that it needs.

The floor is `torch.mm(x, W_enc.T, out=...)` into a reused buffer. A round times the floor right before each
case, and the figures are medians of the rounds' ratios, since shared machines drift.

    python -m benchmarks.train_step --json OUT [--rounds 15] [--peer-rounds 5] [--no-peers]
    python -m benchmarks.train_step --routes [--before DIR] [--json OUT]  # see benchmarks/routes.py

- `step_over_product`: normalisation, loss, every gradient, clipping (it acts on every step), Adam,
  renormalisation, moving average and dead counts, without AuxK.
- `step_over_product_dead10`: the same with a tenth of the latents dead and AuxK on, k_aux 256.
- `eager_over_product`, `eager_over_product_dead10`: the eager step on the same tensors.
- `quickstart`: all of these at the quickstart's size, where fixed costs show.
- `peers`: the other libraries' own steps over the same product, by name, in their environment (after
  `make peers`; on a CPU); `winnow` is ours measured there, `peers_over_winnow` the quotients.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import routes
from benchmarks.peers import environment, installed
from benchmarks.report import write_report
from winnow.common.device import torch_settings
from winnow.sae.init import initialise
from winnow.sae.model import Sae
from winnow.schemas.training import TrainSpec
from winnow.trainer.kernels import choose
from winnow.trainer.step import Recipe, Run, train_step


class Size(NamedTuple):
    """Rows B, width D, latents N, active latents K."""

    rows: int
    width: int
    latents: int
    k: int


SIZES = {
    "full": Size(4096, 576, 16384, 32),
    "quickstart": Size(2048, 576, 4096, 32),
    "tiny": Size(64, 24, 128, 4),
    "quickstart-tiny": Size(32, 24, 64, 4),
}
AUXK = 256
DEAD_SHARE = 0.1


def make_run(size: Size, kernels: str, device: torch.device, *, auxk: bool, **fields: object) -> Run:
    """A run in mid-training: initialised, with the state of Adam and of the average; `fields` override."""
    spec = TrainSpec.model_validate(
        {
            "out": "unused",
            "hook": "benchmark.0",
            "latents": size.latents,
            "k": size.k,
            "batch_rows": -(-size.rows // 64) * 64,
            "epochs": 10_000,
            # Below every gradient's norm, so that clipping acts on every step that is timed.
            "clip_norm": 1e-4,
            "auxk_k": min(AUXK, size.latents),
            "auxk_coefficient": 1 / 32 if auxk else 0.0,
            "dead_after_tokens": 10_000_000,
            "kernels": kernels,
            "device": str(device),
        }
        | fields
    )
    sae = Sae(size.width, size.latents, size.k, spec.normalize, device=device)
    sample = torch.randn(512, size.width, generator=torch.Generator().manual_seed(1))
    constant = initialise(sae, sample, torch.ones(512), seed=0)
    return Run(sae, Recipe.resolve(spec, size.width, steps_per_epoch=1), constant)


def cases_of(size: Size, device: torch.device, *, eager: bool) -> dict[str, Callable[[], object]]:
    """One step of each kind, by the name of its figure."""
    rows = torch.randn(size.rows, size.width, generator=torch.Generator().manual_seed(2)).to(device)
    weights = torch.ones(size.rows, device=device)
    silent = torch.arange(0, size.latents, round(1 / DEAD_SHARE), device=device)
    cases: dict[str, Callable[[], object]] = {}

    def add(name: str, kernels: str, *, auxk: bool) -> None:
        run = make_run(size, kernels, device, auxk=auxk)

        def step() -> None:
            # Again before each step: AuxK and Adam wake some of them.
            run.dead.since[silent] = run.recipe.dead_after
            train_step(run, rows, weights)

        cases[name] = step

    add("step_over_product", "auto", auxk=False)
    add("step_over_product_dead10", "auto", auxk=True)
    if eager:
        add("eager_over_product", "eager", auxk=False)
        add("eager_over_product_dead10", "eager", auxk=True)
    return cases


def measure(size: Size, rounds: int, device: torch.device, *, eager: bool) -> dict[str, Any]:
    """Medians of paired ratios, the floor in seconds, and the quartiles of every ratio."""
    x = torch.randn(size.rows, size.width, device=device)
    W = torch.randn(size.latents, size.width, device=device)
    out = torch.empty(size.rows, size.latents, device=device)

    def product() -> None:
        torch.mm(x, W.T, out=out)

    cases = cases_of(size, device, eager=eager)
    ratios: dict[str, list[float]] = {name: [] for name in cases}
    floor: list[float] = []
    for number in range(rounds + 1):
        for name, case in cases.items():
            below, above = seconds(product, device), seconds(case, device)
            # The first round warms up.
            if number:
                floor.append(below)
                ratios[name].append(above / below)
    figures: dict[str, Any] = {name: statistics.median(values) for name, values in ratios.items()}
    figures["product_seconds"] = statistics.median(floor)
    figures["quartiles"] = {
        name: statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        for name, values in ratios.items()
    }
    return figures | size._asdict()


def peers_beside(size: str, rounds: int, threads: int) -> dict[str, Any]:
    """The figures of `benchmarks.peer_steps`, in a process of its own."""
    # There the peers' packages come first on the import path; here they must not.
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peers.json"
        module = [sys.executable, "-m", "benchmarks.peer_steps", "--json", str(out), "--size", size]
        command = [*module, "--rounds", str(rounds), "--threads", str(threads)]
        subprocess.run(command, env=environment(), stdout=sys.stderr, check=True)
        return json.loads(out.read_text())


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call to its end on the device: wall-clock, or CPU time if there is one CPU thread."""
    # A thread's CPU time is not affected by other work, but with several threads it would miss theirs.
    clock = time.thread_time if torch.get_num_threads() == 1 and device.type == "cpu" else time.perf_counter
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    """Measure, print, write."""
    if "--routes" in sys.argv:
        routes.main([word for word in sys.argv[1:] if word != "--routes"])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument(
        "--routes", action="store_true", help="the gates of `benchmarks.routes`, whose flags follow"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peer-rounds", type=int, default=5, help="rounds of the other libraries' steps")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["full", "quickstart"])
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--no-eager", action="store_true", help="leave the eager step out")
    parser.add_argument("--no-peers", action="store_true", help="leave the other libraries' steps out")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # A collection in mid-round would be charged to whichever case it falls into.
    gc.disable()
    first, *rest = args.sizes
    # The settings of a training run.
    with torch_settings(device, torch.get_num_threads()):
        result = measure(SIZES[first], args.rounds, device, eager=not args.no_eager)
        result |= {name: measure(SIZES[name], args.rounds, device, eager=not args.no_eager) for name in rest}
    result |= {"kernels": choose("auto", device), "threads": torch.get_num_threads(), "rounds": args.rounds}
    if not args.no_peers and device.type == "cpu":
        if installed():
            result |= peers_beside(first, args.peer_rounds, args.threads)
        else:
            print("the peers are left out: `make peers` installs them", file=sys.stderr)
    print(json.dumps(write_report("train_step", result, args.json), indent=1))


if __name__ == "__main__":
    main()
