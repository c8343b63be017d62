"""Ray for harvest and index: where it runs, and the crew of actors that comes and goes with nodes."""

from __future__ import annotations

import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError
from ray.job_config import JobConfig

from winnow.common.cores import cores_each, usable_cores
from winnow.common.figures import brief, count_of
from winnow.common.reporter import say
from winnow.schemas.errors import ConfigError, WinnowError, WorkerError

log = logging.getLogger("winnow.cluster")

WAIT_NOTE_SECONDS = 30.0
"""Seconds between messages while no actor is ready."""
# Only handles, unit numbers and receipts' facts go through Ray: rows are written straight to the store.
# Ray's own default would reserve a share of the machine's memory.
_LOCAL_OBJECTS_BYTES = 80 * 2**20
"""Size of Ray's object store on this machine."""

_VERDICT_SECONDS = 30.0
"""Time limit for an actor that cannot be reached to answer again or to be confirmed dead."""

# Ray has no error class for the death of a node: only the message tells it from a crash of the actor,
# and only the crash counts against the unit.
_NODE_LOST = ("node has died", "node is dead", "node died", "node was", "preempt")


class Named(NamedTuple):
    """What messages about a crew call it and its settings."""

    who: str
    actors: str
    threads: str
    gpus: str
    address: str


@dataclass(frozen=True)
class CrewSettings:
    """Where a crew runs, and what each of its actors gets."""

    named: Named
    """For messages."""
    actors: int = 1
    """The largest number of actors."""
    threads: int = 0
    """CPU threads per actor; 0 divides the cores by the actors."""
    gpus: float | None = None
    """GPUs per actor, or a share of one; None: one if the cluster has any and `may_use_gpus`."""
    may_use_gpus: bool = True
    """Whether actors make use of a GPU that `gpus` does not ask for."""
    address: str | None = None
    """A running Ray cluster (`auto`, `host:6379`); None starts Ray on this machine for the run."""


@contextmanager
def cluster(settings: CrewSettings) -> Generator[None]:
    """Ray: the cluster that the settings name, or one on this machine for the time of the run.

    Raises:
        ConfigError: No such cluster, or it requires a token that was not given.
        WorkerError: Ray did not start on this machine.
    """
    with redirect_stdout(sys.stderr):  # Ray reports dead workers on stdout, which is the result's
        yield from _session(settings)


def _session(settings: CrewSettings) -> Generator[None]:
    # Somebody else's session, such as a test's or a notebook's: used, and not shut down.
    if ray.is_initialized():
        yield
        return
    address = settings.address
    local: dict[str, Any] = {}
    if not address:  # Ray would count the machine's cores, whatever this process may use of them
        local = {
            "include_dashboard": False,
            "object_store_memory": _LOCAL_OBJECTS_BYTES,
            "num_cpus": usable_cores(),
        }
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address or "local",
            job_config=_looking_where_the_driver_looks(),
            logging_level=logging.ERROR,
            log_to_driver=False,
            **local,
        )
    except Exception as error:  # of a start that takes longer than 30 s Ray raises Exception itself
        if not address:
            raise WorkerError(
                f"{settings.named.who}: Ray did not start on this machine",
                got=last_line(error),
                fix="Run the same command again when the machine is less busy. If it is not, see Ray's logs: "
                "session_latest/logs in its folder, by default /tmp/ray",
            ) from error
        if not isinstance(error, ConnectionError | RuntimeError):
            raise
        raise ConfigError(
            f"{settings.named.address} {address!r}: no Ray cluster can be joined there",
            got=last_line(error),
            fix="Start one (`ray start --head`), give its host:port, and set RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH if it asks for a token",
        ) from error
    # Ray's own handler would end the process with exit code 15 and skip what a stopped command says.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


class _DriversPaths(list[str]):
    def extend(self, iterable: Iterable[str]) -> None:
        own = {Path(path).resolve() for path in sys.path}
        super().extend(path for path in iterable if Path(path).resolve() in own)


def _looking_where_the_driver_looks() -> JobConfig:
    """A job whose workers look for modules in the driver's working directory only if the driver does."""
    # Ray looks there before anywhere else: a user's `random.py` or `datasets.py` would be imported instead of
    # what our libraries mean, and every worker would die of it. The command itself does not look there.
    # Ray has no option for it; if this attribute of its own went away, it would look there again.
    config = JobConfig()
    config._py_driver_sys_path = _DriversPaths()  # pyright: ignore[reportPrivateUsage]
    return config


def threads_per_actor(settings: CrewSettings) -> int:
    """CPU threads per actor: as configured, or this process's cores divided by the actors.

    On a cluster the cores are those of the smallest node with CPUs.
    """
    if settings.threads:
        return settings.threads
    if not settings.address and not _joined():
        return cores_each(settings.actors)
    # The smallest node, so that an actor fits on every one, with the same number of threads on each. A head
    # that reserves no CPUs holds no actors and is not counted.
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    cores = [count for count in cores if count]
    threads = max(1, min(cores, default=1) // math.ceil(settings.actors / max(len(cores), 1)))
    named = settings.named
    # Reported, because the number of threads decides the last bits of the rows: another set of nodes at the
    # next start would choose another number, and the digests would differ.
    say(
        f"{named.who}: {count_of(threads, 'thread')} per actor, from the nodes there are; "
        f"{named.threads} fixes it"
    )
    return threads


def gpus_per_actor(settings: CrewSettings) -> float:
    """GPUs per actor: as configured, or one if the cluster has any and the actors may use it."""
    if settings.gpus is not None:
        return settings.gpus
    if not settings.may_use_gpus:
        return 0.0
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def _joined() -> bool:
    return ray.is_initialized() and len(ray.nodes()) > 1


class Crew:
    """Actors that wait for a node, actors that are ready for work, and actors that died.

    Ray keeps an actor that finds no room waiting and places it on the first node that has some, so a
    node that joins late gets work; one actor is enough to begin.

    Args:
        make: Makes the handle of a new actor, which has `ready()`.
        wanted: The number of actors to ask for: of `settings.actors`, as many as there is work for.
        needs: Resources of one, such as `{"CPU": 2, "GPU": 0.5}`.
        settings: Where they run. Without an address no node can join, so `needs` that no node here
            meets are an error.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        wanted: int,
        needs: dict[str, float],
        settings: CrewSettings,
    ) -> None:
        self._make, self._needs = make, needs
        self._growing, self._named = settings.address is not None, settings.named
        self.members: dict[int, Any] = {}
        """Actor's number -> handle, of those that are ready for units."""
        self._coming: dict[Any, tuple[int, Any]] = {}  # ref of ready() -> (number, handle)
        self._started: dict[int, Any] = {}  # number -> ref that resolves once the actor's process runs
        self._spawned = 0
        self._fallen: dict[int, bool] = {}  # number of a dead actor -> whether its node went with it
        self.nodes_lost = 0
        # All at once, also those that no node has room for yet: the waiting ones are what a node that joins
        # late is given.
        for _ in range(wanted):
            self._spawn()

    @property
    def waiting(self) -> list[Any]:
        """References that resolve when an actor is ready, for `ray.wait` together with the caller's own."""
        return list(self._coming)

    def await_first(self) -> None:
        """Wait until one actor is ready.

        Raises:
            ConfigError: This machine cannot hold an actor.
            WinnowError: Loading the subject failed; the cause.
        """
        noted = time.monotonic()
        while not self.members:
            self._require_room()
            done, _ = ray.wait(self.waiting, num_returns=1, timeout=WAIT_NOTE_SECONDS / 10)
            for ref in done:
                self.welcome(ref)
            if not self.members and time.monotonic() - noted >= WAIT_NOTE_SECONDS:
                noted = time.monotonic()
                say(f"{self._named.who}: {self._state()}")

    def _state(self) -> str:
        """Why no actor is ready yet, as far as it is known."""
        # What Ray has free does not tell an actor that is loading its model from one without room: that its
        # process runs does.
        refs = list(self._started.values())
        started, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        if started:
            return f"{count_of(len(started), 'actor')} of {len(refs)} loading the subject"
        return no_room(self._needs, ray.available_resources())

    def welcome(self, ref: Any) -> None:
        """Add the actor whose reference from `waiting` has resolved to `members`.

        Raises:
            WinnowError: Loading on the actor failed; the cause.
            WorkerError: The actor died while it loaded, and its node did not.
        """
        number, actor = self._coming.pop(ref)
        del self._started[number]
        try:
            ray.get(ref)
        except RayTaskError as error:
            # The sentence with its fix and exit code, not Ray's traceback around it.
            if isinstance(error.cause, WinnowError):
                raise error.cause from error
            raise WorkerError("loading the subject on a worker", got=last_line(error)) from error
        except RayActorError as error:
            if _node_lost(error):
                self.nodes_lost += 1
                self._spawn()
                return
            # Not spawned again: a subject that does not fit in memory would kill each successor as well.
            raise WorkerError(
                "a worker died while it loaded the subject",
                got=last_line(error),
                fix=f"Look for memory: each of {self._named.actors} holds one copy of the model",
            ) from error
        self.members[number] = actor

    def lost(self, number: int, error: RayActorError) -> bool:
        """Handle a unit whose actor died or cannot be reached; a dead actor is replaced.

        Returns:
            True if it is no fault of the unit: the node is gone, or the actor was out of reach for a
            moment and is back.
        """
        # An actor holds several units, and each of them ends here: one death makes one successor.
        if number in self._fallen:
            return self._fallen[number]
        actor = self.members[number]
        verdict = _verdict(actor, error)
        if verdict is None:
            return True
        gone = self._fallen[number] = _node_lost(verdict)
        del self.members[number]
        self._spawn()
        if gone:
            self.nodes_lost += 1
            log.warning(
                "%s: a node is gone, %d actors are left: %s",
                self._named.who,
                len(self.members),
                last_line(verdict),
            )
        return gone

    def _spawn(self) -> None:
        # Numbers are never reused: units of a dead actor come back under its number after it was replaced.
        actor = self._make()
        self._started[self._spawned] = actor.__ray_ready__.remote()
        self._coming[actor.ready.remote()] = (self._spawned, actor)
        self._spawned += 1

    def _require_room(self) -> None:
        # A cluster that nodes may join can wait; on a private Ray the wait would never end.
        if self._growing:
            return
        total = ray.cluster_resources()
        for name, amount in self._needs.items():
            if amount > total.get(name, 0):
                raise ConfigError(
                    f"this machine cannot hold one {self._named.who} actor: it needs {_amounts(self._needs)}",
                    expected=f"at least {amount:g} {name}",
                    got=f"{total.get(name, 0):g}",
                    fix=f"Lower {self._named.gpus} or {self._named.threads}, or name a cluster in "
                    f"{self._named.address}",
                )


def no_room(needs: Mapping[str, float], free: Mapping[str, float]) -> str:
    """Why no actor with these `needs` has started, if `free` is what all nodes together have left."""
    # Ray gives the sum over the nodes only: enough in sum may still be too little on every single node.
    room = all(free.get(name, 0) >= amount for name, amount in needs.items())
    why = "; it is starting, or waits for one node that has all of that" if room else ""
    left = _amounts({name: free.get(name, 0) for name in ("CPU", "GPU")}) or "no CPU"
    return f"no actor has started yet; one needs {_amounts(needs)}, {left} free{why}"


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount)


def _node_lost(error: RayActorError) -> bool:
    """Whether the actor's whole node is gone, and not only its process."""
    text = str(error).lower()
    return error.preempted or any(words in text for words in _NODE_LOST)


def _verdict(actor: Any, error: RayActorError) -> RayActorError | None:
    """Why an actor died; None if it answers again."""
    # Ray says "unavailable" first, and knows only after a while that a node has died: deciding at once
    # would count a lost node against the unit.
    end = time.monotonic() + _VERDICT_SECONDS
    while isinstance(error, ActorUnavailableError) and time.monotonic() < end:
        try:
            ray.get(actor.__ray_ready__.remote(), timeout=_VERDICT_SECONDS)
            return None
        except GetTimeoutError:
            break
        except RayActorError as again:
            error = again
            time.sleep(0.2)
    return error


def last_line(error: Exception) -> str:
    """The last line that is not blank, of an error from Ray, in at most 300 characters."""
    # Ray's messages are tracebacks: the error itself is at their end.
    lines = [line for line in str(error).splitlines() if line.strip()]
    return brief(lines[-1], 300) if lines else type(error).__name__
