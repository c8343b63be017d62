"""The page of `benchmarks.quality`: the table as Markdown, and a plot of every search."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]
"""One trainer's figures: lists over its seeds, `lr`, and `fvu_by_lr` of the first seed."""
COLUMNS = {"fvu_raw": ("FVU", ".4f"), "delta_ce": ("delta CE, nats", ".4f"), "dead_share": ("dead", ".2%")}


def page_of(rows: Mapping[str, Row], intro: str, notes: str, remarks: str, command: str, plot: str) -> str:
    """The page in Markdown.

    Args:
        rows: Figures by trainer.
        intro: Sizes, rows and subject of the runs.
        notes: Differences between trainers.
        remarks: Comments on the figures; may be empty.
        command: The command that made the page.
        plot: The picture's address.
    """
    lines = [
        "# Quality at equal tokens",
        "",
        intro,
        "",
        f"| trainer | learning rate | {' | '.join(title for title, _ in COLUMNS.values())} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
    ]
    for name, row in rows.items():
        cells = [_shown(row[figure], form) for figure, (_, form) in COLUMNS.items()]
        lines.append(f"| {name} | {row['lr']:g} | {' | '.join(cells)} |")
    lines += [
        "",
        "FVU by learning rate, first seed (each search continues until the best lies between two others):",
        "",
    ]
    lines += [
        f"- {name}: " + ", ".join(f"{lr}: {fvu:.4f}" for lr, fvu in row["fvu_by_lr"].items())
        for name, row in rows.items()
    ]
    lines += ["", f"![FVU by learning rate]({plot})", "", notes, ""]
    lines += [remarks.strip(), ""] if remarks else []
    return "\n".join([*lines, f"```sh\n{command}\n```", ""])


def _shown(values: list[float], form: str) -> str:
    mean, low, high = (format(f(values), form) for f in (statistics.mean, min, max))
    return f"{mean} ({low} to {high})"


def draw(rows: Mapping[str, Row]) -> bytes:
    """A PNG of each trainer's held-out FVU by learning rate, and of all seeds at the best one."""
    # The Agg canvas itself: pyplot would choose a backend by the display, and keep figures alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, row in rows.items():
        rates = [float(lr) for lr in row["fvu_by_lr"]]
        (line,) = axes.plot(rates, list(row["fvu_by_lr"].values()), "-", lw=1, label=name)
        axes.plot([row["lr"]] * len(row["fvu_raw"]), row["fvu_raw"], "o", ms=4, color=line.get_color())
    axes.set_xscale("log")
    axes.set_xlabel("learning rate (line: first seed; points: all seeds at the best)")
    axes.set_ylabel("held-out FVU, raw space")
    axes.grid(True, color="#dddddd", lw=0.6)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
