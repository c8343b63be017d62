"""Lists the runs below a folder and their progress, for `winnow runs` and `winnow watch`."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from typing import Any

from winnow.schemas.service import STATUS_KEY, RunStatus
from winnow.store.objects import ObjectStore
from winnow.trainer.run.status import STOP_KEY, read_status
from winnow.trainer.run.telemetry import METRICS_KEY, Record

_SILENT_SECONDS = 60.0
"""Silence after which a training run counts as lost: killed, or its machine is gone."""


@dataclass(frozen=True)
class RunView:
    """A run, as its stored status describes it."""

    name: str
    """Its folder below the root; empty for the root itself."""
    status: RunStatus
    stopping: bool
    """Whether it was asked to stop."""
    now: float

    @property
    def silent_seconds(self) -> float:
        """Seconds since its last sign of life, by the two machines' clocks."""
        # Not below 0: the run's clock may be ahead of ours.
        return max(0.0, self.now - self.status.beat)

    @property
    def state(self) -> str:
        """`training`, `stopping`, `finished`, `stopped`, `failed`, or `lost`."""
        if self.status.state != "training":
            return self.status.state
        if self.silent_seconds > _SILENT_SECONDS:
            return "lost"
        return "stopping" if self.stopping else "training"

    def facts(self) -> dict[str, Any]:
        """The run as JSON values."""
        fields = self.status.model_dump(exclude={"kind", "version", "state", "beat"})
        return {
            "run": self.name,
            "state": self.state,
            "silent_seconds": round(self.silent_seconds, 1),
        } | fields

    def row(self) -> list[str]:
        """The run as a row of a table; see HEADER."""
        s = self.status
        eta = _human_duration(s.eta_seconds) if self.state == "training" and s.eta_seconds is not None else ""
        return [
            self.name or ".",
            self.state,
            f"{s.step / s.steps:.0%}" if s.steps else "",
            eta,
            f"{s.latents:,} / {s.k}",
            f"{s.fvu:.4f}" if s.fvu is not None and math.isfinite(s.fvu) else "",
            f"{s.tokens_per_s:,.0f}",
            f"{s.cost:,.2f} {s.currency}" if s.cost is not None else "",
        ]


HEADER = ("run", "state", "done", "ETA", "N / K", "FVU", "tokens/s", "cost")


def find_runs(root: ObjectStore, now: float | None = None) -> list[RunView]:
    """Every run in `root` or below it that has a status, by name."""
    now = time.time() if now is None else now
    # One listing finds the runs and the requests to stop them.
    keys = {key for key, _ in root.list()}
    names = [key.removesuffix(STATUS_KEY).rstrip("/") for key in keys if key.split("/")[-1] == STATUS_KEY]
    found: list[RunView] = []
    for name in sorted(names):
        status = read_status(root.child(name) if name else root)
        if status is not None:
            found.append(RunView(name, status, f"{name}/{STOP_KEY}".lstrip("/") in keys, now))
    return found


def last_records(out: ObjectStore, count: int = 400) -> list[Record]:
    """The last readable telemetry records of a run."""
    if out.size(METRICS_KEY) is None:
        return []
    records: list[Record] = []
    for line in out.get(METRICS_KEY).decode(errors="replace").splitlines()[-count:]:
        # The last line may be in the middle of being written.
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _human_duration(seconds: float) -> str:
    """`1:02:03`, or `2:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def sparkline(values: list[float], width: int = 60) -> str:
    """Draw values as a line of blocks, lowest to highest, at most `width` of them."""
    numbers = [value for value in values if math.isfinite(value)]
    if not numbers:
        return ""
    picked = [numbers[i * len(numbers) // width] for i in range(width)] if len(numbers) > width else numbers
    low, high = min(picked), max(picked)
    span = (high - low) or 1.0  # a flat curve must not divide by zero
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / span)] for value in picked)


def watch_rows(name: str, seen: RunView, records: list[Record]) -> list[list[str]]:
    """The rows that `winnow watch` shows of a run."""
    s = seen.status
    rows = [
        ["state", seen.state + (f": {s.cause}" if s.cause else "")],
        ["steps", f"{s.step:,} of {s.steps:,}" + (f" ({s.step / s.steps:.0%})" if s.steps else "")],
        ["tokens", f"{s.tokens:,} at {s.tokens_per_s:,.0f}/s"],
    ]
    if s.eta_seconds is not None and seen.state == "training":
        rows.append(["ETA", _human_duration(s.eta_seconds)])
    if s.cost is not None:
        rows.append(["cost so far", f"{s.cost:,.2f} {s.currency}"])
    if records:
        last = records[-1]
        for key, label in (("fvu", "FVU"), ("l0", "L0"), ("dead_share", "dead"), ("grad_norm", "grad norm")):
            # FVU by its logarithm: its fall at the start would flatten the rest.
            curve = sparkline([math.log(r[key]) if key == "fvu" and r[key] > 0 else r[key] for r in records])
            rows.append([label, f"{last[key]:.4g}  {curve}"])
        shares = {k.removeprefix("share_"): v for k, v in last.items() if k.startswith("share_")}
        rows.append(["waiting for data", f"{s.waiting_share:.1%}"])
        rows.append(["a step's time", ", ".join(f"{name} {value:.0%}" for name, value in shares.items())])
    rows.append(["where", f"{s.device} on {s.host}, last sign of life {seen.silent_seconds:.0f} s ago"])
    return [["run", name], *rows]
