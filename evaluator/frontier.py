"""Plots of `winnow compare`: several SAEs by L0, FVU and delta CE."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Picture

from winnow.schemas.evaluation import Evaluation

AXES = {
    "l0": "L0, active latents per row",
    "fvu_normalised": "FVU, normalised space",
    "delta_ce": "delta CE, nats",
}
_PANELS = (("l0", "fvu_normalised"), ("l0", "delta_ce"), ("fvu_normalised", "delta_ce"))


def draw_frontiers(evaluations: Sequence[Evaluation], labels: Sequence[str]) -> dict[str, bytes]:
    """Plot L0/FVU, L0/delta-CE and FVU/delta-CE, one point per SAE with its 95 % intervals.

    SAEs of equal N are connected in the order of L0, since they form one frontier. An SAE that lacks a figure
    is left out of the panels that need it.

    Returns:
        `png` and `svg` -> bytes.
    """
    # Figure and canvas by hand: pyplot would choose a backend for the whole process and keep every figure
    # alive.
    picture = Picture(figsize=(13, 4.2), layout="constrained")
    for axes, (across, up) in zip(picture.subplots(1, 3), _PANELS, strict=True):
        _panel(axes, evaluations, labels, across, up)
    out: dict[str, bytes] = {}
    for kind, canvas in (("png", FigureCanvasAgg), ("svg", FigureCanvasSVG)):
        buffer = io.BytesIO()
        # matplotlib writes the time into an SVG: without it, equal numbers give an equal file.
        metadata = {"Date": None} if kind == "svg" else {}
        canvas(picture).print_figure(buffer, format=kind, dpi=130, metadata=metadata)
        out[kind] = buffer.getvalue()
    return out


def _panel(axes: Any, evaluations: Sequence[Evaluation], labels: Sequence[str], across: str, up: str) -> None:
    sizes = sorted({evaluation.latents for evaluation in evaluations})
    for colour, size in enumerate(sizes):
        points: list[tuple[float, float, str, list[list[float]], list[list[float]]]] = []
        for evaluation, label in zip(evaluations, labels, strict=True):
            x, y = evaluation.figure(across), evaluation.figure(up)
            if evaluation.latents != size or x is None or y is None or x.value is None or y.value is None:
                continue
            # A percentile interval need not contain the value, and errorbar refuses negative lengths.
            bars = [
                [[max(f.value - low, 0.0)], [max(high - f.value, 0.0)]]
                for f in (x, y)
                if f.value is not None
                for low, high in [
                    (f.value if f.low is None else f.low, f.value if f.high is None else f.high)
                ]
            ]
            points.append((x.value, y.value, label, bars[0], bars[1]))
        points.sort()
        axes.plot([p[0] for p in points], [p[1] for p in points], "-", color=f"C{colour}", alpha=0.4)
        for i, (x, y, label, x_bar, y_bar) in enumerate(points):
            name = f"N = {size:,}" if i == 0 else None
            axes.errorbar(
                x, y, y_bar, x_bar, fmt="o", color=f"C{colour}", markersize=4, capsize=2, label=name
            )
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set_xlabel(AXES[across])
    axes.set_ylabel(AXES[up])
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)
