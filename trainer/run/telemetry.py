"""A run's telemetry: JSON lines, and a picture of its curves."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

from winnow.store.objects import ObjectStore

log = logging.getLogger("winnow.trainer")

METRICS_KEY = "metrics.jsonl"
PLOT_KEY = "loss.png"
_FLUSH_SECONDS = 10.0
"""Seconds after which the next line stores the file again."""

Record = dict[str, Any]


class Telemetry:
    """`metrics.jsonl`: one line per record, each with its `step`; no step appears twice.

    The file is stored every `_FLUSH_SECONDS`, before each checkpoint, and at the end.

    Args:
        out: The run's folder.
        records: Lines of the run so far.
    """

    def __init__(self, out: ObjectStore, records: Sequence[Record] = ()) -> None:
        self._out = out
        self.records = list(records)
        self._flushed, self._stored = time.monotonic(), len(self.records)

    @classmethod
    def resume(cls, out: ObjectStore, step: int) -> Telemetry:
        """Load the stored lines up to `step` steps finished; later ones will be written again."""
        if out.size(METRICS_KEY) is None:
            return cls(out)
        records: list[Record] = []
        # a file that was cut or damaged costs lines of a curve, not the run
        for number, line in enumerate(out.get(METRICS_KEY).decode(errors="replace").splitlines(), 1):
            try:
                record = json.loads(line)
                if record["step"] <= step:
                    records.append(record)
            except (ValueError, KeyError, TypeError):
                log.warning("line %d of %s is unreadable and is left out", number, METRICS_KEY)
        return cls(out, records)

    def log(self, record: Record) -> None:
        """Add a line."""
        self.records.append(record)
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Store the file if it has new lines."""
        self._flushed = time.monotonic()
        if self._stored != len(self.records) or self._out.size(METRICS_KEY) is None:
            lines = [json.dumps(record, sort_keys=True) + "\n" for record in self.records]
            # put whole, because object storage cannot append
            self._out.put(METRICS_KEY, "".join(lines).encode())
            self._stored = len(self.records)


def draw_curves(records: Sequence[Record], title: str) -> bytes:
    """Draw a PNG: loss and FVU (log scale), active and dead latents, learning rate, over rows trained on.

    Args:
        records: Telemetry lines, one or more.
        title: The picture's title.
    """
    # imported here, because only the end of a run needs it; not pyplot, which keeps figures in global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    ink, blue, orange, green = "#333333", "#2563a8", "#d9822b", "#3a8f5c"
    rows = [record["tokens"] / 1e6 for record in records]
    figure = Figure(figsize=(8, 7.5), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.6, 1])
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=ink)

    top.plot(rows, [r["loss"] for r in records], color=orange, lw=1.1, alpha=0.75, label="loss (with AuxK)")
    top.plot(rows, [r["fvu"] for r in records], color=blue, lw=1.6, label="FVU of the batch")
    top.set_yscale("log")
    top.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    top.yaxis.set_major_formatter("{x:g}")
    top.yaxis.set_minor_formatter("{x:g}")
    top.set_ylabel("loss, FVU (log)")
    top.legend(frameon=False, loc="upper right", fontsize=9)
    last = records[-1]["fvu"]
    top.annotate(
        f"{last:.3f}", (rows[-1], last), xytext=(5, 0), textcoords="offset points", va="center", color=blue
    )

    middle.plot(rows, [r["l0"] for r in records], color=green, lw=1.6)
    middle.set_ylabel("L0", color=green)
    middle.set_ylim(bottom=0)
    dead = middle.twinx()
    dead.plot(rows, [100 * r["dead_share"] for r in records], color=orange, lw=1.3, ls="--")
    dead.set_ylabel("dead latents, %", color=orange)
    dead.set_ylim(0, max(1.0, 110 * max(r["dead_share"] for r in records)))

    bottom.plot(rows, [r["lr"] for r in records], color=ink, lw=1.3)
    bottom.set_ylabel("learning rate")
    bottom.set_ylim(bottom=0)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.set_xlabel("rows trained on, millions")
    for axes in (top, middle, bottom, dead):
        axes.spines["top"].set_visible(False)
        axes.tick_params(labelsize=8, colors=ink, which="both")
        axes.margins(x=0.01)
    for axes in (top, middle, bottom):
        axes.spines["right"].set_visible(False)
        axes.grid(True, which="major", color="#dddddd", lw=0.6)
    figure.align_ylabels([top, middle, bottom])
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
