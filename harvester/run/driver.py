"""The harvest's driver: work list, Ray actors, retries, progress, seal.

The work list is the plan minus the receipts, so a re-run resumes, and P3 (after any process is killed, the
same command produces the same dataset) needs nothing more. There is one driver, so units need no leases.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from winnow.cluster.crew import (
    Crew,
    CrewSettings,
    Named,
    cluster,
    gpus_per_actor,
    last_line,
    threads_per_actor,
)
from winnow.common.figures import count_of, human_bytes
from winnow.common.reporter import Progress, say
from winnow.common.signals import SCHEDULER_SIGNALS, interrupted_by_signals, stop_on_signals
from winnow.harvester.plan.planner import find_plan, make_plan
from winnow.harvester.run.brake import Brake
from winnow.harvester.run.failures import Failures
from winnow.harvester.run.ledger import RunLedger, settle_account
from winnow.harvester.run.metrics import HARVEST
from winnow.harvester.run.part import ALL, Part, check_part
from winnow.harvester.run.single import LocalRun, check_single_writer, commit_voids
from winnow.harvester.run.worker import UnitWorker
from winnow.schemas.config import Config, section
from winnow.schemas.errors import StoreError, WinnowError, WorkerError
from winnow.schemas.follow import FollowLimits
from winnow.schemas.harvest import HarvestManifest, HarvestPlan
from winnow.store.objects import ObjectStore
from winnow.store.read.reader import receipts_present
from winnow.store.write.writer import seal

UNITS_QUEUED = 2
"""Units at an actor at once: one in the LM, one being committed. Bounds an actor's memory (P5)."""
POLL_SECONDS = 1.0
NAMED = Named(
    "harvest",
    "harvest.actors",
    "harvest.threads_per_actor",
    "harvest.gpus_per_actor",
    "harvest.ray_address",
)


def crew_settings(config: Config) -> CrewSettings:
    """What the crew reads of a harvest's config."""
    spec, subject = config.harvest, config.subject
    return CrewSettings(
        NAMED,
        actors=spec.actors,
        threads=spec.threads_per_actor,
        gpus=spec.gpus_per_actor,
        may_use_gpus=subject is None or subject.device != "cpu",
        address=spec.ray_address,
    )


def _forecast_bytes(plan: HarvestPlan, units: int) -> int:
    """Bytes that `units` more units will take in the store."""
    # Uncompressed, even with plan.compress: how far rows shrink is known only once they exist.
    return units * sum(plan.shard_bytes(site.name) for site in plan.sites)


def _check_store_space(
    plan: HarvestPlan, store: ObjectStore, units: int, follow: FollowLimits | None = None
) -> None:
    """Check that a local root's disk has room for `units` more units, or for the ring.

    Raises:
        StoreError: It has not.
    """
    need, free = _forecast_bytes(plan, units), store.free_bytes()
    # A ring deletes behind its followers: datasets larger than the disk are what it is for.
    if follow is not None and follow.ring:
        need = min(need, follow.high_water_bytes)
    if free is not None and need > free:
        raise StoreError(
            f"disk of {store.uri} is too small for this harvest",
            expected=f"{human_bytes(need)} free",
            got=human_bytes(free),
            fix="Free space, choose another root, or lower plan.train_units",
        )


def ensure_plan(config: Config, store: ObjectStore) -> HarvestPlan:
    """The root's plan if it is whole and fits the config, else a freshly made or completed one."""
    section(config.subject, "subject")
    spec = section(config.plan, "plan")
    plan = find_plan(config, store)
    if plan is not None:
        _check_store_space(plan, store, 0)
        return plan
    # only now: a whole plan is harvested without its corpus, which may have moved
    if spec.tokens_from is None:
        section(config.corpus, "corpus")
    with Progress("plan", None, "tokens") as bar:
        return make_plan(config, store, progress=lambda tokens, **facts: bar.update(tokens, **facts))


def harvest(
    config: Config, store: ObjectStore, plan: HarvestPlan, *, accept_quarantined: bool = False
) -> HarvestManifest:
    """Make every unit that has no receipt yet, then seal the dataset.

    Args:
        config: With `subject` and `harvest`.
        store: The dataset's root.
        plan: The plan found there.
        accept_quarantined: Commit units that cannot be computed as void, with the cause.

    Raises:
        WorkerError: Units are quarantined, or too many attempts failed in a row.
        NonFiniteError: Only NaN or infinity from the subject prevents the seal.
        StoreError: The store fails the probe, refuses or is full.
        KeyboardInterrupt: SIGTERM or SIGUSR1 was received; units that had begun are committed.
    """
    _make_units(config, store, plan, ALL, accept_quarantined)
    return _seal(store, plan)


def harvest_part(
    config: Config, store: ObjectStore, plan: HarvestPlan, part: Part, *, accept_quarantined: bool = False
) -> HarvestManifest | None:
    """Make the units of one part that have no receipt yet; seals the dataset if they were the last.

    Parts may run at the same time, on machines that only share the store.

    Args:
        config: See `harvest`, whose errors it raises too.
        store: See `harvest`.
        plan: See `harvest`.
        part: Which units.
        accept_quarantined: See `harvest`.

    Returns:
        The manifest, or None if units of other parts are missing.

    Raises:
        ConfigError: The config has a setting that only a harvest of all units can have.
    """
    check_part(config)
    _make_units(config, store, plan, part, accept_quarantined)
    # Two parts that end together may both seal: the second one finds the manifest of the first.
    return _seal(store, plan) if len(receipts_present(store, plan)) == plan.units else None


def _seal(store: ObjectStore, plan: HarvestPlan) -> HarvestManifest:
    # Also if nothing was left to do: a run killed between the last receipt and the seal, or between the seal
    # and the account, is completed by the next one.
    manifest = seal(store, plan)
    settle_account(store, plan, manifest)
    return manifest


def _make_units(
    config: Config, store: ObjectStore, plan: HarvestPlan, part: Part, accept_quarantined: bool
) -> None:
    """Make those units of a part that have no receipt yet."""
    check_single_writer(config)
    units = part.units(plan)
    have = receipts_present(store, plan)
    todo = [unit for unit in units if unit not in have]
    if not todo:
        return
    # Before the first unit: a server that ignores if-none-match would let two attempts at a unit
    # overwrite each other, and hours of harvest would rest on it.
    store.probe(single_writer=config.storage.single_writer)
    _check_store_space(plan, store, len(todo), config.harvest.follow)
    say(
        f"harvest: {len(todo):,} of {count_of(len(units), 'unit')} to do, "
        f"{human_bytes(_forecast_bytes(plan, len(todo)))} to write to {store.uri}; loading the subject"
    )

    # Called when storage failed: "retry later" is useless on a full disk, which should end the harvest
    # with that sentence.
    def enough_space() -> None:
        present = receipts_present(store, plan)
        _check_store_space(plan, store, sum(unit not in present for unit in units))

    failures = Failures(config.harvest, enough_space)
    with RunLedger(store, plan, failures) as ledger:
        HARVEST.show(ledger, store.uri, part, units=len(units), before=len(units) - len(todo))
        if config.storage.single_writer:
            LocalRun(config, store, plan, todo, failures, ledger).go()
        else:
            with cluster(crew_settings(config)):
                _Run(config, store, plan, todo, len(units), failures, ledger).go()
    # After the run, not during it: bad units must not keep the others from being committed.
    if failures.quarantined:
        if not accept_quarantined:
            raise failures.refusal(plan.units)
        commit_voids(store, plan, config.harvest, failures)


class _Run:
    """One run's bookkeeping: which unit is where, what failed how often."""

    def __init__(
        self,
        config: Config,
        store: ObjectStore,
        plan: HarvestPlan,
        todo: list[int],
        units: int,
        failures: Failures,
        ledger: RunLedger,
    ) -> None:
        self._config, self._store, self._plan, self._ledger = config, store, plan, ledger
        self._queue, self._units = deque(todo), units
        self._flying: dict[Any, tuple[int, int]] = {}  # result ref -> (actor's number, unit)
        self._failures = failures
        self._windows: dict[int, int] = {}  # actor's number -> windows it has run
        self._committed = 0
        self._total = len(todo)
        self._stopping = threading.Event()
        # From the work list and not from the store once more: a listing is a request per 1,000 keys.
        have = set(range(plan.units)) - set(todo)
        self._brake = Brake(config.harvest.follow, store, plan, have)

    def go(self) -> None:
        """Work until the queue is empty; see `harvest` for signals."""
        spec = self._plan.spec
        unit_tokens = spec.windows_per_unit * spec.context_length
        with interrupted_by_signals():
            self._crew = self._muster()
            self._actors = self._crew.members
            self._crew.await_first()
        # Only now, so that starting Ray and loading the subject do not lower the rate that the next
        # forecast reads from the ledger.
        self._ledger.start()
        done_before = self._units - self._total
        bar = Progress("harvest", self._units * unit_tokens, "tokens", done_before * unit_tokens)
        # Not SIGINT: who presses Ctrl-C waits, and units in flight may take minutes.
        with bar, stop_on_signals(self._stopping, SCHEDULER_SIGNALS):
            self._hand_out()
            while self._flying or self._queue:
                if self._stopping.is_set() and self._queue:
                    say(f"harvest: stopping after {count_of(len(self._flying), 'unit')} already begun")
                    self._queue.clear()
                    continue
                moments = [*self._flying, *self._crew.waiting]
                if not moments:  # the brake is on: ray.wait refuses an empty list
                    time.sleep(POLL_SECONDS)
                    self._hand_out()
                    continue
                # With a timeout, so that the progress bar and the brake are updated while units take minutes.
                finished, _ = ray.wait(moments, num_returns=1, timeout=POLL_SECONDS)
                for ref in finished:
                    if ref in self._flying:
                        self._collect(ref)
                    else:
                        self._crew.welcome(ref)
                self._hand_out()
                # Tokens in the LM count already; the greater of the two, since an actor's last answer may be
                # older than its last commit.
                units = done_before + self._committed
                tokens = max(units * unit_tokens, done_before * unit_tokens + self._tokens_run())
                bar.update(tokens, units=f"{units}/{self._units}", failed=self._failures.total)
                HARVEST.actors, HARVEST.paused = len(self._actors), self._brake.paused
        if self._stopping.is_set() and self._committed < self._total:
            raise KeyboardInterrupt

    def _muster(self) -> Crew:
        """Ask for the actors."""
        spec, settings = self._config.harvest, crew_settings(self._config)
        threads, gpus = threads_per_actor(settings), gpus_per_actor(settings)
        actor_class: Any = ray.remote(UnitWorker)
        # One thread more than units, so that `windows_done` is answered while both are at work.
        remote = actor_class.options(num_cpus=threads, num_gpus=gpus, max_concurrency=UNITS_QUEUED + 1)

        # Contracts and a URI, never a store: a client holds sockets and credentials, which must not be
        # pickled.
        def make() -> Any:
            return remote.remote(
                self._plan.to_json(),
                self._store.uri,
                self._config.storage,
                section(self._config.subject, "subject"),
                threads,
                spec.batch_windows,
                gpus,
            )

        return Crew(make, min(spec.actors, self._total), {"CPU": threads, "GPU": gpus}, settings)

    def _hand_out(self) -> None:
        # A unit that an actor died over fills its actor, so that it takes no other unit with it next time.
        load: Counter[int] = Counter()
        for number, unit in self._flying.values():
            load[number] += UNITS_QUEUED if self._failures.alone(unit) else 1
        for number, actor in self._actors.items():
            while self._queue and load[number] < UNITS_QUEUED and self._brake.may_begin(self._queue[0]):
                if self._failures.alone(self._queue[0]) and load[number]:
                    break
                unit = self._queue.popleft()
                # Counted when it is handed out, not when it is committed: units in flight would otherwise
                # pass the high-water mark together.
                self._brake.begin(unit)
                self._flying[actor.run.remote(unit)] = (number, unit)
                load[number] += UNITS_QUEUED if self._failures.alone(unit) else 1

    def _collect(self, ref: Any) -> None:
        number, unit = self._flying.pop(ref)
        try:
            self._ledger.add(ray.get(ref))
        except RayActorError as error:
            # What signals this process may signal its actors too: the units are no worse for it.
            if self._stopping.is_set():
                return
            # A lost node does not count towards unit_attempts. To the front: followers wait for the units in
            # the order of the queue.
            if self._crew.lost(number, error):
                self._queue.appendleft(unit)
                return
            self._failed(unit, WorkerError(f"unit {unit}: its actor died", got=last_line(error)), died=True)
        except RayTaskError as error:
            known = error.cause if isinstance(error.cause, WinnowError) else None
            # Python's own MemoryError leaves the actor alive; the unit is tried alone, as after a kill by the
            # kernel.
            starved = isinstance(error.cause, MemoryError)
            self._failed(unit, known or WorkerError(f"unit {unit}", got=last_line(error)), died=starved)
        else:
            self._committed += 1
            self._failures.succeeded(unit)

    def _failed(self, unit: int, error: WinnowError, *, died: bool = False) -> None:
        if self._failures.failed(unit, error, died=died) and not self._stopping.is_set():
            self._queue.append(unit)

    def _tokens_run(self) -> int:
        """Tokens that the LM has run in this run; an actor that does not answer keeps its last count."""
        # A figure for the progress bar only, so it may cost a second at most and an error in it is nobody's.
        asked = {actor.windows_done.remote(): number for number, actor in self._actors.items()}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=POLL_SECONDS)
        for ref in answered:
            try:
                self._windows[asked[ref]] = ray.get(ref)
            except (RayActorError, RayTaskError):
                continue
        # Capped: repeated attempts run more windows than there are.
        most = self._total * self._plan.spec.windows_per_unit
        HARVEST.tokens_run = min(sum(self._windows.values()), most) * self._plan.spec.context_length
        return HARVEST.tokens_run
