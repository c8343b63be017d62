"""The trainer service's metrics: its queue, its devices, and the runs that it trains now."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from winnow.common.metrics import serving_metrics
from winnow.jobs.queue import job_facts
from winnow.jobs.service import Service
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError, StoreError
from winnow.schemas.service import RunStatus
from winnow.store.objects import open_store
from winnow.trainer.run.metrics import run_families
from winnow.trainer.run.status import read_status

# As long as a lease: a loop that turns more slowly loses its jobs to other services.
_STUCK_SECONDS = 60.0
"""Seconds without a turn after which the loop counts as stuck."""
_JOB_STATES = ("waiting", "running", "stopped", "finished", "failed")


class ServiceMetrics(Collector):
    """The metrics of one service, read from its queue and its runs' folders when they are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        """See `prometheus_client.registry.Collector`.

        Raises:
            StoreError: The queue cannot be reached.
        """
        service = self._service
        facts = job_facts(service.store)
        states = Counter(fact["state"] for fact in facts)
        jobs = GaugeMetricFamily("winnow_jobs", "Jobs of the queue", labels=["state"])
        for state in _JOB_STATES:
            jobs.add_metric([state], states[state])
        devices = GaugeMetricFamily("winnow_devices", "Devices of this service", labels=["state"])
        free = len(service.free)
        devices.add_metric(["free"], free)
        devices.add_metric(["busy"], len(service.devices) - free)
        failed = sum(fact["failed_attempts"] for fact in facts)
        yield jobs
        yield devices
        yield CounterMetricFamily("winnow_failed_attempts", "Attempts that failed", value=failed)
        yield from run_families(
            ({"job": attempt.job.name, "run": out}, status, {})
            for attempt in list(service.attempts)  # a copy: the loop changes it in another thread
            for out in attempt.job.outs
            if (status := _status(out, attempt.job.job.config.storage)) is not None
        )


def _status(out: str, storage: StorageSpec) -> RunStatus | None:
    """A run's status; None also if its folder is unreachable, which its worker reports."""
    try:
        return read_status(open_store(out, storage))
    except (ConfigError, StoreError):
        return None


def service_registry(service: Service) -> CollectorRegistry:
    """A registry of a service's metrics alone."""
    # Not described at registration: that would read the queue before the first scrape.
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServiceMetrics(service))
    return registry


@contextmanager
def serving(service: Service, port: int) -> Iterator[int]:
    """Answer on 127.0.0.1 while the block runs; yields the port. See `serving_metrics`.

    Args:
        service: The service to report on; healthy while its loop turns.
        port: Port to listen on; 0 takes a free one.

    Raises:
        ConfigError: The port is in use.
    """

    def turns() -> bool:
        return time.monotonic() - service.last_turn < _STUCK_SECONDS

    # On loopback only: metrics name jobs and folders.
    with serving_metrics(port, registry=service_registry(service), healthy=turns) as bound:
        yield bound
