"""The trainer service: takes jobs from the queue of a root and trains them, each in processes of its own.

One turn of the loop: workers that have ended are written down, leases are renewed, those of dead services are
ended, and waiting jobs are claimed while there are devices for them. Everything it knows lies in the queue,
so a service that is killed and started again finds its way from there.

Jobs are begun in the order of submission; one that needs several devices waits for them at the head of the
queue, so that small ones cannot starve it. Several services, on as many machines as one likes, may serve one
root: that is the pool.
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
from winnow.schemas.errors import StoreError
from winnow.schemas.service import PERMANENT, STOPPED, JobBeat, JobClaim
from winnow.store.objects import ObjectStore

log = logging.getLogger("winnow.trainer")

BEAT_SECONDS = 5.0
"""Between two renewals of a lease."""
LEASE_SECONDS = 60.0
"""A lease that nobody has renewed for so long, by our own clock, is over."""
KILL_SECONDS = 120.0
"""A worker that is asked to end has so long for its checkpoint."""


@dataclass
class Attempt:
    """A job in this service's hands."""

    job: Job
    number: int
    slots: list[str]
    processes: list[subprocess.Popen[bytes]]
    log: IO[bytes]
    beats: int = 0
    asked_to_end: float | None = None

    @property
    def code(self) -> int | None:
        """The exit code once all processes have ended, None while they run.

        Of a group's, the one that says most: a failure for good, then any other, then a stop.
        """
        codes: list[int] = []
        for process in self.processes:
            code = process.poll()
            if code is None:
                return None
            codes.append(code)
        telling = [code for code in codes if code not in (0, STOPPED)]
        return PERMANENT if PERMANENT in codes else telling[0] if telling else max(codes)

    def signal(self, number: int) -> None:
        """Send a signal to those that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def last_words(self) -> str:
        """The last error of the log, or its last line."""
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - 20_000))
        lines = [
            line.strip() for line in self.log.read().decode(errors="replace").splitlines() if line.strip()
        ]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it said nothing"])[-1].removeprefix("error: ")


@dataclass
class _Lease:
    """Somebody else's lease as we have seen it change."""

    beat: int
    since: float


@dataclass
class Service:
    """A service over one root. `run` it in the main thread, or `turn` it by hand.

    Args:
        store: The root with the queue.
        devices: A slot each, all different: `cpu0`, `cpu1`, or the number of a GPU.
        environment: Of the workers.
        poll_seconds: Between two turns.
    """

    store: ObjectStore
    devices: Sequence[str]
    environment: Mapping[str, str]
    poll_seconds: float = 2.0
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
        """Devices that no job has."""
        taken = [slot for attempt in self.attempts for slot in attempt.slots]
        return [device for device in self.devices if device not in taken]

    def run(self, *, until_empty: bool = False) -> None:
        """Serve until SIGTERM or SIGINT: then every run makes a checkpoint, and this returns.

        Args:
            until_empty: Return once no job is left that this service could train.
        """
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
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
        finally:
            for attempt in self.attempts:
                attempt.signal(signal.SIGKILL)
            for number, handler in before.items():
                signal.signal(number, handler)

    def turn(self) -> bool:
        """One turn of the loop; whether there is, or may be, something left to do."""
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
            if self.queue.conclude(job) is not None:  # its service died before it could say so
                continue
            if job.world > len(self.devices):
                self._tell_once(f"job {job.name} needs {job.world} devices, and this service has "
                                f"{len(self.devices)}: it waits for another service")  # fmt: skip
                continue
            if is_stopped(job.job.config, job.outs):
                continue
            left = True
            if awaits_harvest(job.job.config):
                self._tell_once(
                    f"job {job.name} waits for its harvest: {job.job.config.root} has no plan yet"
                )
                continue
            if len(self.free) < job.world:
                return True  # first come, first served
            number = self.queue.claim(job, self.name, self.machine, os.getpid())
            if number is not None:
                self._start(job, number)
        return left

    def _expired(self, job: Job) -> bool:
        """Whether a running job's service is gone; then the attempt is ended for it."""
        number = job.claims - 1
        claim, beat = self.queue.read_claim(job.name, number), self.queue.read_beat(job.name, number)
        seen = self._leases.setdefault((job.name, number), _Lease(-2, time.monotonic()))
        count = beat.beat if beat else -1
        if count != seen.beat:
            seen.beat, seen.since = count, time.monotonic()
        gone = claim.service == self.name or self._is_dead(claim, beat)
        if not gone and time.monotonic() - seen.since < LEASE_SECONDS:
            return False
        log.warning("job %s: its service %s is gone; it goes on from its checkpoint", job.name, claim.service)
        self.queue.end(job.name, number, "released", f"the service {claim.service} showed no life")
        job.ends.add(number)
        return True

    def _is_dead(self, claim: JobClaim, beat: JobBeat | None) -> bool:
        """Whether service and workers have surely ended: they were on this machine, and are not there."""
        if claim.machine != self.machine:
            return False
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
        if world > 1:  # as torchrun would
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world)}
            group["LOCAL_WORLD_SIZE"] = str(world)
        attempt = Attempt(job, number, slots, [], log)
        self.attempts.append(attempt)
        for rank, slot in enumerate(slots):
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
                    stdin=subprocess.PIPE,  # its end tells the worker that we are gone
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,  # a Ctrl-C is ours to hand on
                )
            )
        say(f"job {job.name}: attempt {number} on {', '.join(slots)}")
        self._beat(attempt)

    def _renew(self) -> None:
        if time.monotonic() - self._beaten < BEAT_SECONDS:
            return
        try:
            for attempt in self.attempts:
                self._beat(attempt)
        except StoreError:
            if time.monotonic() - self._heard > LEASE_SECONDS / 2:
                log.warning(
                    "storage is out of reach for half a lease: the runs end before others take them over"
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
            if None in codes and any(codes):  # one of a group has failed: the others wait for it in vain
                self._ask_to_end([attempt])
            if attempt.asked_to_end and time.monotonic() - attempt.asked_to_end > KILL_SECONDS:
                attempt.signal(signal.SIGKILL)
            if attempt.code is not None:
                self._record(attempt, attempt.code)
                self.attempts.remove(attempt)

    def _record(self, attempt: Attempt, code: int) -> None:
        """Write down how an attempt ended, and the outcome if that decides it."""
        job, number = attempt.job, attempt.number
        stopped = code == STOPPED or (attempt.asked_to_end is not None and self.draining.is_set())
        if code == 0:
            self.queue.end(job.name, number, "finished", "")
        elif stopped:
            self.queue.end(job.name, number, "released", "a checkpoint was made")
        else:
            died = f" (signal {-code})" if code < 0 else f" (exit code {code})"
            self.queue.end(job.name, number, "failed", attempt.last_words() + died)
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
            log.warning(
                "job %s: attempt %d failed, it will be tried again from its checkpoint", job.name, number
            )

    # ---- the end ---------------------------------------------------------------------------------

    def _drain(self) -> None:
        self._tell_once("draining: every run makes a checkpoint")
        self._ask_to_end(self.attempts)

    def _ask_to_end(self, attempts: Sequence[Attempt]) -> None:
        for attempt in attempts:
            if attempt.asked_to_end is None:
                attempt.asked_to_end = time.monotonic()
                attempt.signal(signal.SIGTERM)


def machine_id() -> str:
    """Names this machine since it was started, and the namespace in which process ids count."""
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
    try:  # a zombie has ended, though nobody has asked how
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, IndexError):
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
