"""A run's figures as Prometheus metrics: of its `status.json`, and of the newest line of `metrics.jsonl`.

All are gauges: a run that resumes from a checkpoint steps back, which Prometheus would take for a counter's
restart from zero.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from winnow.common.metrics import REGISTRY
from winnow.schemas.service import RunState, RunStatus

Record = Mapping[str, Any]


class _Gauge(NamedTuple):
    text: str
    """What the metric says, for people."""
    value: Callable[[RunStatus, Record], float | None]
    """None: this run has none."""


_GAUGES = {
    "winnow_run_step": _Gauge("Steps finished", lambda s, _: s.step),
    "winnow_run_steps": _Gauge("Steps of the whole run", lambda s, _: s.steps),
    "winnow_run_rows": _Gauge("Rows trained on", lambda s, _: s.tokens),
    "winnow_run_rows_per_second": _Gauge("Rows per second of its own time", lambda s, _: s.tokens_per_s),
    "winnow_run_seconds": _Gauge("Wall-clock time of its steps", lambda s, _: s.seconds),
    "winnow_run_eta_seconds": _Gauge("Time to the end at the present pace", lambda s, _: s.eta_seconds),
    "winnow_run_data_wait_ratio": _Gauge(
        "Share of the time spent on waiting for rows", lambda s, _: s.waiting_share
    ),
    "winnow_run_fvu_ratio": _Gauge(
        "FVU of the last batch that was logged; once finished, held out", lambda s, _: s.fvu
    ),
    "winnow_run_cost": _Gauge("Cost so far at prices.trainer_hour, in prices.currency", lambda s, _: s.cost),
    "winnow_run_beat_timestamp_seconds": _Gauge("When its status was written", lambda s, _: s.beat),
    "winnow_run_loss": _Gauge(
        "Loss of the last batch that was logged, with AuxK", lambda _, r: r.get("loss")
    ),
    "winnow_run_active_latents": _Gauge("L0: active latents per row of that batch", lambda _, r: r.get("l0")),
    "winnow_run_dead_latents_ratio": _Gauge("Share of dead latents", lambda _, r: r.get("dead_share")),
    "winnow_run_gradient_norm": _Gauge(
        "Norm of the gradient before clipping", lambda _, r: r.get("grad_norm")
    ),
    "winnow_run_learning_rate": _Gauge("Learning rate", lambda _, r: r.get("lr")),
    "winnow_run_read_bytes_per_second": _Gauge(
        "Stored bytes read by this process", lambda _, r: r.get("bytes_read_per_s")
    ),
}


def run_families(runs: Iterable[tuple[Mapping[str, str], RunStatus, Record]]) -> Iterator[Metric]:
    """The metrics of some runs.

    Args:
        runs: Of each its labels (the same names for all), its status, and its newest telemetry line or {}.
    """
    found = list(runs)
    names = list(found[0][0]) if found else []
    for name, gauge in _GAUGES.items():
        family = GaugeMetricFamily(name, gauge.text, labels=names)
        for labels, status, record in found:
            value = gauge.value(status, record)
            if value is not None:
                family.add_metric(list(labels.values()), value)
        yield family
    states = GaugeMetricFamily("winnow_run_state", "1 for the run's state", labels=[*names, "state"])
    for labels, status, _ in found:
        for state in get_args(RunState):
            states.add_metric([*labels.values(), state], float(state == status.state))
    yield states


class RunMetrics(Collector):
    """The runs that this process trains."""

    def __init__(self) -> None:
        # Prometheus asks from another thread.
        self._lock = threading.Lock()
        self._status: dict[str, RunStatus] = {}
        self._records: dict[str, Record] = {}

    def status(self, run: str, status: RunStatus) -> None:
        """Note what a run, named by its folder, has written as its status."""
        with self._lock:
            self._status[run] = status

    def record(self, run: str, record: Record) -> None:
        """Note the newest telemetry line of a run."""
        with self._lock:
            self._records[run] = record

    def collect(self) -> Iterable[Metric]:
        """See `prometheus_client.registry.Collector`."""
        with self._lock:
            runs = [
                ({"run": run}, status, self._records.get(run, {})) for run, status in self._status.items()
            ]
        return run_families(runs)


RUNS = RunMetrics()
"""Of this process."""
REGISTRY.register(RUNS)
