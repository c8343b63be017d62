"""Plots of the scaling laws, as PNG and SVG."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from winnow.evaluator.scaling.report import Laws, Sweep


def draw_laws(sweep: Sweep, laws: Laws) -> dict[str, bytes]:
    """Plot L over N for each K with the law, and L over C with the frontier and its law: `png` and `svg`."""
    # Imported here: fitting and the page need no matplotlib.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(11, 4.6), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    ks = sorted({cell.k for cell in sweep.cells})
    colours = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.85, len(ks)))
    for k, colour in zip(ks, colours, strict=True):
        _sizes(left, sweep, laws, k, colour)
        _compute(right, sweep, laws, k, colour)
    left.set_xlabel("latents N")
    left.set_ylabel("held-out FVU")
    left.set_title("L(N, K): the law (lines), hollow where not converged", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    right.set_xlabel("compute 6 N D tokens, FLOP")
    right.set_ylabel("training FVU at constant learning rate")
    right.set_title("L(C): curves, their frontier (dots) and its law", loc="left", fontsize=10)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(True, which="both", color="#e5e5e5", lw=0.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.tick_params(labelsize=8, which="both")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    # Every N of the grid is labelled, in place of matplotlib's powers of ten.
    left.set_xticks(sorted({cell.latents for cell in sweep.cells}))
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.xaxis.set_minor_locator(NullLocator())
    pictures = {}
    # Without a salt an SVG's ids are random, and without `Date: None` it contains the time: equal numbers are
    # to give equal bytes.
    with matplotlib.rc_context({"svg.hashsalt": "winnow"}):
        for kind in ("png", "svg"):
            data = io.BytesIO()
            figure.savefig(data, format=kind, metadata={"Date": None} if kind == "svg" else None)
            pictures[kind] = data.getvalue()
    return pictures


def _sizes(axes: Any, sweep: Sweep, laws: Laws, k: int, colour: Any) -> None:
    cells = sorted((cell for cell in sweep.cells if cell.k == k), key=lambda cell: cell.latents)
    ns = np.geomspace(cells[0].latents, cells[-1].latents, 60)
    line = laws.joint.predict(np.stack([np.log(ns), np.full(60, np.log(k))], 1))
    axes.plot(ns, line, color=colour, lw=1.4, label=f"K = {k}")
    for cell in cells:
        face = colour if cell.converged else "white"
        axes.plot(cell.latents, cell.loss, "o", ms=5, color=colour, markerfacecolor=face)


def _compute(axes: Any, sweep: Sweep, laws: Laws, k: int, colour: Any) -> None:
    for curve in sweep.curves:
        if curve.k == k:
            axes.plot(curve.compute, curve.loss, color=colour, lw=0.6, alpha=0.45)
    # A K whose runs have no two points of telemetry has no curve, and so no frontier.
    if k not in laws.compute:
        return
    law, compute, loss, _ = laws.compute[k]
    axes.plot(compute, loss, ".", ms=4, color=colour)
    if law is not None:
        axes.plot(compute, law.predict(np.log(compute)[:, None]), color=colour, lw=1.4)
