"""A harvest's figures as Prometheus metrics, from its entry in the ledger."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from winnow.common.metrics import REGISTRY
from winnow.harvester.run.ledger import RunLedger
from winnow.harvester.run.part import Part


class _Harvest(NamedTuple):
    ledger: RunLedger
    labels: list[str]
    units: int
    before: int


class HarvestMetrics(Collector):
    """The harvest of this process; none before the first."""

    def __init__(self) -> None:
        self._harvest: _Harvest | None = None
        self.tokens_run = 0
        """Tokens that the LM has run in this process, also of units that are not committed yet."""
        self.actors = 1
        """Actors that are ready for units."""
        self.paused = False
        """Whether the harvest waits for the trainers that follow it."""

    def show(self, ledger: RunLedger, root: str, part: Part, *, units: int, before: int) -> None:
        """Show a harvest.

        Args:
            ledger: Its entry.
            root: The dataset's root.
            part: Which part of the harvest it is.
            units: Units of the part.
            before: Those that were committed before this process.
        """
        self._harvest = _Harvest(ledger, [root, f"{part.index}/{part.count}"], units, before)
        self.tokens_run, self.actors, self.paused = 0, 1, False

    def collect(self) -> Iterable[Metric]:
        """See `prometheus_client.registry.Collector`."""
        # One read: the driver's thread may put another in its place meanwhile.
        harvest = self._harvest
        if harvest is None:
            return []
        run = harvest.ledger.entry(ended=False)
        counters = {
            "committed_units": ("Units committed by this process", run.units),
            "tokens": ("Tokens that the LM has run in this process", max(self.tokens_run, run.tokens)),
            "written_bytes": ("Bytes of the shards that were committed", run.bytes),
            "lm_seconds": ("Time in which the LM worked, summed over actors", run.lm_seconds),
            "storage_wait_seconds": (
                "Time in which the LM waited for storage, summed over actors",
                run.storage_wait_seconds,
            ),
            "failed_attempts": ("Attempts at units that failed", run.failures),
        }
        gauges = {
            "units": ("Units of the part", harvest.units),
            "units_committed": ("Those committed, also by earlier processes", harvest.before + run.units),
            "actors": ("Actors that are ready for units", self.actors),
            "paused": ("1 while the harvest waits for the trainers that follow it", float(self.paused)),
            "batch_windows": ("Windows per forward pass of the LM", run.batch_windows or 0),
        }
        families: list[Metric] = []
        for kind, found in ((CounterMetricFamily, counters), (GaugeMetricFamily, gauges)):
            for name, (text, value) in found.items():
                family = kind(f"winnow_harvest_{name}", text, labels=["root", "part"])
                family.add_metric(harvest.labels, value)
                families.append(family)
        return families


HARVEST = HarvestMetrics()
"""Of this process."""
REGISTRY.register(HARVEST)
