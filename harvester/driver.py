"""The harvest's driver: work list, Ray actors, retries, progress, seal.

The work list is the plan minus the receipts, so a re-run resumes and P3 (kill anything, run the
same command again) needs nothing more. One driver, no leases.
"""

from __future__ import annotations

import datetime
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from harvester.brake import Brake
from harvester.worker import UnitWorker
from schemas.config import Config
from schemas.errors import MissingObject, NonFiniteError, StoreError, WinnowError, WorkerError
from schemas.follow import FollowLimits
from schemas.harvest import HarvestLedger, HarvestManifest, HarvestPlan, LedgerRun
from store.console import Progress, human_bytes, say, section
from store.objects import ObjectStore
from store.reader import receipts_present
from store.writer import seal

LEDGER_KEY = "ledger.json"
UNITS_QUEUED = 2
"""Units at an actor at once: one in the LM, one being committed. Bounds an actor's memory."""
POLL_SECONDS = 1.0


def forecast_bytes(plan: HarvestPlan, units: int) -> int:
    """Bytes that `units` more units will take in the store."""
    return units * sum(plan.shard_bytes(site.name) for site in plan.sites)


def check_space(
    plan: HarvestPlan, store: ObjectStore, units: int, follow: FollowLimits | None = None
) -> None:
    """StoreError where a local root's disk is too small for `units` more units, or for the ring."""
    need, free = forecast_bytes(plan, units), store.free_bytes()
    if follow is not None and follow.ring:
        need = min(need, follow.high_water_bytes)
    if free is not None and need > free:
        raise StoreError(
            f"disk of {store.uri} is too small for this harvest",
            expected=f"{human_bytes(need)} free",
            got=human_bytes(free),
            fix="Free space, choose another root, or lower plan.train_units",
        )


def harvest(config: Config, store: ObjectStore, plan: HarvestPlan) -> HarvestManifest:
    """Make every unit that has no receipt yet, then seal the dataset.

    Args:
        config: With `subject` and `harvest`.
        store: The dataset's root.
        plan: The plan found there.

    Raises:
        WorkerError: A unit failed `harvest.unit_attempts` times.
        NonFiniteError: The subject gave NaN or infinity.
        StoreError: The store lies, refuses or is full.
    """
    have = receipts_present(store, plan)
    todo = [unit for unit in range(plan.units) if unit not in have]
    if todo:
        store.probe(single_writer=config.storage.single_writer)
        check_space(plan, store, len(todo), config.harvest.follow)
        say(
            f"harvest: {len(todo)} of {plan.units} units to do, "
            f"{human_bytes(forecast_bytes(plan, len(todo)))} to write to {store.uri}"
        )
        with _cluster(config):
            run = _Run(config, store, plan, todo).go()
        _record(store, run)
    return seal(store, plan)


def read_ledger(store: ObjectStore) -> HarvestLedger:
    """The ledger beside the manifest; empty where no run has finished."""
    try:
        return HarvestLedger.from_json(store.get(LEDGER_KEY), origin=LEDGER_KEY)
    except MissingObject:
        return HarvestLedger()


def _record(store: ObjectStore, run: LedgerRun) -> None:
    ledger = read_ledger(store)
    store.put(LEDGER_KEY, HarvestLedger(runs=(*ledger.runs, run)).to_json())


@contextmanager
def _cluster(config: Config) -> Generator[None]:
    """Ray: the cluster that the config names, or one on this machine for the time of the run."""
    if ray.is_initialized():
        yield
        return
    address = config.harvest.ray_address
    local: dict[str, Any] = {} if address else {"include_dashboard": False, "object_store_memory": 80 * 2**20}
    ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **local)
    try:
        yield
    finally:
        ray.shutdown()


class _Run:
    """One run's bookkeeping: which unit is where, what failed how often."""

    def __init__(self, config: Config, store: ObjectStore, plan: HarvestPlan, todo: list[int]) -> None:
        self._config, self._store, self._plan = config, store, plan
        self._queue = deque(todo)
        self._flying: dict[Any, tuple[int, int]] = {}  # result ref -> (actor's number, unit)
        self._failures: Counter[int] = Counter()
        self._windows: dict[int, int] = {}  # actor's number -> windows it has run
        self._actors: dict[int, Any] = {}
        self._spawned = 0
        self._committed = 0
        self._total = len(todo)
        have = set(range(plan.units)) - set(todo)
        self._brake = Brake(config.harvest.follow, store, plan, have)

    def go(self) -> LedgerRun:
        """Work until the queue is empty."""
        spec = self._plan.spec
        unit_tokens = spec.windows_per_unit * spec.context_length
        for _ in range(min(self._config.harvest.actors, self._total)):
            self._spawn()
        self._await_subjects()
        start = time.monotonic()
        done_before = self._plan.units - self._total
        with Progress("harvest", self._plan.units * unit_tokens, "tokens", done_before * unit_tokens) as bar:
            self._hand_out()
            while self._flying or self._queue:
                if not self._flying:  # the brake is on
                    time.sleep(POLL_SECONDS)
                    self._hand_out()
                    continue
                finished, _ = ray.wait(list(self._flying), num_returns=1, timeout=POLL_SECONDS)
                for ref in finished:
                    self._collect(ref)
                self._hand_out()
                units = done_before + self._committed
                tokens = max(units * unit_tokens, done_before * unit_tokens + self._tokens_run())
                bar.update(tokens, units=f"{units}/{self._plan.units}", failed=self._failures.total())
        return LedgerRun(
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            units=self._committed,
            tokens=self._committed * unit_tokens,
            seconds=time.monotonic() - start,
            failures=self._failures.total(),
        )

    def _spawn(self) -> None:
        spec = self._config.harvest
        threads = spec.threads_per_actor or max(1, (os.cpu_count() or 1) // spec.actors)
        actor_class: Any = ray.remote(UnitWorker)
        remote = actor_class.options(
            num_cpus=threads, num_gpus=spec.gpus_per_actor, max_concurrency=UNITS_QUEUED + 1
        )
        self._actors[self._spawned] = remote.remote(
            self._plan.to_json(),
            self._store.uri,
            self._config.storage,
            section(self._config.subject, "subject"),
            threads,
            spec.batch_windows,
        )
        self._spawned += 1

    def _await_subjects(self) -> None:
        try:
            ray.get([actor.ready.remote() for actor in self._actors.values()])
        except RayTaskError as error:
            if isinstance(error.cause, WinnowError):
                raise error.cause from error
            raise WorkerError("loading the subject on a worker", got=_first_line(error)) from error
        except RayActorError as error:
            raise WorkerError(
                "a worker died while it loaded the subject",
                got=_first_line(error),
                fix="Look for memory: each of harvest.actors holds one copy of the truncated model",
            ) from error

    def _hand_out(self) -> None:
        load = Counter(number for number, _ in self._flying.values())
        for number, actor in self._actors.items():
            while self._queue and load[number] < UNITS_QUEUED and self._brake.may_begin(self._queue[0]):
                unit = self._queue.popleft()
                self._brake.begin(unit)
                self._flying[actor.run.remote(unit)] = (number, unit)
                load[number] += 1

    def _collect(self, ref: Any) -> None:
        number, unit = self._flying.pop(ref)
        try:
            ray.get(ref)
        except RayActorError as error:
            self._failed(unit, f"its actor died: {_first_line(error)}")
            if self._actors.pop(number, None) is not None:
                self._spawn()
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, WinnowError) else None
            if isinstance(cause, NonFiniteError):
                raise cause from error
            self._failed(unit, str(cause) if cause else _first_line(error))
        else:
            self._committed += 1

    def _failed(self, unit: int, cause: str) -> None:
        self._failures[unit] += 1
        say(f"unit {unit} failed ({self._failures[unit]}x), tried again: {cause}")
        if self._failures[unit] >= self._config.harvest.unit_attempts:
            raise WorkerError(
                f"unit {unit} failed {self._failures[unit]} times",
                expected="a receipt",
                got=cause,
                fix="Remove the cause and run the same command again; finished units are kept",
            )
        self._queue.appendleft(unit)

    def _tokens_run(self) -> int:
        """Tokens the LM has run in this run; an actor that does not answer keeps its last count."""
        asked = {actor.windows_done.remote(): number for number, actor in self._actors.items()}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=POLL_SECONDS)
        for ref in answered:
            try:
                self._windows[asked[ref]] = ray.get(ref)
            except (RayActorError, RayTaskError):
                continue
        most = self._total * self._plan.spec.windows_per_unit
        return min(sum(self._windows.values()), most) * self._plan.spec.context_length


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
