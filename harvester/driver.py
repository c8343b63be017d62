"""The harvest's driver: work list, Ray actors, retries, progress, seal.

The work list is the plan minus the receipts, so a re-run resumes and P3 (kill anything, run the
same command again) needs nothing more. One driver, no leases.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from harvester.cluster import Crew, cluster, first_line, threads_per_actor
from harvester.ledger import RunLedger, settle_account
from harvester.worker import UnitWorker
from schemas.config import Config
from schemas.errors import NonFiniteError, StoreError, WinnowError, WorkerError
from schemas.harvest import HarvestManifest, HarvestPlan
from store.console import Progress, human_bytes, say, section
from store.objects import ObjectStore
from store.reader import receipts_present
from store.writer import seal

UNITS_QUEUED = 2
"""Units at an actor at once: one in the LM, one being committed. Bounds an actor's memory."""
POLL_SECONDS = 1.0


def forecast_bytes(plan: HarvestPlan, units: int) -> int:
    """Bytes that `units` more units will take in the store."""
    return units * sum(plan.shard_bytes(site.name) for site in plan.sites)


def check_space(plan: HarvestPlan, store: ObjectStore, units: int) -> None:
    """StoreError where a local root's disk is too small for `units` more units."""
    need, free = forecast_bytes(plan, units), store.free_bytes()
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
        check_space(plan, store, len(todo))
        say(
            f"harvest: {len(todo)} of {plan.units} units to do, "
            f"{human_bytes(forecast_bytes(plan, len(todo)))} to write to {store.uri}"
        )
        with cluster(config):
            _Run(config, store, plan, todo).go()
    manifest = seal(store, plan)
    settle_account(store, plan, manifest)
    return manifest


class _Run:
    """One run's bookkeeping: which unit is where, what failed how often."""

    def __init__(self, config: Config, store: ObjectStore, plan: HarvestPlan, todo: list[int]) -> None:
        self._config, self._store, self._plan = config, store, plan
        self._ledger = RunLedger(store, plan)
        self._queue = deque(todo)
        self._flying: dict[Any, tuple[int, int]] = {}  # result ref -> (actor's number, unit)
        self._failures: Counter[int] = Counter()
        self._windows: dict[int, int] = {}  # actor's number -> windows it has run
        self._committed = 0
        self._total = len(todo)

    def go(self) -> None:
        """Work until the queue is empty."""
        spec = self._plan.spec
        unit_tokens = spec.windows_per_unit * spec.context_length
        self._crew = self._muster()
        self._actors = self._crew.members
        self._crew.await_first()
        self._ledger.start()
        done_before = self._plan.units - self._total
        with Progress("harvest", self._plan.units * unit_tokens, "tokens", done_before * unit_tokens) as bar:
            self._hand_out()
            while self._flying or self._queue:
                moments = [*self._flying, *self._crew.waiting]
                finished, _ = ray.wait(moments, num_returns=1, timeout=POLL_SECONDS)
                for ref in finished:
                    if ref in self._flying:
                        self._collect(ref)
                    else:
                        self._crew.welcome(ref)
                self._hand_out()
                units = done_before + self._committed
                tokens = max(units * unit_tokens, done_before * unit_tokens + self._tokens_run())
                bar.update(tokens, units=f"{units}/{self._plan.units}", failed=self._failures.total())
        self._ledger.failures = self._failures.total()
        self._ledger.end()

    def _muster(self) -> Crew:
        """Ask for the actors."""
        spec = self._config.harvest
        threads = threads_per_actor(self._config)
        actor_class: Any = ray.remote(UnitWorker)
        remote = actor_class.options(
            num_cpus=threads, num_gpus=spec.gpus_per_actor, max_concurrency=UNITS_QUEUED + 1
        )

        def make() -> Any:
            return remote.remote(
                self._plan.to_json(),
                self._store.uri,
                self._config.storage,
                section(self._config.subject, "subject"),
                threads,
                spec.batch_windows,
            )

        return Crew(
            make,
            min(spec.actors, self._total),
            {"CPU": threads, "GPU": spec.gpus_per_actor},
            growing=spec.ray_address is not None,
        )

    def _hand_out(self) -> None:
        load = Counter(number for number, _ in self._flying.values())
        for number, actor in self._actors.items():
            while self._queue and load[number] < UNITS_QUEUED:
                unit = self._queue.popleft()
                self._flying[actor.run.remote(unit)] = (number, unit)
                load[number] += 1

    def _collect(self, ref: Any) -> None:
        number, unit = self._flying.pop(ref)
        try:
            self._ledger.add(ray.get(ref))
        except RayActorError as error:
            if self._crew.lost(number, error):  # with its node: no fault of the unit
                self._queue.appendleft(unit)
                return
            self._failed(unit, f"its actor died: {first_line(error)}")
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, WinnowError) else None
            if isinstance(cause, NonFiniteError):
                raise cause from error
            self._failed(unit, str(cause) if cause else first_line(error))
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
