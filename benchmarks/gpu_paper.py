"""The training step on a GPU, reckoned, not measured: a real step at full size, on tensors without contents.

    python -m benchmarks.gpu_paper --json OUT [--card h100|h200] [--tiny]

Needs no GPU and takes about two minutes. For B = 65,536 and 16,384 rows (D = 768, N = 131,072, K = 32,
products in bfloat16, Adam's moments in float32, clipping, average) the ledger of `winnow.trainer.plan.paper`
gives operations, launches, synchronisations, bytes and FLOP by part and by line of the code, and peak memory;
also with a tenth of the latents dead (AuxK, 256 of them per row), packed moments, four micro-batches, and
products in float32, plain and bounded. How many latents the latter leave in question is simulated, on the
host. `sets`: a step of transcoder sets of 12 layers (N = 16,384 each, B = 16,384) in products of all their
encoders. `host`: small steps, and what the host takes to give them to the device.

Everything is counted from the code as it is. Seconds divide counts by assumed rates
(`winnow.trainer.plan.rates`), and are given in bfloat16 products of the library, [B, D] x [D, N]. The share
of that product's rate that a kernel with a product of its own reaches is an assumption: results are given for
several, and the bars are read at BAR_SHARE, which is what an H100 needs for them to be in reach.

`peak_over_estimate` compares two ledgers: of this step, and what `winnow estimate` says, which assumes a
tenth dead where AuxK is on. Only `python -m benchmarks.gpu` compares it with a card.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.report import write_report
from winnow.schemas.training import TrainSpec
from winnow.trainer.kernels.groups import SLACK, slack_of
from winnow.trainer.plan.memory import DEAD_SHARE, gpu_memory
from winnow.trainer.plan.paper import Paper, step_on_paper
from winnow.trainer.plan.rates import EFFICIENCY, GPUS, Rates, parts_of

SHARES = (0.6, 0.8, 0.95)
"""Shares of the library's rate that a kernel with its own product may reach: assumed."""
BAR_SHARE = 0.95
"""The one at which bars are read."""
MARK = "reckoned, not measured"


class Size(NamedTuple):
    """Rows B, width D, latents N, active latents K."""

    rows: int
    width: int
    latents: int
    k: int


class Bar(NamedTuple):
    """A goal for a size."""

    products: float
    before: float
    """Products before the kernels were rewritten, reckoned alike, the sweep at 0.4 of the library's rate."""


SIZES = {Size(65_536, 768, 131_072, 32): Bar(1.7, 3.7), Size(16_384, 768, 131_072, 32): Bar(2.2, 4.7)}
TINY = {Size(256, 32, 4096, 4): Bar(1.7, 3.7)}
NEW_OVER_OLD, MORE_WITH_DEAD, SYNCS, PEAK_OVER_ESTIMATE = 0.46, 0.5, 2, 1.05
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "auxk, a tenth dead": {"auxk_coefficient": 1 / 32},
    "moments bfloat16": {"moments": "bfloat16"},
    "moments int8": {"moments": "int8"},
    "accumulate 4": {"accumulate": 4},
    "float32 products": {"compute_dtype": "float32"},
    "float32 products, bounded": {"compute_dtype": "float32", "float32_products": "bounded"},
}
SIMULATED_ROWS = 32
SET_SIZE, TINY_SET_SIZE = Size(16_384, 768, 16_384, 32), Size(256, 32, 512, 4)
"""Of each layer of a set."""
SETS = {"cross-layer": (True, 20.0), "per-layer": (False, 4.0)}
"""Set -> whether it is cross-layer, and products before its rows of all targets were finished by kernels."""
SMALL = [Size(2048, 576, 4096, 32), Size(4096, 576, 16_384, 32)]
"""The quickstart's size and a larger one, at which the host may be what takes longest."""
LINES = 40
"""Lines of the code that are written, those that take longest."""


def set_case(size: Size, layers: int, cross: bool, card: str) -> dict[str, Any]:
    """Counts and reckoned products of a step of a set."""
    fields = {"set": {"layers": [0, layers - 1], "cross": cross}}
    paper = step_on_paper(spec_of(size, fields), size.width)
    entries, times = list(paper.entries.values()), paper.runs
    rates = Rates.of(GPUS[card], BAR_SHARE)
    # a product per layer; a per-layer set is told of as one layer, taken `runs` times
    share = times / layers
    return {
        **size._asdict(),
        "layers": layers,
        "operations": times * sum(entry.operations for entry in entries),
        "launches": times * sum(entry.launches for entry in entries),
        "synchronisations": times * sum(entry.syncs for entry in entries),
        "bytes_streamed": times * sum(entry.streamed for entry in entries),
        "bytes_gathered": times * sum(entry.gathered for entry in entries),
        "peak": paper.peak,
        "products": share * products(size, paper, rates),
        "parts": {name: share * part["products"] for name, part in parts(size, paper, rates).items()},
    }


def host(card: str) -> list[dict[str, Any]]:
    """Milliseconds of device and host for small steps, told as they are reckoned."""
    found: list[dict[str, Any]] = []
    rates = Rates.of(GPUS[card])
    for size in SMALL:
        for kind in ("bfloat16", "float32"):
            paper = step_on_paper(spec_of(size, {"compute_dtype": kind}), size.width)
            entries = list(paper.entries.values())
            one = {
                **size._asdict(),
                "compute_dtype": kind,
                "operations": sum(entry.operations for entry in entries),
                "device_ms": 1000 * sum(map(rates.device_seconds, entries)),
                "host_ms": 1000 * rates.host_seconds(entries),
            }
            found.append(one)
            print(
                f"B = {size.rows}, N = {size.latents}, {kind}: device {one['device_ms']:.2f} ms, "
                f"host {one['host_ms']:.2f} ms, {one['operations']} operations ({MARK})",
                file=sys.stderr,
            )
    return found


def sets(tiny: bool, card: str) -> dict[str, dict[str, Any]]:
    """Both kinds of sets, told as they are reckoned."""
    size, layers = (TINY_SET_SIZE, 3) if tiny else (SET_SIZE, 12)
    found: dict[str, dict[str, Any]] = {}
    for name, (cross, before) in SETS.items():
        found[name] = one = set_case(size, layers, cross, card)
        if not tiny and card == "h100":
            one["products_before"] = before
        split = ", ".join(f"{part} {value:.2f}" for part, value in one["parts"].items())
        print(
            f"{name} set of {layers}: {one['products']:.2f} products of all encoders at {BAR_SHARE} "
            f"({MARK}); {split}; {one['operations']} operations, {one['synchronisations']} synchronisations, "
            f"{one['bytes_streamed'] / 1e9:.1f} + {one['bytes_gathered'] / 1e9:.1f} GB, "
            f"peak {one['peak'] / 1e9:.1f} GB",
            file=sys.stderr,
        )
    return found


def spec_of(size: Size, fields: dict[str, Any]) -> TrainSpec:
    """The spec of a case."""
    base = {
        "out": "nowhere",
        "latents": size.latents,
        "k": size.k,
        "batch_rows": size.rows,
        "compute_dtype": "bfloat16",
        "auxk_coefficient": 0.0,
        "auxk_k": min(256, size.latents // 16),
    }
    of = {} if "set" in fields else {"hook": "resid_post.6"}
    return TrainSpec.model_validate(base | of | fields)


def case(size: Size, fields: dict[str, Any], card: str) -> dict[str, Any]:
    """Counts and reckoned products of a step."""
    spec = spec_of(size, fields)
    dead = DEAD_SHARE if spec.auxk_coefficient else 0.0
    paper = step_on_paper(spec, size.width, dead_share=dead)
    estimate = gpu_memory(spec, size.width).total
    entries = list(paper.entries.values())
    return {
        **size._asdict(),
        "operations": sum(entry.operations for entry in entries),
        "launches": sum(entry.launches for entry in entries),
        "synchronisations": sum(entry.syncs for entry in entries),
        "allocations": sum(entry.allocations for entry in entries),
        "bytes_streamed": sum(entry.streamed for entry in entries),
        "bytes_gathered": sum(entry.gathered for entry in entries),
        "peak": paper.peak,
        "peak_at": paper.peak_at,
        "held": paper.held,
        "estimate": estimate,
        "peak_over_estimate": paper.peak / estimate,
        "products": {str(share): products(size, paper, Rates.of(GPUS[card], share)) for share in SHARES},
        "parts": parts(size, paper, Rates.of(GPUS[card], BAR_SHARE)),
        "lines": lines(size, paper, Rates.of(GPUS[card], BAR_SHARE)),
    }


def in_question(size: Size) -> float:
    """Latents per row that `float32_products: bounded` multiplies in float32, of normal rows."""
    draws = torch.Generator().manual_seed(0)
    x, W = (torch.randn(count, size.width, generator=draws) for count in (SIMULATED_ROWS, size.latents))
    W = torch.nn.functional.normalize(W, dim=1)
    low_x, low_W = x.bfloat16().float(), W.bfloat16().float()
    lost_x, lost_W = (x - low_x).norm(dim=1), (W - low_W).norm(dim=1)
    norms_x, norms_W = x.norm(dim=1), W.norm(dim=1)
    # as `winnow.trainer.kernels.encode_bounded_triton` reckons its bound
    row_slack = SLACK * lost_x + slack_of(size.width) * norms_x
    bounds = low_x @ low_W.T + torch.outer(row_slack, norms_W)
    bounds += torch.outer(SLACK * (norms_x + lost_x), lost_W)
    kth = (x @ W.T).topk(size.k, dim=1).values[:, -1:]
    return (bounds >= kth).sum(1).double().mean().item()


def floor(size: Size, rates: Rates) -> float:
    """Seconds of the library's bfloat16 product of the size."""
    return 2 * size.rows * size.width * size.latents / rates.product


def products(size: Size, paper: Paper, rates: Rates) -> float:
    """The step in such products: of the device, or of the host if that takes longer."""
    device = sum(map(rates.device_seconds, paper.entries.values()))
    return max(device, rates.host_seconds(paper.entries.values())) / floor(size, rates)


def parts(size: Size, paper: Paper, rates: Rates) -> dict[str, dict[str, float]]:
    """Counts by part of the step."""
    found = parts_of(((site.part, entry) for site, entry in paper.entries.items()), rates)
    return {
        name: part._asdict() | {"products": part.seconds / floor(size, rates)} for name, part in found.items()
    }


def lines(size: Size, paper: Paper, rates: Rates) -> list[dict[str, Any]]:
    """The lines of the code that take longest, and all that wait."""
    timed = [(rates.device_seconds(entry), site, entry) for site, entry in paper.entries.items()]
    timed.sort(key=lambda line: -line[0])
    return [
        {
            **site._asdict(),
            "operations": entry.operations,
            "syncs": entry.syncs,
            "bytes": entry.streamed + entry.gathered,
            "flops": sum(entry.flops.values()),
            "products": seconds / floor(size, rates),
        }
        for number, (seconds, site, entry) in enumerate(timed)
        if number < LINES or entry.syncs
    ]


def bars(found: dict[str, dict[str, Any]], sizes: dict[Size, Bar]) -> list[dict[str, Any]]:
    """Each goal, what is reckoned, and whether it is met."""
    rows: list[tuple[str, float, float]] = []
    for size, bar in sizes.items():
        own = {name: found[f"{size.rows}, {name}"] for name in CASES}
        plain, dead = (own[name]["products"][str(BAR_SHARE)] for name in ("plain", "auxk, a tenth dead"))
        rows += [
            (f"B = {size.rows}: products", plain, bar.products),
            (f"B = {size.rows}: new_over_old", plain / bar.before, NEW_OVER_OLD),
            (f"B = {size.rows}: products more with a tenth dead", dead - plain, MORE_WITH_DEAD),
            (f"B = {size.rows}: synchronisations", own["plain"]["synchronisations"], SYNCS),
        ]
        peak = max(one["peak_over_estimate"] for one in own.values())
        rows.append((f"B = {size.rows}: peak over estimate", peak, PEAK_OVER_ESTIMATE))
    return [
        {"what": what, "value": value, "bar": bar, "met": value <= bar, "is": MARK}
        for what, value, bar in rows
    ]


def main() -> None:
    """Reckon, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--card", default="h100", choices=("h100", "h200"))
    parser.add_argument("--tiny", action="store_true", help="a size for a test")
    args = parser.parse_args()
    sizes = TINY if args.tiny else SIZES
    found: dict[str, dict[str, Any]] = {}
    for size in sizes:
        for name, fields in CASES.items():
            found[f"{size.rows}, {name}"] = one = case(size, fields, args.card)
            told = ", ".join(f"{value:.2f} at {share}" for share, value in one["products"].items())
            print(
                f"B = {size.rows}, {name}: {told} products ({MARK}); {one['operations']} operations, "
                f"{one['launches']} launches, {one['synchronisations']} synchronisations, "
                f"{one['bytes_streamed'] / 1e9:.1f} + {one['bytes_gathered'] / 1e9:.1f} GB, peak "
                f"{one['peak'] / 1e9:.2f} GB, over estimate {one['peak_over_estimate']:.3f}",
                file=sys.stderr,
            )
    near = in_question(next(iter(sizes)))
    print(
        f"bounded float32 products: {near:.1f} latents per row are multiplied in float32 (simulated)",
        file=sys.stderr,
    )
    of_sets = sets(args.tiny, args.card)
    goals = bars(found, sizes)
    for goal in goals:
        said = "met" if goal["met"] else "missed"
        print(f"{said:>7}  {goal['what']}: {goal['value']:.2f}, bar {goal['bar']} ({MARK})", file=sys.stderr)
    figures = {
        "is": f"{MARK}: counted from the code, divided by assumed rates",
        "card": {**GPUS[args.card]._asdict(), "name": args.card},
        "rates": {name: {"value": value, "source": source} for name, (value, source) in EFFICIENCY.items()},
        "own_product_shares": {"given": SHARES, "bars_read_at": BAR_SHARE, "is": "an assumption"},
        "bars": goals,
        "bounded_products_in_question": {"value": near, "is": "simulated: normal rows, random directions"},
        "sets": of_sets,
        "host": host(args.card),
        "cases": found,
    }
    report = write_report("gpu_paper", figures, args.json)
    print(json.dumps({key: value for key, value in report.items() if key != "cases"}, indent=1))


if __name__ == "__main__":
    main()
