"""A harvest whose only writer is the driver's own process, and what only the driver commits.

With `storage.single_writer` the store may ignore if-none-match, so only the absence of a second writer
keeps a unit from being overwritten. An actor cannot guarantee that: one that was presumed dead may still be
writing while its successor computes the same unit. So there are no actors: the driver computes the units
itself, one after another.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from winnow.common.clock import now
from winnow.common.cores import usable_cores
from winnow.common.figures import count_of
from winnow.common.reporter import Progress, say
from winnow.common.signals import SCHEDULER_SIGNALS, stop_on_signals
from winnow.harvester.run.failures import Failures
from winnow.harvester.run.ledger import RunLedger, UnitFacts
from winnow.harvester.run.worker import UnitWorker
from winnow.schemas.config import Config, section
from winnow.schemas.errors import ConfigError, WinnowError, WorkerError
from winnow.schemas.harvest import Attempt, HarvestPlan, HarvestSpec
from winnow.store.objects import ObjectStore
from winnow.store.read.reader import load_token_digests
from winnow.store.write.writer import commit_void

log = logging.getLogger("winnow.harvester")

_UNITS_HELD = 2
"""Units in this process at once: one in the LM, one being committed."""


def check_single_writer(config: Config) -> None:
    """Check that a single writer is not combined with actors or followers.

    Raises:
        ConfigError: It is.
    """
    spec = config.harvest
    if config.storage.single_writer and spec.follow is not None:
        raise ConfigError(
            "harvest.follow holds back actors, and storage.single_writer has none",
            expected="one of the two",
            fix="Leave harvest.follow out, or use a store that honours if-none-match",
        )
    if config.storage.single_writer and (spec.actors > 1 or spec.ray_address):
        raise ConfigError(
            "storage.single_writer computes the units in this process, without Ray",
            expected="harvest.actors: 1 and no harvest.ray_address",
            got=f"harvest.actors: {spec.actors}, harvest.ray_address: {spec.ray_address}",
            fix="Use a store that honours if-none-match for a harvest with several workers",
        )


def local_worker(config: Config, store: ObjectStore, plan: HarvestPlan) -> UnitWorker:
    """A worker in this process; its subject is not loaded yet."""
    # Loaded with the first unit: a repair that finds nothing to recompute needs no LM.
    spec = config.harvest
    return UnitWorker(
        plan.to_json(),
        store.uri,
        config.storage,
        section(config.subject, "subject"),
        spec.threads_per_actor or usable_cores(),
        spec.batch_windows,
    )


class LocalRun:
    """A run in this process: the same work list, failures and figures as one on Ray."""

    def __init__(
        self,
        config: Config,
        store: ObjectStore,
        plan: HarvestPlan,
        todo: list[int],
        failures: Failures,
        ledger: RunLedger,
    ) -> None:
        self._config, self._store, self._plan, self._ledger = config, store, plan, ledger
        self._queue, self._failures, self._committed = deque(todo), failures, 0

    def go(self) -> None:
        """Work until the queue is empty; see `winnow.harvester.run.driver.harvest` for signals."""
        worker = local_worker(self._config, self._store, self._plan)
        say("harvest: single writer, the units are computed in this process")
        worker.ready()
        self._ledger.start()
        plan = self._plan
        unit_tokens = plan.spec.windows_per_unit * plan.spec.context_length
        done_before = (plan.units - len(self._queue)) * unit_tokens
        flying: dict[Future[UnitFacts], int] = {}
        total, stopping = len(self._queue), threading.Event()
        # Threads, as inside an actor: one unit is committed while the LM, behind the worker's lock, runs the
        # next.
        pool = ThreadPoolExecutor(_UNITS_HELD, thread_name_prefix="winnow-unit")
        try:
            bar = Progress("harvest", plan.units * unit_tokens, "tokens", done_before)
            with bar, stop_on_signals(stopping, SCHEDULER_SIGNALS):
                while self._queue or flying:
                    if stopping.is_set() and self._queue:
                        say(f"harvest: stopping after {count_of(len(flying), 'unit')} already begun")
                        self._queue.clear()
                        continue
                    while self._queue and len(flying) < _UNITS_HELD:
                        unit = self._queue.popleft()
                        flying[pool.submit(worker.run, unit)] = unit
                    for future in wait(flying, return_when=FIRST_COMPLETED).done:
                        self._collect(future, flying.pop(future))
                    done = done_before + self._committed * unit_tokens
                    bar.update(done, units=f"{done // unit_tokens}/{plan.units}", failed=self._failures.total)
        finally:
            pool.shutdown(cancel_futures=True)
        if stopping.is_set() and self._committed < total:
            raise KeyboardInterrupt

    def _collect(self, future: Future[UnitFacts], unit: int) -> None:
        error = future.exception()
        if error is None:
            self._committed += 1
            self._ledger.add(future.result())
            self._failures.succeeded(unit)
            return
        # This very process has no memory left: no fault of the unit, and a retry would fail the same way.
        if isinstance(error, MemoryError) or not isinstance(error, Exception):
            raise error
        known = error if isinstance(error, WinnowError) else WorkerError(f"unit {unit}", got=str(error)[:300])
        if self._failures.failed(unit, known):
            self._queue.append(unit)


def commit_voids(store: ObjectStore, plan: HarvestPlan, spec: HarvestSpec, failures: Failures) -> None:
    """Commit every quarantined unit as void, with its cause."""
    # Only after the run: a unit that an attempt may still commit must not be declared void.
    digests = load_token_digests(store, plan)
    for unit, cause in failures.causes().items():
        attempt = Attempt(
            id=uuid.uuid4().hex,
            seconds=0.0,
            batch_windows=0,
            threads=spec.threads_per_actor,
            device="none",
            finished=now(),
        )
        tokens = digests[unit].tobytes().hex()
        commit_void(store, plan, unit, cause, tokens_sha256=tokens, attempt=attempt)
        log.warning("unit %d is void: %s", unit, cause)
