"""The training step of transcoder sets over the L encoder products, its floor, and over a dense step.

All cases run in one process on the same tensors, in turn; a round times the floor before each of them.
Figures are medians of the rounds' ratios, with quartiles, since shared machines drift.

    python -m benchmarks.set_step --json OUT [--rounds 7] [--clock wall|cpu]
    python -m benchmarks.peers -- python -m benchmarks.set_step --clt-forge CHECKOUT

- `clt_step_over_products`: a whole step of a cross-layer set, all L (L + 1) / 2 decoders: normalisation,
  loss, every gradient, clipping (it acts on every step), Adam, renormalisation, average, dead counts.
- `plt_step_over_products`: L steps of the same kind, of a per-layer set's transcoders.
- `dense_over_winnow`: a dense CLT step as public trainers take it (`Reference`: einsum over all decoders,
  autograd, Adam, clipping; no average) over ours.
- `forge_over_winnow`: a step of CLT-Forge (github.com/LLM-Interp/CLT-Forge; arXiv 2603.21014) over ours, if a
  checkout of it is given: its own model and loss, then Adam and clipping as its trainer calls them. Its codes
  are JumpReLU's, whose number does not change the time of its dense products.
- `clt_traffic_over_products`: moving the bytes that the optimiser of the cross-layer set cannot avoid, with
  no arithmetic: weight, gradient, both moments and average of every weight read, all but the gradient
  written. A floor of memory, where that of products is one of arithmetic; no step can take less than both.
- `clt_peak_mib`, `dense_peak_mib`, `forge_peak_mib`: what a step adds at its peak to weights, Adam's state
  and the average, which are there before it; ours with the gradients' buffers, which live as long as the run.

`--clock cpu` takes the process's CPU time, of all threads, instead of the wall's: on a machine with other
work it is the steadier one, though caches and memory are still shared.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.report import write_report
from winnow.common.device import torch_settings
from winnow.sae.model import Sae
from winnow.schemas.training import TrainSpec
from winnow.trainer.step import Recipe, Run, train_step
from winnow.trainer.step.cross_init import initialise_cross
from winnow.trainer.step.cross_train import train_cross


class Size(NamedTuple):
    """Layers L, width D, latents N and active latents K of each, rows B."""

    layers: int
    width: int
    latents: int
    k: int
    rows: int


SIZES = {"full": Size(12, 576, 2048, 16, 1024), "tiny": Size(3, 16, 64, 4, 64)}
CLIP = 1e-4
"""Below every gradient's norm, so that clipping acts on every step that is timed."""


class Data(NamedTuple):
    """Raw rows [B, D] of every layer, and their weights."""

    inputs: list[Tensor]
    targets: list[Tensor]
    weights: Tensor

    @classmethod
    def of(cls, size: Size, rows: int, seed: int) -> Data:
        """Random rows, of which each target is some function of its layer's input."""
        draws = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(rows, size.width, generator=draws) for _ in range(size.layers)]
        return cls(inputs, [x.roll(1, 1).relu() + x / 2 for x in inputs], torch.ones(rows))


def spec_of(size: Size, *, cross: bool, **fields: object) -> TrainSpec:
    """The spec of a set; `fields` override its own."""
    return TrainSpec.model_validate(
        {
            "out": "unused",
            "set": {"layers": [0, size.layers - 1], "cross": cross},
            "latents": size.latents,
            "k": size.k,
            "batch_rows": -(-size.rows // 64) * 64,
            "epochs": 10_000,
            "clip_norm": CLIP,
            "auxk_coefficient": 0.0,
            "dead_after_tokens": 10_000_000,
            "device": "cpu",
        }
        | fields
    )


def make_runs(size: Size, *, cross: bool, **fields: object) -> list[Run]:
    """The runs of a set, initialised; `fields` as for `spec_of`."""
    spec = spec_of(size, cross=cross, **fields)
    runs: list[Run] = []
    for layer in range(size.layers):
        of = spec.layer_spec(layer)
        parts = of.parts(dict.fromkeys(of.target_hooks, size.width))
        sae = Sae(size.width, size.latents, size.k, spec.normalize, parts, device=torch.device(spec.device))
        runs.append(Run(sae, Recipe.resolve(of, size.width, steps_per_epoch=1), 1.0))
    sample = Data.of(size, 256, seed=1)
    if cross:
        initialise_cross(runs, sample.inputs, sample.targets, sample.weights)
    else:
        for run, x, y in zip(runs, sample.inputs, sample.targets, strict=True):
            # a set of one layer begins as a transcoder does
            initialise_cross([run], [x], [y], sample.weights)
    return runs


def take(runs: list[Run], data: Data, *, cross: bool) -> None:
    """One step of a set."""
    if cross:
        train_cross(runs, data.inputs, data.targets, data.weights)
        return
    for run, x, y in zip(runs, data.inputs, data.targets, strict=True):
        train_step(run, x, data.weights, y)


class Reference:
    """A CLT as public trainers write it: dense codes, einsum over all L (L + 1) / 2 decoders, autograd.

    Args:
        size: Its sizes.
    """

    def __init__(self, size: Size) -> None:
        layers, width, latents = size.layers, size.width, size.latents
        draws = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=draws) / width**0.5)

        self.k = size.k
        self.pairs = [(low, high) for high in range(layers) for low in range(high + 1)]
        self.W_enc, self.b_enc = normal(layers, latents, width), normal(layers, latents)
        self.W_dec, self.b_dec = normal(len(self.pairs), latents, width), normal(layers, width)
        self.adam = torch.optim.Adam([self.W_enc, self.b_enc, self.W_dec, self.b_dec], lr=1e-4, fused=True)

    def step(self, data: Data) -> None:
        """Forward, backward, clipping, Adam."""
        x, y = torch.stack(data.inputs), torch.stack(data.targets)
        pre = torch.einsum("lbd,lnd->lbn", x, self.W_enc) + self.b_enc[:, None]
        kept, at = pre.topk(self.k, dim=2)
        z = torch.zeros_like(pre).scatter(2, at, kept.relu())
        first, made = 0, []
        for high in range(len(x)):
            some = self.W_dec[first : first + high + 1]
            made.append(torch.einsum("lbn,lnd->bd", z[: high + 1], some) + self.b_dec[high])
            first += high + 1
        loss = (torch.stack(made) - y).square().sum(2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([self.W_enc, self.b_enc, self.W_dec, self.b_dec], CLIP)
        self.adam.step()
        self.adam.zero_grad()


class Forge:
    """CLT-Forge's cross-layer transcoder, from a checkout; it wants jaxtyping, as `make peers` installs it.

    Args:
        checkout: Its repository's folder.
        size: Its sizes.
    """

    def __init__(self, checkout: Path, size: Size) -> None:
        source = checkout / "src"
        if not (source / "clt_forge" / "clt.py").is_file():
            raise SystemExit(f"--clt-forge {checkout}: expected a checkout with src/clt_forge/clt.py")
        sys.path.insert(0, str(source))
        from clt_forge.clt import CLT  # pyright: ignore[reportMissingImports]
        from clt_forge.config import CLTConfig  # pyright: ignore[reportMissingImports]

        config = CLTConfig(
            device="cpu", dtype="float32", seed=3, model_name="none", d_in=size.width, d_latent=size.latents,
            n_layers=size.layers, jumprelu_bandwidth=1.0, jumprelu_init_threshold=0.03,
            normalize_decoder=False, dead_feature_window=1000, cross_layer_decoders=True, context_size=16,
            l0_coefficient=1.0,
        )  # fmt: skip
        self.model = CLT(config)
        self.adam = torch.optim.Adam(self.model.parameters(), lr=1e-4)

    def step(self, data: Data) -> None:
        """Forward, backward, clipping, Adam."""
        self.adam.zero_grad()
        inputs, targets = torch.stack(data.inputs, 1), torch.stack(data.targets, 1)
        self.model(inputs, targets, 1.0, 1e-5, return_metrics=False).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP, foreach=False)
        self.adam.step()


def products(size: Size, data: Data) -> Callable[[], object]:
    """The floor: the L products of the encoders, into one buffer."""
    W = torch.randn(size.layers, size.latents, size.width)
    out = torch.empty(size.rows, size.latents)

    def floor() -> None:
        for x, matrix in zip(data.inputs, W, strict=True):
            torch.mm(x, matrix.T, out=out)

    return floor


def traffic(runs: list[Run]) -> Callable[[], object]:
    """Copies of as many bytes as the optimiser reads and writes: 4.5 times each matrix, read and written."""
    matrices = [getattr(run.sae, name).detach() for run in runs for name in ("W_enc", "W_dec")]
    grads = [getattr(run.sae, name).grad for run in runs for name in ("W_enc", "W_dec")]
    averages = [run.ema.sums[name] for run in runs if run.ema for name in ("W_enc", "W_dec")]

    def floor() -> None:
        # a copy reads one and writes one; nine are moved, so four copies and half of one
        for matrix, grad, average in zip(matrices, grads, averages, strict=True):
            half = len(matrix) // 2
            for other in (average, grad, average, grad):
                other.copy_(matrix)
            average[:half].copy_(matrix[:half])

    return floor


def peak_mib(step: Callable[[], object]) -> float:
    """MiB that a step adds to the resident memory, at its peak; sampled every 2 ms."""
    gc.collect()
    before, most, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    done.set()
    watcher.join()
    return (max(most, resident()) - before) / 2**20


def resident() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def measure(
    size: Size, rounds: int, clock: Callable[[], float], dense: bool, forge: Path | None
) -> dict[str, Any]:
    """Medians and quartiles of every ratio, and the peaks."""
    data = Data.of(size, size.rows, seed=2)
    floor = products(size, data)
    clt, plt = make_runs(size, cross=True), make_runs(size, cross=False)

    def clt_step() -> None:
        take(clt, data, cross=True)

    def plt_step() -> None:
        take(plt, data, cross=False)

    cases: dict[str, Callable[[], object]] = {"clt": clt_step, "plt": plt_step}
    if dense:
        reference = Reference(size)
        cases["dense"] = lambda: reference.step(data)
    if forge is not None:
        other = Forge(forge, size)
        cases["forge"] = lambda: other.step(data)
    # after a step, which makes the gradients' buffers; it overwrites averages, whose values change no time
    clt_step()
    cases["clt_traffic"] = traffic(clt)
    ratios: dict[str, list[float]] = {name: [] for name in cases}
    seconds: dict[str, list[float]] = {name: [] for name in ("products", *cases)}
    peaks: dict[str, float] = {}
    for number in range(rounds + 2):
        for name, case in cases.items():
            below = timed(floor, clock)
            if number == 1:
                # the first step made Adam's state; from here on a step allocates what every step does
                peaks[name] = peak_mib(case)
                continue
            above = timed(case, clock)
            # the first round warms up
            if number:
                ratios[name].append(above / below)
                seconds[name].append(above)
                seconds["products"].append(below)
    others = [name for name in cases if name not in ("clt", "plt", "clt_traffic")]
    for name in others:
        pairs = zip(seconds[name], seconds["clt"], strict=True)
        ratios[f"{name}_over_winnow"] = [above / ours for above, ours in pairs]
    steps = {"clt", "plt", *others}
    named = {
        f"{name}_step_over_products" if name in steps else name.replace("traffic", "traffic_over_products"): r
        for name, r in ratios.items()
    }
    return {
        **{name: statistics.median(values) for name, values in named.items()},
        "quartiles": {name: quartiles(values) for name, values in named.items()},
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "clt_peak_mib": peaks["clt"] + gradient_mib(clt),
        **{f"{name}_peak_mib": peaks[name] for name in others},
        **size._asdict(),
    }


def gradient_mib(runs: list[Run]) -> float:
    """MiB of the gradients' buffers, which the first step made."""
    grads = (getattr(run.sae, name).grad for run in runs for name in run.sae.parameter_names)
    return sum(grad.nbytes for grad in grads if grad is not None) / 2**20


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else values * 3


def timed(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    start = clock()
    call()
    return clock() - start


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-dense", action="store_true", help="leave the dense reference out")
    parser.add_argument("--clt-forge", type=Path, help="a checkout of CLT-Forge, whose step is timed too")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    args = parser.parse_args()
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    # a collection in mid-round would be charged to whichever case it falls into
    gc.disable()
    with torch_settings(torch.device("cpu"), args.threads):
        result = measure(SIZES[args.size], args.rounds, clock, not args.no_dense, args.clt_forge)
    result |= {"threads": args.threads, "rounds": args.rounds, "clock": args.clock}
    print(json.dumps(write_report("set_step", result, args.json), indent=1))


if __name__ == "__main__":
    main()
