"""All measurements that need a GPU, in one command of under ten minutes.

    python -m benchmarks.gpu --json OUT [--rounds 15] [--tests EXPRESSION | --no-tests]
    python -m benchmarks.gpu --list
    TRITON_INTERPRET=1 python -m benchmarks.gpu --tiny --json OUT

Needs torch, Triton, numpy, pydantic, safetensors and pyyaml, and pytest alone for the tests; no ray, zarr or
transformers. The result is written after every part, so that earlier figures are kept if a later part fails.
`--list` prints every figure and what it is. `--tiny` runs all of it at a toy size without a GPU, by the same
kernels if they are interpreted; its figures mean nothing.

1. `tests`: those of the kernels in `tests/gpu`; a failure ends the command. `exact`: on rows of all chunks
   that the encoder cuts a batch into, how far the kernels are from their dense equivalents.
2. `sizes`: medians of paired ratios to torch's bfloat16 product of the shape, and the parts of a step.
   The product writes [B, N] into a reused buffer, which no step needs: an encoder may take less than it.
3. `sets`: the same of transcoder sets, over the bfloat16 products of all their encoders, and their peak.
4. `memory`: peak bytes of a step over `winnow estimate`.

Random rows make all latents equally active, which no real dictionary is. In `skewed` data some latents are
active in every row, the others' frequencies spread over orders of magnitude, and nearly half of the active
ones lie together. Dead latents are quiet: at every step a tenth is silent, few of them are above 0, and none
is among the best K.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import set_step
from benchmarks.report import write_report
from benchmarks.train_step import AUXK, DEAD_SHARE, Size, make_run, seconds
from winnow.common.device import torch_settings
from winnow.schemas.training import TrainSpec
from winnow.trainer.kernels import Backend, choose, encode_topk, reference
from winnow.trainer.kernels.segment_grad import chunk_size, segments_of
from winnow.trainer.kernels.step_ops import Dead, step_ops
from winnow.trainer.plan.memory import gpu_memory
from winnow.trainer.plan.paper import step_on_paper
from winnow.trainer.plan.rates import GPUS, Rates, parts_of
from winnow.trainer.step import Run, train_step
from winnow.trainer.step.spans import sampling

ROOT = Path(__file__).parents[1]
SIZES = [Size(65_536, 768, 131_072, 32), Size(16_384, 768, 131_072, 32)]
MILLION = Size(16_384, 768, 1_048_576, 32)
# One latent is active in every row, and has more entries than a chunk. The interpreter's time is by rows and
# latents.
TINY, TINY_HERE, TINY_MILLION = [Size(132, 16, 32, 4)], Size(16, 16, 32, 4), Size(16, 16, 48, 4)
SET, TINY_SET = set_step.Size(12, 768, 16_384, 32, 16_384), set_step.Size(2, 16, 32, 4, 16)
CHECKED_ROWS = 256
"""Rows on which kernels are compared with their dense equivalents."""
PYTEST = ["-m", "pytest", "-c", "benchmarks/gpu.ini", "--rootdir=.", "--confcutdir=tests/gpu"]
TESTS = [f"tests/gpu/test_{name}.py" for name in ("triton", "fused_ops", "auxk", "bounded", "cross")]
OPTIONS = ["--no-skips", "-q", "-p", "no:cacheprovider"]
SPREAD = 0.5
"""Of `skewed` biases, in standard deviations of the pre-activations."""
QUIET = -1.5
"""The bias of dead latents in the same: 7 % of their pre-activations are above 0."""


class Case(NamedTuple):
    """A figure of `sizes`."""

    what: str
    step: bool = True
    """Of a whole step; else of `encode_topk`."""
    auxk: bool = False
    skewed: bool = False
    compute_dtype: str = "bfloat16"


STEP = "a step with bfloat16 products, float32 Adam, clipping and average, over the product"
RATIOS = {
    "encode_topk_over_product": Case("`encode_topk` of bfloat16 operands over the product", step=False),
    "encode_topk_over_product_skewed": Case("the same on skewed data", step=False, skewed=True),
    "encode_topk_over_product_dead10": Case(
        "`encode_topk` that also writes every number of a tenth of the latents", step=False, auxk=True
    ),
    "step_over_product": Case(STEP),
    "step_over_product_skewed": Case("the same on skewed data", skewed=True),
    "step_over_product_dead10": Case("the same with AuxK and a tenth dead", auxk=True),
    "step_over_product_dead10_skewed": Case("the same on skewed data", auxk=True, skewed=True),
    "float32_step_over_product": Case("a step in float32 over the bfloat16 product", compute_dtype="float32"),
}
"""Each with its `quartiles`."""
SIZE_FIGURES = {
    "float32_step_over_float32_product": "the same over a float32 product",
    "step_seconds": "of `step_over_product`",
    "product_seconds": "the bfloat16 product",
    "float32_product_seconds": "the float32 product",
    "items": "parts of the step: operations, bytes, FLOP, seconds at the rates of `card`, measured seconds",
}


class SetCase(NamedTuple):
    """A part of `sets`."""

    what: str
    cross: bool = True
    auxk: bool = False


SETS = {
    "cross-layer": SetCase("a step of a cross-layer set of 12 layers"),
    "cross-layer, a tenth dead": SetCase("the same with AuxK and a tenth dead", auxk=True),
    "per-layer": SetCase("the steps of a per-layer set of 12 layers, one after another", cross=False),
}
SET_FIGURES = {
    "step_over_products": "over the bfloat16 products of its encoders",
    "quartiles": "of these ratios",
    "step_seconds": "",
    "products_seconds": "of its encoders",
    "peak_over_estimate": "of memory",
}
EXACT = {
    "encode_topk": "largest difference from the dense equivalent, over its largest number",
    "encode_topk_other_latents": "share of entries that name another latent",
    "decode": "as for `encode_topk`",
    "decode_grad_values": "as for `encode_topk`",
    "segment_grad": "as for `encode_topk`",
    "hot_latents": "latents whose sums were taken in chunks and joined",
}
HALF: dict[str, object] = {"compute_dtype": "bfloat16"}
MEMORY: dict[str, tuple[bool, dict[str, object]]] = {
    "here": (False, HALF),
    "here, a tenth dead": (False, HALF | {"auxk": True}),
    "here, float32": (False, {}),
    "million": (True, HALF),
    "million, int8 moments, in four parts": (True, HALF | {"moments": "int8", "accumulate": 4}),
}
"""Name -> whether N is 1,048,576, and fields of the spec."""


def listing(sizes: Sequence[Size]) -> dict[str, str]:
    """Every figure by its path in the result, and what it is."""
    kinds = ("float32", "bfloat16", "float32_skewed", "bfloat16_skewed")
    found = {"tests.triton": f"whether {' and '.join(TESTS)} pass on the card"}
    found |= {f"exact.{kind}.{name}": what for kind in kinds for name, what in EXACT.items()}
    found["card.rates"] = "FLOP/s of the bfloat16 product, bytes/s of a copy"
    told = {name: case.what for name, case in RATIOS.items()} | SIZE_FIGURES
    found |= {f"sizes.{size.rows}.{name}": what for size in sizes for name, what in told.items()}
    found |= {
        f"sets.{name}.{figure}": ": ".join(filter(None, (case.what, what)))
        for name, case in SETS.items()
        for figure, what in SET_FIGURES.items()
    }
    found["sets.cross-layer.items"] = SIZE_FIGURES["items"]
    for name, (million, fields) in MEMORY.items():
        size = MILLION if million else SIZES[0]
        given = ", ".join(f"{key} {value}" for key, value in fields.items())
        found[f"memory.{name}"] = (
            f"peak over estimate, B = {size.rows:,}, N = {size.latents:,}; {given or 'float32'}"
        )
    return found


def test(expression: str) -> dict[str, Any]:
    """Run those of the kernels' tests that pytest's `-k EXPRESSION` selects; all by an empty one.

    Returns whether they passed, and their last line.
    """
    # In a process of its own, whose GPU memory and settings end with it.
    done = subprocess.run(
        [sys.executable, *PYTEST, *TESTS, *OPTIONS, "-k", expression],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout[-4000:], file=sys.stderr)
    return {"passed": done.returncode == 0, "said": done.stdout.strip().splitlines()[-1:]}


def skewed(size: Size, deviation: float, device: torch.device) -> Tensor:
    """A bias [N]: K / 8 latents are active in every row, and nearly half of the others in a prefix.

    The frequencies of all of them spread over orders of magnitude.

    Args:
        size: Of the dictionary.
        deviation: The standard deviation of its pre-activations, which are normal.
        device: Where the bias is made.
    """
    draws = torch.Generator().manual_seed(5)
    b = SPREAD * torch.randn(size.latents, generator=draws)
    # of N / 128 latents K / 2 are above the threshold of the K best of N
    prefix = max(1, size.latents // 128)
    # of bias and pre-activation together
    normal = torch.distributions.Normal(0.0, (1 + SPREAD**2) ** 0.5)
    shares = torch.tensor([size.k / size.latents, size.k / 2 / prefix]).clamp(max=0.9)
    threshold, within = normal.icdf(1 - shares).tolist()
    b[:prefix] += threshold - within
    b[prefix :: max(1, size.latents // max(1, size.k // 8))] += 8
    return (b * deviation).to(device)


def exactness(
    size: Size, device: torch.device, backend: Backend, dtype: torch.dtype, *, skew: bool
) -> dict[str, float]:
    """Largest difference of each kernel from its dense equivalent, over the equivalent's largest number."""
    ops = step_ops(backend, "bfloat16" if dtype == torch.bfloat16 else "float32")
    x, W = (torch.randn(n, size.width, device=device) for n in (size.rows, size.latents))
    x, W = ops.low(x), ops.low(W * size.width**-0.5)
    b = skewed(size, 1.0, device) if skew else torch.zeros(size.latents, device=device)
    values, indices, _ = ops.encode(x, W, b, size.k, None)
    # of the first chunk of rows to the last
    checked = torch.linspace(0, size.rows - 1, min(CHECKED_ROWS, size.rows), device=device).long()
    x, values, indices = x[checked], values[checked], indices[checked]
    expected, where = reference.encode_topk(x, W, b, size.k)
    segments = segments_of(indices, size.latents)
    flat = values.flatten()[segments.order]
    dots = reference.decode_grad_values(x, indices, W).flatten()[segments.order]
    block = slice(0, min(4096, size.latents))
    inside = indices < block.stop
    sums = reference.segment_grad(values * inside, indices * inside, x.to(values.dtype), block.stop)
    found = {
        "encode_topk": (values, expected),
        "decode": (ops.decode(values, indices, W), reference.decode(values, indices, W.to(values.dtype))),
        "decode_grad_values": (ops.dots(x, indices, segments, W), dots),
        "segment_grad": (ops.sums(flat, segments, x, block), sums),
    }
    shares = {name: ((a - e).abs().max() / e.abs().max()).item() for name, (a, e) in found.items()}
    hot = segments.ends.diff() > chunk_size(indices.numel(), size.latents)
    others = (indices != where).double().mean().item()
    return shares | {"encode_topk_other_latents": others, "hot_latents": int(hot.sum())}


def card(size: Size, device: torch.device) -> dict[str, float]:
    """Measured rates of the card: operations per second of a product, bytes per second of a copy."""
    x, W = (torch.randn(n, size.width, device=device).bfloat16() for n in (size.rows, size.latents))
    out = torch.empty(size.rows, size.latents, device=device, dtype=torch.bfloat16)
    source = torch.empty(min(2**28, size.rows * size.latents), device=device)
    target = torch.empty_like(source)
    product = _median(lambda: torch.mm(x, W.T, out=out), device)
    copy = _median(lambda: target.copy_(source), device)
    operations = 2 * size.rows * size.width * size.latents
    return {"bfloat16_flops": operations / product, "bandwidth": 2 * source.nbytes / copy}


def _median(call: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    call()
    return statistics.median(seconds(call, device) for _ in range(rounds))


def stepper(run: Run, rows: Tensor, *, skew: bool = False) -> Callable[[], object]:
    """One step, with a tenth of the latents dead at its start if AuxK is on."""
    weights = torch.ones(len(rows), device=rows.device)
    silent = torch.arange(0, run.sae.latents, round(1 / DEAD_SHARE), device=run.device)
    some = rows[:256].to(run.device) @ run.sae.W_enc.detach()[:4096].T
    size = Size(len(rows), run.sae.d_model, run.sae.latents, run.sae.k)
    deviation, auxk = some.std().item(), run.recipe.spec.auxk_coefficient > 0
    if skew:
        run.sae.b_enc.data += skewed(size, deviation, run.device)
    if auxk:
        run.sae.b_enc.data[silent] = QUIET * deviation

    def step() -> None:
        if auxk:
            run.dead.since[silent] = run.recipe.dead_after
        train_step(run, rows, weights)

    return step


def ratios(
    size: Size, rounds: int, device: torch.device, kernels: Backend, rates: dict[str, float]
) -> dict[str, Any]:
    """Medians of paired ratios to the bfloat16 product, and the step by parts."""
    x, W = (torch.randn(n, size.width, device=device) for n in (size.rows, size.latents))
    half, W_half = x.bfloat16(), W.bfloat16()
    biases = {False: torch.zeros(size.latents, device=device), True: skewed(size, size.width**0.5, device)}
    del W
    out = torch.empty(size.rows, size.latents, device=device, dtype=torch.bfloat16)
    figures: dict[str, Any] = {**size._asdict(), "kernels": kernels, "quartiles": {}}
    floors: list[float] = []
    # One run at a time in memory.
    for name, case in RATIOS.items():
        run = None
        if case.step:
            run = make_run(size, kernels, device, auxk=case.auxk, compute_dtype=case.compute_dtype)
            call = stepper(run, x, skew=case.skewed)
        elif case.auxk:
            ids = torch.arange(0, size.latents, round(1 / DEAD_SHARE), device=device)
            dead = Dead(ids, min(AUXK, len(ids)), dense=True)
            call = partial(step_ops(kernels, "bfloat16").encode, half, W_half, biases[False], size.k, dead)
        else:
            call = partial(encode_topk, half, W_half, biases[case.skewed], size.k, kernels)
        found: list[float] = []
        # The first two compile and warm up.
        first = -2 if device.type == "cuda" else 0
        for number in range(first, rounds):
            below = seconds(lambda: torch.mm(half, W_half.T, out=out), device)
            above = seconds(call, device)
            if number >= 0:
                floors.append(below)
                found.append(above / below)
        figures[name] = statistics.median(found)
        figures["quartiles"][name] = statistics.quantiles(found, n=4) if rounds > 1 else found * 3
        if name == "step_over_product":
            some = min(5, rounds)
            figures["step_seconds"] = statistics.median(seconds(call, device) for _ in range(some))
            took = figures["step_seconds"], some
            figures["items"] = items(size, spec_of(run), call, took, device, rates)
        del run, call
        _clear(device)
    float32 = _float32_product(x, size, device)
    figures["float32_step_over_float32_product"] = (
        figures["float32_step_over_product"] * statistics.median(floors) / float32
    )
    return figures | {"product_seconds": statistics.median(floors), "float32_product_seconds": float32}


def _float32_product(x: Tensor, size: Size, device: torch.device) -> float:
    """Seconds of a step's encoder product in float32, a block of rows after the other."""
    # At once its result would take 34 GB at B = 65,536.
    W = torch.randn(size.latents, size.width, device=device)
    rows = min(8192, size.rows)
    out = torch.empty(rows, size.latents, device=device)
    return _median(lambda: torch.mm(x[:rows], W.T, out=out), device, 3) * size.rows / rows


def spec_of(run: Run | None) -> TrainSpec:
    """The spec of a run that was made."""
    assert run is not None, "every case but the first makes one"
    return run.recipe.spec


def items(
    size: Size | set_step.Size,
    spec: TrainSpec,
    step: Callable[[], object],
    took: tuple[float, int],
    device: torch.device,
    rates: dict[str, float],
) -> dict[str, dict[str, float]]:
    """The step's parts: operations, bytes and FLOP on paper, seconds at the card's rates, measured ones.

    Args:
        size: Of the step.
        spec: Its run's.
        step: Takes one.
        took: Its seconds, and how many steps are taken for the shares of its parts.
        device: Where.
        rates: As `card` gives them.
    """
    paper = step_on_paper(spec, size.width)
    own = Rates.of(GPUS["h100"], fused=1.0)._replace(
        product=rates["bfloat16_flops"], stream=rates["bandwidth"], gather=rates["bandwidth"]
    )
    need = parts_of(((site.part, entry) for site, entry in paper.entries.items()), own)
    shares: dict[str, list[float]] = {name: [] for name in need}
    for _ in range(took[1]):
        with sampling(device) as spans:
            step()
        for name, share in (spans.shares() if spans else {}).items():
            shares.setdefault(name.removeprefix("share_"), []).append(share)
    found: dict[str, dict[str, float]] = {}
    for name, part in need.items():
        # What comes after the last mark has no time of its own.
        if not shares[name]:
            continue
        taken = statistics.median(shares[name]) * took[0]
        numbers: dict[str, float] = {"operations": part.operations, "bytes": part.streamed + part.gathered}
        if part.flops:
            numbers["flops"] = part.flops
        found[name] = numbers | {"seconds_at_the_cards_rates": part.seconds, "seconds": taken}
    return found


def memory(
    size: Size, device: torch.device, kernels: Backend, *, auxk: bool = False, **fields: object
) -> dict[str, Any]:
    """Peak bytes of two steps over the estimate; the peak is None without CUDA's allocator."""
    _clear(device)
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    run = make_run(size, kernels, device, auxk=auxk, **fields)
    # Accumulated micro-batches are sent to the GPU one by one; otherwise the next batch arrives during a step
    # and is part of the peak.
    host = run.recipe.spec.accumulate > 1
    rows = torch.randn(size.rows, size.width, device="cpu" if host else device)
    _ahead = None if host else torch.empty_like(rows)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step = stepper(run, rows)
    step()
    took = seconds(step, device)
    peak = torch.cuda.max_memory_allocated() - before if cuda else None
    # with AuxK, the estimate takes a tenth to be dead
    said = gpu_memory(run.recipe.spec, size.width, stored="float32")
    return {
        **size._asdict(),
        **fields,
        "auxk": auxk,
        "step_seconds": took,
        "peak": peak,
        "estimate": said.total,
        "peak_over_estimate": None if peak is None else peak / said.total,
        "card": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "parts": said._asdict(),
    }


def set_steps(
    case: SetCase,
    size: set_step.Size,
    rounds: int,
    device: torch.device,
    kernels: Backend,
    rates: dict[str, float],
) -> dict[str, Any]:
    """Medians of paired ratios of a set's step to the bfloat16 products of its encoders, and its peak."""
    cuda = device.type == "cuda"
    x, W = (torch.randn(n, size.width, device=device).bfloat16() for n in (size.rows, size.latents))
    out = torch.empty(size.rows, size.latents, device=device, dtype=torch.bfloat16)

    def products() -> None:
        for _ in range(size.layers):
            torch.mm(x, W.T, out=out)

    before = torch.cuda.memory_allocated() if cuda else 0
    fields: dict[str, object] = {"kernels": kernels, "device": str(device), **HALF}
    if case.auxk:
        fields |= {"auxk_coefficient": 1 / 32, "auxk_k": min(AUXK, size.latents // 2)}
    runs = set_step.make_runs(size, cross=case.cross, **fields)
    data = set_step.Data.of(size, size.rows, seed=2)
    inputs, targets = ([rows.to(device) for rows in some] for some in (data.inputs, data.targets))
    # the next batch, which arrives during a step
    _ahead = [torch.empty_like(rows) for rows in (*inputs, *targets)]
    # weights are read on the host first
    data = set_step.Data(inputs, targets, data.weights)
    silent = torch.arange(0, size.latents, round(1 / DEAD_SHARE), device=device)
    if case.auxk:
        for run, rows in zip(runs, inputs, strict=True):
            deviation = (rows[:256] @ run.sae.W_enc.detach().T).std()
            run.sae.b_enc.data[silent] = QUIET * deviation

    def step() -> None:
        for run in runs if case.auxk else ():
            run.dead.since[silent] = run.recipe.dead_after
        set_step.take(runs, data, cross=case.cross)

    found: list[tuple[float, float]] = []
    for number in range(-2 if cuda else 0, rounds):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        pair = seconds(products, device), seconds(step, device)
        found += [pair] if number >= 0 else []
    peak = torch.cuda.max_memory_allocated() - before if cuda else None
    ratios = [above / below for below, above in found]
    spec = set_step.spec_of(size, cross=case.cross, **fields)
    estimate = gpu_memory(spec, size.width, stored="float32").total
    figures: dict[str, Any] = {
        **size._asdict(),
        "step_over_products": statistics.median(ratios),
        "quartiles": set_step.quartiles(ratios),
        "products_seconds": statistics.median(below for below, _ in found),
        "step_seconds": statistics.median(above for _, above in found),
        "peak": peak,
        "estimate": estimate,
        "peak_over_estimate": None if peak is None else peak / estimate,
    }
    if case.cross and not case.auxk:
        taken = figures["step_seconds"], min(5, rounds)
        figures["items"] = items(size, spec, step, taken, device, rates)
    return figures


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    """Test, measure, write; exits with 1 if a test or a part fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--rounds", type=int, help="of every ratio; default 15, with --tiny 1")
    parser.add_argument("--kernels", help="default auto; under TRITON_INTERPRET=1 triton")
    tests = parser.add_mutually_exclusive_group()
    tests.add_argument("--tests", default="", metavar="EXPRESSION", help="only these, as pytest's -k selects")
    tests.add_argument("--no-tests", action="store_true", help="do not run pytest")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test; on a CPU without a GPU")
    parser.add_argument("--list", action="store_true", help="print every figure and what it is; needs no GPU")
    args = parser.parse_args()
    if args.list:
        for name, what in listing(SIZES).items():
            print(f"{name}: {what}")
        return
    if not args.tiny and not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device; --tiny runs its logic on a CPU", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Deterministic algorithms of cuBLAS require it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with torch_settings(device, torch.get_num_threads()):
        measure(args, device)


def measure(args: argparse.Namespace, device: torch.device) -> None:
    """Measure all parts; each is written when it is done."""
    # without a GPU `auto` takes a CPU's kernels, also where Triton's can be interpreted
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    kernels = choose(args.kernels or ("triton" if interpreted else "auto"), device)
    sizes = TINY if args.tiny else SIZES
    here, million = (TINY_HERE, TINY_MILLION) if args.tiny else (SIZES[0], MILLION)
    rounds = args.rounds or (1 if args.tiny else 15)
    started, figures = time.monotonic(), dict[str, Any]()
    failed: list[str] = []

    def keep(part: str, name: str, make: Callable[[], Any]) -> None:
        """Measure and write one part; an error is recorded, and the other parts are still measured."""
        try:
            found = make()
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{part} {name}")
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        _clear(device)
        figures.setdefault(part, {})[name] = found
        figures["seconds"] = round(time.monotonic() - started, 1)
        write_report("gpu", figures, args.json)
        print(f"{figures['seconds']:>7} s  {part} {name}: {json.dumps(found)}", file=sys.stderr)

    if not args.no_tests:
        keep("tests", "triton", partial(test, args.tests))
        if not figures["tests"]["triton"].get("passed"):
            sys.exit(1)
    for name, kind in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        for skew, suffix in {False: "", True: "_skewed"}.items():
            keep("exact", name + suffix, partial(exactness, sizes[0], device, kernels, kind, skew=skew))
    keep("card", "rates", partial(card, sizes[-1], device))
    for size in sizes:
        rates = figures["card"]["rates"]
        keep("sizes", str(size.rows), partial(ratios, size, rounds, device, kernels, rates))
    for name, case in SETS.items():
        size = TINY_SET if args.tiny else SET
        keep("sets", name, partial(set_steps, case, size, rounds, device, kernels, figures["card"]["rates"]))
    for name, (large, fields) in MEMORY.items():
        size = million if large else here
        keep("memory", name, partial(memory, size, device, kernels, **fields))
    print(json.dumps(write_report("gpu", figures, args.json), indent=1))
    if failed:
        print(f"benchmarks.gpu: failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
