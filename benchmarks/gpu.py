"""All measurements that need a GPU, in one command of under ten minutes.

    python -m benchmarks.gpu --json OUT [--rounds 15] [--tests EXPRESSION | --no-tests] [--tiny]

Needs torch, Triton, numpy, pydantic, safetensors and pyyaml, and pytest alone for the tests; no ray, zarr or
transformers. The result is written after every part, so that earlier figures are kept if a later part fails.

1. `tests`: `tests/gpu/test_triton.py`; a failure ends the command. `exact`: at full size, in all chunks of
   rows, the largest difference of each kernel from its dense equivalent on some rows, over the largest
   number, in float32 and bfloat16, on even and on skewed data.
2. `sizes`, for each number of rows B at D = 768, N = 131,072, K = 32, medians of paired ratios to torch's
   bfloat16 product of the shape into a reused buffer: `encode_topk_over_product`; `step_over_product` with
   bfloat16 products, float32 Adam, clipping and average; `step_over_product_dead10`;
   `float32_step_over_product`, and over a float32 product. `_skewed`: some latents are active in every row,
   and nearly half of the others lie together; otherwise all are equally active, which no real dictionary is.
   `items`: bytes and operations of the step's parts, their seconds at the rates measured as `card`, and their
   measured seconds.
3. `memory`: peak bytes of a step over `winnow estimate`, at this size and at N = 1,048,576.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import write_report
from benchmarks.train_step import DEAD_SHARE, Size, make_run, seconds
from winnow.common.device import torch_settings
from winnow.schemas.training import TrainSpec
from winnow.trainer.kernels import Backend, choose, encode_topk, reference
from winnow.trainer.kernels.segment_grad import segments_of
from winnow.trainer.kernels.step_ops import step_ops
from winnow.trainer.plan.memory import gpu_memory
from winnow.trainer.plan.paper import step_on_paper
from winnow.trainer.plan.rates import GPUS, Rates, parts_of
from winnow.trainer.step import Run, train_step
from winnow.trainer.step.spans import sampling

ROOT = Path(__file__).parents[1]
SIZES = [Size(65_536, 768, 131_072, 32), Size(16_384, 768, 131_072, 32)]
MILLION = Size(16_384, 768, 1_048_576, 32)
# More entries than a chunk of hot latents has; the interpreter's time is by rows.
TINY, TINY_MILLION = [Size(24, 16, 256, 8)], Size(24, 16, 512, 8)
CHECKED_ROWS = 256
"""Rows on which kernels are compared with their dense equivalents."""
PYTEST = ["-m", "pytest", "-c", "benchmarks/gpu.ini", "--rootdir=.", "--confcutdir=tests/gpu"]
TESTS = ["tests/gpu/test_triton.py", "--no-skips", "-q", "-p", "no:cacheprovider"]


def test(expression: str) -> dict[str, Any]:
    """Run those of the kernels' tests that pytest's `-k EXPRESSION` selects; all by an empty one.

    Returns whether they passed, and their last line.
    """
    # In a process of its own, whose GPU memory and settings end with it.
    done = subprocess.run(
        [sys.executable, *PYTEST, *TESTS, "-k", expression],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout[-4000:], file=sys.stderr)
    return {"passed": done.returncode == 0, "said": done.stdout.strip().splitlines()[-1:]}


def skewed(size: Size, deviation: float, device: torch.device) -> Tensor:
    """A bias [N] by which K / 8 latents are active in every row, and nearly half of the others in a prefix.

    Args:
        size: Of the dictionary.
        deviation: The standard deviation of its pre-activations, which are normal.
        device: Where the bias is made.
    """
    b = torch.zeros(size.latents, device=device)
    # of N / 128 latents K / 2 are above the threshold of the K best of N
    prefix = max(1, size.latents // 128)
    normal = torch.distributions.Normal(0.0, 1.0)
    shares = torch.tensor([size.k / size.latents, size.k / 2 / prefix]).clamp(max=0.9)
    threshold, within = normal.icdf(1 - shares).tolist()
    b[:prefix] = (threshold - within) * deviation
    b[prefix :: max(1, size.latents // max(1, size.k // 8))] += 8 * deviation
    return b


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
    return shares | {"encode_topk_other_latents": (indices != where).double().mean().item()}


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


def stepper(run: Run, rows: Tensor) -> Callable[[], object]:
    """One step, with a tenth of the latents dead at its start if AuxK is on."""
    weights = torch.ones(len(rows), device=rows.device)
    silent = torch.arange(0, run.sae.latents, round(1 / DEAD_SHARE), device=run.device)

    def step() -> None:
        if run.recipe.spec.auxk_coefficient:
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
    cases: dict[str, tuple[bool, str] | None] = {
        "encode_topk_over_product": None,
        "encode_topk_over_product_skewed": None,
        "step_over_product": (False, "bfloat16"),
        "step_over_product_skewed": (False, "bfloat16"),
        "step_over_product_dead10": (True, "bfloat16"),
        "float32_step_over_product": (False, "float32"),
    }
    figures: dict[str, Any] = {**size._asdict(), "kernels": kernels, "quartiles": {}}
    floors: list[float] = []
    # One run at a time in memory.
    for name, case in cases.items():
        run, skew = None, name.endswith("skewed")
        if case is None:
            call: Callable[[], object] = partial(encode_topk, half, W_half, biases[skew], size.k, kernels)
        else:
            run = make_run(size, kernels, device, auxk=case[0], compute_dtype=case[1])
            call = stepper(run, x)
            if skew:
                run.sae.b_enc.data += skewed(size, (x[:256] @ run.sae.W_enc[:4096].T).std().item(), device)
        found: list[float] = []
        for number in range(rounds + 2):
            below = seconds(lambda: torch.mm(half, W_half.T, out=out), device)
            above = seconds(call, device)
            # The first two compile and warm up.
            if number >= 2:
                floors.append(below)
                found.append(above / below)
        figures[name] = statistics.median(found)
        figures["quartiles"][name] = statistics.quantiles(found, n=4) if rounds > 1 else found * 3
        if name == "step_over_product":
            figures["step_seconds"] = _median(call, device)
            figures["items"] = items(size, spec_of(run), call, figures["step_seconds"], device, rates)
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
    size: Size,
    spec: TrainSpec,
    step: Callable[[], object],
    took: float,
    device: torch.device,
    rates: dict[str, float],
) -> dict[str, dict[str, float]]:
    """The step's parts: operations, bytes and FLOP on paper, seconds at the card's rates, measured ones."""
    paper = step_on_paper(spec, size.width)
    own = Rates.of(GPUS["h100"], fused=1.0)._replace(
        product=rates["bfloat16_flops"], stream=rates["bandwidth"], gather=rates["bandwidth"]
    )
    need = parts_of(((site.part, entry) for site, entry in paper.entries.items()), own)
    shares: dict[str, list[float]] = {name: [] for name in need}
    for _ in range(5):
        with sampling(device) as spans:
            step()
        for name, share in (spans.shares() if spans else {}).items():
            shares.setdefault(name.removeprefix("share_"), []).append(share)
    found: dict[str, dict[str, float]] = {}
    for name, part in need.items():
        # What comes after the last mark has no time of its own.
        if not shares[name]:
            continue
        taken = statistics.median(shares[name]) * took
        numbers: dict[str, float] = {"operations": part.operations, "bytes": part.streamed + part.gathered}
        if part.flops:
            numbers["flops"] = part.flops
        found[name] = numbers | {"seconds_at_the_cards_rates": part.seconds, "seconds": taken}
    return found


def memory(size: Size, device: torch.device, kernels: Backend, **fields: object) -> dict[str, Any]:
    """Peak bytes of two steps over the estimate; the peak is None without CUDA's allocator."""
    _clear(device)
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    run = make_run(size, kernels, device, auxk=False, **fields)
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
    said = gpu_memory(run.recipe.spec, size.width, stored="float32")
    return {
        **size._asdict(),
        **fields,
        "step_seconds": took,
        "peak": peak,
        "estimate": said.total,
        "peak_over_estimate": None if peak is None else peak / said.total,
        "card": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "parts": said._asdict(),
    }


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    """Test, measure, write; exits with 1 if a test or a part fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kernels", default="auto", help="under TRITON_INTERPRET=1 also triton on a CPU")
    tests = parser.add_mutually_exclusive_group()
    tests.add_argument("--tests", default="", metavar="EXPRESSION", help="only these, as pytest's -k selects")
    tests.add_argument("--no-tests", action="store_true", help="do not run pytest")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test; on a CPU without a GPU")
    args = parser.parse_args()
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
    kernels = choose(args.kernels, device)
    sizes, million = (TINY, TINY_MILLION) if args.tiny else (SIZES, MILLION)
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
        keep("sizes", str(size.rows), partial(ratios, size, args.rounds, device, kernels, rates))
    half: dict[str, object] = {"compute_dtype": "bfloat16"}
    small = half | {"moments": "int8", "accumulate": 4}
    for name, size, fields in (
        ("here", sizes[0], half),
        ("here, float32", sizes[0], {}),
        ("million", million, half),
        ("million, int8 moments, in four parts", million, small),
    ):
        keep("memory", name, partial(memory, size, device, kernels, **fields))
    print(json.dumps(write_report("gpu", figures, args.json), indent=1))
    if failed:
        print(f"benchmarks.gpu: failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
