"""Results of `winnow recovery`: JSON, a page with the tables, plots with intervals."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from winnow.evaluator.recovery.task import FOUND

JSON_KEY, PAGE_KEY, PLOT_KEY = "recovery.json", "recovery.md", "recovery.png"
CURVE_KEY = "recovery_curve.png"
REMARKS_KEY = "recovery.remarks.md"
"""Remarks of a person, beside the results; the page ends with them."""
LEARNING_RATES = (0.0003, 0.00055, 0.001, 0.0018, 0.003, 0.0055, 0.01, 0.018, 0.03, 0.055, 0.1)
"""Grid of the search for the best, in steps of about 1.8. With steps of three, SAELens had 0.89 at N = 256
instead of 0.93: a table without such a search ranks grids."""
_STUDENT_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}
"""Degrees of freedom -> quantile of Student's t, for 95 % intervals over few seeds."""
SHOWN = {
    "matched_cosine": "matched cosine",
    "found": "found (> 0.9)",
    "max_cosine": "mean max cosine",
    "fvu": "FVU",
    "l0": "L0",
}
Record = dict[str, Any]
"""One run: `variant`, `latents`, `k`, `rows`, `seed`, `lr` and the figures."""


class Cell(NamedTuple):
    """One line of a table: a variant at one N and K, with its best learning rate and the seeds run at it."""

    variant: str
    latents: int
    k: int
    lr: float
    searched: bool
    """Whether the rates on both sides were tried as well."""
    records: list[Record]

    def interval(self, figure: str) -> tuple[float, float]:
        """Compute the mean over the seeds and half the width of its 95 % interval, infinite for one seed."""
        values = np.array([record[figure] for record in self.records], dtype=np.float64)
        free = len(values) - 1
        if not free:
            return float(values[0]), float("inf")
        spread = values.std(ddof=1) / len(values) ** 0.5
        # 1.96, the normal distribution's, beyond the table: with seven seeds or more t is at most 2.45.
        return float(values.mean()), float(_STUDENT_95.get(free, 1.96) * spread)


def best_lr(cell: Sequence[Record]) -> float:
    """Return the learning rate of a cell's runs that has the best matched cosine on the first seed."""
    # One seed, the same for all variants: the others then measure a rate that was not chosen on them.
    first = min(record["seed"] for record in cell)
    return max((r for r in cell if r["seed"] == first), key=lambda r: r["matched_cosine"])["lr"]


def next_lr(cell: Sequence[Record], first: float) -> float | None:
    """Choose the learning rate to try next on the first seed: `first`, then neighbours of the best so far.

    Args:
        cell: Runs of one variant, N and K: none, or some with the first seed.
        first: One of LEARNING_RATES.

    Returns:
        The rate; None if the best is between two that were tried, or at an end of LEARNING_RATES.
    """
    if not cell:
        return first
    seed = min(record["seed"] for record in cell)
    tried = {record["lr"] for record in cell if record["seed"] == seed}
    at = LEARNING_RATES.index(best_lr(cell))
    return next((lr for lr in LEARNING_RATES[max(0, at - 1) : at + 2] if lr not in tried), None)


def _cells_of(records: Sequence[Record]) -> list[Cell]:
    """Group records into the tables' lines, in the order of the records."""
    keys = dict.fromkeys((r["variant"], r["latents"], r["k"]) for r in records)
    cells: list[Cell] = []
    for key in keys:
        mine = [r for r in records if (r["variant"], r["latents"], r["k"]) == key]
        lr = best_lr(mine)
        chosen = [r for r in mine if r["lr"] == lr]
        cells.append(Cell(*key, lr, next_lr(mine, lr) is None, chosen))
    return cells


def page_of(records: Sequence[Record], remarks: str = "") -> str:
    """Write the page in Markdown: a table for every (N, K), the best matched cosine first.

    Args:
        records: All runs.
        remarks: Remarks in Markdown, with which the page ends.
    """
    rows = max(record["rows"] for record in records)
    lines = [
        "# Recovery of known directions",
        "",
        "Written by `winnow recovery` (and `python -m benchmarks.recovery_peers`, if it was run). "
        f"D = 64, 256 directions, {rows:,} rows, each seen once; the task: `evaluator/recovery/task.py`. "
        "Mean over the seeds with its 95 % interval (Student's t). The learning rate is the best on the "
        "first seed, for every variant, searched in steps of about 1.8 until it lies between two others; "
        "~ marks unfinished searches. AuxK: share of the steps on which it was active, if the trainer "
        "reports it.",
        "",
        "- matched cosine: mean over the true directions of the cosine with their latent, matched one to one",
        f"- found: share of the directions matched above {FOUND}; mean max cosine: not one to one",
        "",
    ]
    cells = _cells_of(records)
    # The sizes with most variants first: they are the comparison. A size with one variant goes to the last
    # table.
    sizes = dict.fromkeys((cell.latents, cell.k) for cell in cells)
    for latents, k in sorted(sizes, key=lambda size: (-sum(c[1:3] == size for c in cells), size)):
        some = [cell for cell in cells if cell[1:3] == (latents, k)]
        lines += [f"## N = {latents}, K = {k}", ""] if len(some) > 1 else []
        if len(some) > 1:
            lines += [*_table(some), ""]
    lone = [cell for cell in cells if sum(c[1:3] == cell[1:3] for c in cells) == 1]
    if lone:
        lines += ["## Other sizes", "", *_table(sorted(lone, key=lambda cell: cell[:3])), ""]
    lines += [f"![matched cosine with intervals]({PLOT_KEY})", ""]
    if len(_curve_variants(cells)):
        lines += [f"![matched cosine over N and K]({CURVE_KEY})", ""]
    return "\n".join(lines) + (f"\n{remarks.strip()}\n" if remarks else "")


def _table(cells: Sequence[Cell]) -> list[str]:
    lines = [
        f"| variant | N | K | lr | seeds | {' | '.join(SHOWN.values())} | AuxK |",
        f"|---|---|---|---|---|{'---|' * len(SHOWN)}---|",
    ]
    best_first = sorted(cells, key=lambda cell: (cell[1:3], -cell.interval("matched_cosine")[0]))
    for cell in best_first:
        shown = [_text(*cell.interval(name)) for name in SHOWN]
        steps = [record for record in cell.records if "auxk_steps" in record]  # peers do not report it
        auxk = f"{np.mean([r['auxk_steps'] / r['steps'] for r in steps]):.0%}" if steps else ""
        lines.append(
            f"| {cell.variant} | {cell.latents} | {cell.k} | {'' if cell.searched else '~ '}{cell.lr:g} | "
            f"{len(cell.records)} | " + " | ".join(shown) + f" | {auxk} |"
        )
    return lines


def _text(mean: float, half: float) -> str:
    return f"{mean:.3f}" if half == float("inf") else f"{mean:.3f} ± {half:.3f}"


def draw_intervals(records: Sequence[Record]) -> bytes:
    """Plot the matched cosine of every line of the tables with its interval, as PNG."""
    # Imported here: the tables and the search for a learning rate need no matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = _cells_of(records)
    figure = Figure(figsize=(8, 1.2 + 0.36 * len(cells)), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, cell in enumerate(reversed(cells)):
        mean, half = cell.interval("matched_cosine")
        axes.errorbar(
            mean, place, xerr=0 if half == float("inf") else half, fmt="o", color="#2563a8", capsize=3
        )
        axes.plot(
            [r["matched_cosine"] for r in cell.records], [place] * len(cell.records), "|", color="#d9822b"
        )
    names = [f"{cell.variant}, N = {cell.latents}, K = {cell.k}" for cell in reversed(cells)]
    axes.set_yticks(range(len(cells)), names)
    axes.set_xlabel("one-to-one matched cosine, mean and 95 % interval over seeds (ticks: the seeds)")
    axes.grid(True, axis="x", color="#dddddd", lw=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _curve_variants(cells: Sequence[Cell]) -> list[str]:
    """List the variants with three sizes N or more: fewer make no curve."""
    names = dict.fromkeys(cell.variant for cell in cells)
    return [name for name in names if len({c.latents for c in cells if c.variant == name}) > 2]


def draw_curves(records: Sequence[Record]) -> bytes | None:
    """Plot matched cosine over N, a curve per K with its intervals, as PNG; None without three sizes N."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = _cells_of(records)
    names = _curve_variants(cells)
    if not names:
        return None
    figure = Figure(figsize=(5.5 * len(names), 4), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        mine = [cell for cell in cells if cell.variant == name]
        for k in sorted({cell.k for cell in mine}):
            line = sorted((cell for cell in mine if cell.k == k), key=lambda cell: cell.latents)
            means, halves = zip(*(cell.interval("matched_cosine") for cell in line), strict=True)
            bars = [0 if half == float("inf") else half for half in halves]
            axes.errorbar([c.latents for c in line], means, yerr=bars, fmt="o-", capsize=3, label=f"K = {k}")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("latents N")
        axes.set_ylabel("one-to-one matched cosine")
        axes.set_title(name)
        axes.legend()
        axes.grid(True, color="#dddddd", lw=0.6)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def dump(records: Sequence[Record]) -> bytes:
    """Encode the results as JSON."""
    return (
        json.dumps({"kind": "winnow.recovery", "runs": list(records)}, indent=1, sort_keys=True).encode()
        + b"\n"
    )
