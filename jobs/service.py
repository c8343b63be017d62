"""The trainer service: takes jobs from the queue of a root and trains them, each in processes of its own.

One turn of the loop: workers that have ended are recorded, leases are renewed, those of dead services are
ended, and waiting jobs are claimed while there are devices for them. All its state is in the queue, so a
service that is killed and started again resumes from there.

Jobs start in the order of submission. Several services, on any number of machines, may serve one root: they
are the pool.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from winnow.common.reporter import say
from winnow.jobs.queue import Job, Queue, awaits_harvest, is_stopped
from winnow.schemas.errors import ConfigError, StoreError
from winnow.schemas.service import PERMANENT, STOPPED, JobBeat, JobClaim
from winnow.store.objects import ObjectStore

log = logging.getLogger("winnow.jobs")

# A twelfth of a lease, so that a few renewals may fail before a run is lost to another service.
BEAT_SECONDS = 5.0
"""Seconds between two renewals of a lease."""
# By our own clock from when we last saw it change: clocks of different machines are never compared.
LEASE_SECONDS = 60.0
"""Seconds without renewal after which a lease has expired."""
_KILL_SECONDS = 120.0
"""Time limit for a worker that was asked to end to write its checkpoint."""


@dataclass
class Attempt:
    """An attempt at a job by this service."""

    job: Job
    number: int
    slots: list[str]
    processes: list[subprocess.Popen[bytes]]
    log: IO[bytes]
    beats: int = 0
    asked_to_end: float | None = None
    first_codes: list[int] = field(default_factory=list)
    """Codes of the processes that had ended when the others were asked to end on their account."""

    @property
    def code(self) -> int | None:
        """The exit code once all processes have ended, None while they run.

        Of a group's codes, the most informative: a final failure, then of those that ended first a signal's,
        then any other failure, then a stop.
        """
        # When one rank fails, the others end as if stopped or killed, or say that they have lost it: their
        # codes say nothing of the cause. A killed rank has ended before any that misses it.
        codes = sorted(self.first_codes)
        for process in self.processes:
            code = process.poll()
            if code is None:
                return None
            codes.append(code)
        telling = [code for code in codes if code not in (0, STOPPED)]
        return PERMANENT if PERMANENT in codes else telling[0] if telling else max(codes)

    def signal(self, number: int) -> None:
        """Send a signal to the processes that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def last_words(self) -> str:
        """The last error in the log, or its last line."""
        # From the end: a log of days may be large, and a cause is recorded in one line.
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - 20_000))
        lines = [
            line.strip() for line in self.log.read().decode(errors="replace").splitlines() if line.strip()
        ]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it logged nothing"])[-1].removeprefix("error: ")


@dataclass
class _Lease:
    """Another service's lease: its counter, and when we saw it change."""

    beat: int
    since: float


@dataclass
class Service:
    """A service over one root. `run` it in the main thread, or `turn` it by hand.

    Args:
        store: The root with the queue.
        devices: The name of each device, all different: `cpu0`, `cpu1`, or the number of a GPU.
        environment: Environment of the workers.
        poll_seconds: Seconds between two turns.
    """

    store: ObjectStore
    devices: Sequence[str]
    environment: Mapping[str, str]
    poll_seconds: float = 2.0
    # Random as well: a process id is soon used again, and a service must not take an old one's claims for its
    # own.
    name: str = field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")

    def __post_init__(self) -> None:
        self.queue, self.machine = Queue(self.store), machine_id()
        self.attempts: list[Attempt] = []
        self.draining = threading.Event()
        self.last_turn = time.monotonic()
        self._leases: dict[tuple[str, int], _Lease] = {}
        self._beaten, self._heard = 0.0, time.monotonic()
        self._told: set[str] = set()

    @property
    def free(self) -> list[str]:
        """Devices without a job."""
        taken = [slot for attempt in self.attempts for slot in attempt.slots]
        return [device for device in self.devices if device not in taken]

    def run(self, *, until_empty: bool = False) -> None:
        """Serve until SIGTERM or SIGINT: then every run writes a checkpoint, and this returns.

        Args:
            until_empty: Return once no job is left that this service could train.
        """
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # The handler only sets a flag: an exception in the middle of a turn could leave a claim without a
        # worker.
        for number in before:
            signal.signal(number, lambda *_: self.draining.set())
        try:
            while not (self.draining.is_set() and not self.attempts):
                try:
                    left = self.turn()
                except StoreError as error:  # storage may come back; workers find out by themselves
                    log.warning("the queue cannot be reached: %s", error)
                    left = True
                if until_empty and not left:
                    return
                self.draining.wait(self.poll_seconds) if not self.draining.is_set() else time.sleep(0.2)
        # Reached with attempts only by an error of ours: workers without a service must not train on beside
        # those of the next one.
        finally:
            for attempt in self.attempts:
                attempt.signal(signal.SIGKILL)
            for number, handler in before.items():
                signal.signal(number, handler)

    def turn(self) -> bool:
        """Run one turn of the loop; True if there is, or may be, something left to do."""
        # Ended workers first: their devices are free for this turn's jobs, and their leases need no renewal.
        self._reap()
        self._renew()
        if self.draining.is_set():
            self._drain()
            self.last_turn = time.monotonic()
            return bool(self.attempts)
        left = self._schedule()
        self.last_turn = time.monotonic()
        return left or bool(self.attempts)

    # ---- scheduling ------------------------------------------------------------------------------

    def _schedule(self) -> bool:
        left = False
        mine = {attempt.job.name for attempt in self.attempts}
        for job in self.queue.jobs():
            if job.state == "done" or job.name in mine:
                continue
            if job.state == "running" and not self._expired(job):
                left = True
                continue
            # Its service recorded the last attempt and died before it wrote the outcome.
            if self.queue.conclude(job) is not None:
                continue
            if job.world > len(self.devices):
                self._tell_once(f"job {job.name} needs {job.world} devices, and this service has "
                                f"{len(self.devices)}: it waits for another service")  # fmt: skip
                continue
            if is_stopped(job.job.config, job.outs):
                continue
            left = True
            # Passed over, so that it neither holds a device nor blocks the jobs behind it.
            if awaits_harvest(job.job.config):
                self._tell_once(
                    f"job {job.name} waits for its harvest: {job.job.config.root} has no plan yet"
                )
                continue
            # First come, first served: a job for several devices waits at the head, or small ones would
            # starve it.
            if len(self.free) < job.world:
                return True
            number = self.queue.claim(job, self.name, self.machine, os.getpid())
            if number is not None:
                self._start(job, number)
        return left

    def _expired(self, job: Job) -> bool:
        """Whether a running job's service is gone; if so, the attempt is ended on its behalf."""
        number = job.claims - 1
        claim, beat = self.queue.read_claim(job.name, number), self.queue.read_beat(job.name, number)
        seen = self._leases.setdefault((job.name, number), _Lease(-2, time.monotonic()))
        # -1 before the first renewal and -2 before our first look: a lease starts when we first see it.
        count = beat.beat if beat else -1
        if count != seen.beat:
            seen.beat, seen.since = count, time.monotonic()
        # In our name, without an attempt here: the claim's put took effect, but its reply was lost.
        gone = claim.service == self.name or self._is_dead(claim, beat)
        if not gone and time.monotonic() - seen.since < LEASE_SECONDS:
            return False
        log.warning("job %s: its service %s is gone; it resumes from its checkpoint", job.name, claim.service)
        # "released", not "failed": the job is not to blame, and max_attempts does not count it.
        self.queue.end(job.name, number, "released", f"the service {claim.service} showed no life")
        job.ends.add(number)
        return True

    def _is_dead(self, claim: JobClaim, beat: JobBeat | None) -> bool:
        """Whether service and workers have certainly ended: they ran on this machine and no longer exist."""
        # Process ids mean something on the machine, and in the namespace, that gave them.
        if claim.machine != self.machine:
            return False
        # The workers too: one may still be writing its last checkpoint after the service was killed.
        return not any(_is_alive(pid) for pid in (claim.pid, *(beat.pids if beat else ())))

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            say(message)

    # ---- workers ---------------------------------------------------------------------------------

    def _start(self, job: Job, number: int) -> None:
        slots, world = self.free[: job.world], job.world
        log = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the attempt
        group: dict[str, str] = {}
        if world > 1:  # the variables that torchrun would set
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world)}
            group["LOCAL_WORLD_SIZE"] = str(world)
        attempt = Attempt(job, number, slots, [], log)
        self.attempts.append(attempt)
        for rank, slot in enumerate(slots):
            # A rank on a GPU sees that one only, as device 0.
            own = (
                {"RANK": str(rank), "LOCAL_RANK": str(rank) if slot.startswith("cpu") else "0"}
                if world > 1
                else {}
            )
            gpu = {} if slot.startswith("cpu") else {"CUDA_VISIBLE_DEVICES": slot}
            attempt.processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "winnow.jobs.worker",
                        self.store.uri,
                        job.name,
                        str(number),
                    ],
                    env={**self.environment, **group, **own, **gpu},
                    stdin=subprocess.PIPE,  # it closes when we die, however we die, which tells the worker
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,  # a Ctrl-C in the terminal is passed on by us, as SIGTERM
                )
            )
        say(f"job {job.name}: attempt {number} on {', '.join(slots)}")
        # At once, with the workers' process ids: a service that starts after our death looks for them.
        self._beat(attempt)

    def _renew(self) -> None:
        if time.monotonic() - self._beaten < BEAT_SECONDS:
            return
        try:
            for attempt in self.attempts:
                self._beat(attempt)
        except StoreError:
            # Half a lease is left for the checkpoints: two services must not train one run at the same time.
            if time.monotonic() - self._heard > LEASE_SECONDS / 2:
                log.warning(
                    "storage has been unreachable for half a lease: the runs end before others take them over"
                )
                self._ask_to_end(self.attempts)
            raise
        self._beaten = self._heard = time.monotonic()

    def _beat(self, attempt: Attempt) -> None:
        attempt.beats += 1
        pids = tuple(process.pid for process in attempt.processes)
        self.queue.beat(
            attempt.job.name, attempt.number, JobBeat(service=self.name, beat=attempt.beats, pids=pids)
        )

    def _reap(self) -> None:
        for attempt in list(self.attempts):
            codes = [process.poll() for process in attempt.processes]
            # One of a group has failed: the others wait in a collective for it, in vain.
            if attempt.asked_to_end is None and any(codes):
                # Once more: the rank that this one missed ended before it, perhaps after it was asked above.
                codes = [process.poll() for process in attempt.processes]
                attempt.first_codes = [code for code in codes if code is not None]
                if None in codes:
                    self._ask_to_end([attempt])
            if attempt.asked_to_end and time.monotonic() - attempt.asked_to_end > _KILL_SECONDS:
                attempt.signal(signal.SIGKILL)
            if attempt.code is not None:
                self._record(attempt, attempt.code)
                self.attempts.remove(attempt)

    def _record(self, attempt: Attempt, code: int) -> None:
        """Record how an attempt ended, and the job's outcome if that decides it."""
        job, number, cause = attempt.job, attempt.number, ""
        # A worker that a drain kills after its time limit counts as stopped too: it is not the job's failure.
        stopped = code == STOPPED or (attempt.asked_to_end is not None and self.draining.is_set())
        if code == 0:
            self.queue.end(job.name, number, "finished", "")
        elif stopped:
            self.queue.end(job.name, number, "released", "a checkpoint was written")
        else:
            died = f" (signal {-code})" if code < 0 else f" (exit code {code})"
            cause = attempt.last_words() + died
            self.queue.end(job.name, number, "failed", cause)
        job.claims = number + 1
        job.ends.add(number)
        outcome = self.queue.conclude(job, permanent=code == PERMANENT)
        attempt.log.close()
        for process in attempt.processes:
            if process.stdin is not None:
                with suppress(OSError):
                    process.stdin.close()
        if outcome is not None:
            say(f"job {job.name} has {outcome.state}" + (f": {outcome.cause}" if outcome.cause else ""))
        elif stopped:
            say(f"job {job.name} is stopped; a checkpoint is kept")
        else:
            log.warning("job %s: attempt %d failed, and is tried again: %s", job.name, number, cause)

    # ---- the end ---------------------------------------------------------------------------------

    def _drain(self) -> None:
        self._tell_once("draining: every run writes a checkpoint")
        self._ask_to_end(self.attempts)

    def _ask_to_end(self, attempts: Sequence[Attempt]) -> None:
        for attempt in attempts:
            if attempt.asked_to_end is None:
                attempt.asked_to_end = time.monotonic()
                attempt.signal(signal.SIGTERM)


def machine_id() -> str:
    """The identity of this machine since it was started, and of the namespace of its process ids."""
    # Process ids count within a namespace, and only until the machine restarts.
    facts = [socket.gethostname()]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # A zombie has ended, though its parent has not asked how: signal 0 still reaches it.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, IndexError):
        return True


def _free_port() -> int:
    # Somebody else may take it before the group does; the attempt then fails, and the next one takes another
    # port.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def slots(gpus: str, seen: int, workers: int) -> list[str]:
    """The service's devices: the GPUs asked for, or places on the CPU.

    Raises:
        ConfigError: A GPU that is not there.
    """
    if gpus == "none" or (gpus == "all" and not seen):
        return [f"cpu{number}" for number in range(workers)]
    if gpus == "all":
        return [str(number) for number in range(seen)]
    chosen = [part.strip() for part in gpus.split(",")]
    wrong = [part for part in chosen if not part.isdecimal() or int(part) >= seen]
    if wrong or len(set(chosen)) < len(chosen):
        raise ConfigError("--gpus", expected=f"numbers below {seen}, `all` or `none`", got=gpus)
    return chosen
