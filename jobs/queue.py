"""The trainer service's queue: create-only objects below a root, so that object storage is the queue.

::

    jobs/<name>/job.json            TrainJob: submitted. <name> is the config's digest: once, however often
    jobs/<name>/<n>.claim.json      JobClaim: a service has attempt n. Create-only: one wins
    jobs/<name>/<n>.beat.json       JobBeat: its lease, rewritten by the claim's holder alone
    jobs/<name>/<n>.end.json        JobEnd: attempt n is over. Create-only
    jobs/<name>/outcome.json        JobEnd: finished or failed, for good. Create-only

    waiting ──claim n──▶ running ──end n──▶ waiting ──▶ ... ──outcome──▶ finished | failed

A job is running while its last claim has no end. A service that sees a lease expire ends the attempt on
behalf of its holder, and the job waits again; its run resumes from its checkpoint. Nothing is deleted, and
only leases are overwritten, so a service that is killed at any point loses nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from winnow.schemas.config import Config, section
from winnow.schemas.errors import ConfigError, IntegrityError, MissingObject, StoreError
from winnow.schemas.service import JOBS, JobBeat, JobClaim, JobEnd, TrainJob
from winnow.store.format.layout import PLAN_KEY
from winnow.store.objects import ObjectStore, open_store
from winnow.store.records.commit import settle
from winnow.trainer.mesh.fit import check_mesh
from winnow.trainer.plan.grid import grid_specs
from winnow.trainer.run.status import STOP_KEY

# Strict, since keys come from a listing: other objects below a root are not ours.
_KEY = re.compile(rf"^{JOBS}/([0-9a-f]{{16}})/(?:(\d{{4}})\.)?(job|claim|beat|end|outcome)\.json$")
_LIMIT = 1 << 20
"""Largest object read, in bytes: a queue is input from elsewhere."""


def now() -> str:
    """The current time in UTC, ISO 8601."""
    # With milliseconds, since the time of submission is the order of the jobs.
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass
class Job:
    """A job, as the queue's objects describe it."""

    name: str
    job: TrainJob
    claims: int = 0
    """Number of attempts so far; the last one is claims - 1."""
    ends: set[int] = field(default_factory=set)
    has_outcome: bool = False

    @property
    def state(self) -> Literal["waiting", "running", "done"]:
        """The job's state."""
        if self.has_outcome:
            return "done"
        return "running" if self.claims and self.claims - 1 not in self.ends else "waiting"

    @property
    def world(self) -> int:
        """The number of its processes, each with a device of its own."""
        return section(self.job.config.train, "train").mesh.size

    @property
    def outs(self) -> list[str]:
        """Folders of its runs."""
        config = self.job.config
        if config.sweep is not None:
            return [spec.out for spec in grid_specs(config)]
        return [config.train.out] if config.train is not None else []


class Queue:
    """Reads and writes the queue below a root. Safe to use from threads.

    Args:
        store: The root.
    """

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self._jobs: dict[str, TrainJob] = {}  # read once: they never change

    def submit(self, config: Config, max_attempts: int = 3) -> tuple[str, bool]:
        """Put a job into the queue.

        Returns:
            Its name, and whether it is new: an equal config is the job that exists already.

        Raises:
            ConfigError: No section `train`, or a grid or a mesh that is impossible.
        """
        # Before the digest: the same config submitted from two folders means two different runs.
        config = absolute(config)
        train = section(config.train, "train")
        for spec in grid_specs(config) if config.sweep is not None else [train]:
            check_mesh(spec, spec.mesh.size)
        # Named by content, so that submitting twice, or again after a lost reply, is one job.
        name = config.digest()[:16]
        job = TrainJob(config=config, submitted=now(), max_attempts=max_attempts)
        return name, settle(self.store, f"{JOBS}/{name}/job.json", job.to_json()) is None

    def jobs(self) -> list[Job]:
        """Every job, in the order of submission."""
        found: dict[str, Job] = {}
        keys = [match for key, _ in self.store.list(JOBS) if (match := _KEY.match(key))]
        # One listing for all states: the names of the objects are the state, and only new jobs are read.
        for name in sorted({match[1] for match in keys if match[3] == "job"}):
            if name not in self._jobs:
                key = f"{JOBS}/{name}/job.json"
                data = self.store.get(key, _LIMIT)
                self._jobs[name] = TrainJob.from_json(data, origin=f"{self.store.uri}/{key}")
            found[name] = Job(name, self._jobs[name])
        for _, (name, number, kind) in ((match, match.groups()) for match in keys):
            job = found.get(name)
            if job is None:
                continue
            if kind == "claim":
                job.claims = max(job.claims, int(number) + 1)
            elif kind == "end":
                job.ends.add(int(number))
            elif kind == "outcome":
                job.has_outcome = True
        return sorted(found.values(), key=lambda job: (job.job.submitted, job.name))

    def claim(self, job: Job, service: str, machine: str, pid: int) -> int | None:
        """Claim a waiting job: the attempt's number, or None if another service was first."""
        attempt = job.claims
        claim = JobClaim(service=service, machine=machine, pid=pid, claimed=now())
        key = _key(job.name, attempt, "claim")
        found = settle(self.store, key, claim.to_json())
        # A put whose reply was lost has left a claim in our own name.
        if found is not None:
            claim = JobClaim.from_json(found, origin=f"{self.store.uri}/{key}")
        return attempt if claim.service == service else None

    def read_claim(self, name: str, attempt: int) -> JobClaim:
        """The claim of an attempt."""
        key = _key(name, attempt, "claim")
        return JobClaim.from_json(self.store.get(key, _LIMIT), origin=f"{self.store.uri}/{key}")

    def beat(self, name: str, attempt: int, beat: JobBeat) -> None:
        """Renew the lease."""
        # A plain put: the claim is create-only, so there is one writer.
        self.store.put(_key(name, attempt, "beat"), beat.to_json())

    def read_beat(self, name: str, attempt: int) -> JobBeat | None:
        """The lease; None if it was never renewed."""
        # Unreadable counts as absent: it expires like one that is not renewed, and is rewritten if its holder
        # lives.
        key = _key(name, attempt, "beat")
        try:
            return JobBeat.from_json(self.store.get(key, _LIMIT), origin=f"{self.store.uri}/{key}")
        except (MissingObject, IntegrityError):
            return None

    def end(
        self, name: str, attempt: int, state: Literal["finished", "failed", "released"], cause: str
    ) -> None:
        """Record how an attempt ended; the first record stands."""
        # Create-only: a service that comes back after its lease expired must not contradict who ended it.
        end = JobEnd(state=state, cause=cause[:2000], attempt=attempt, ended=now())
        settle(self.store, _key(name, attempt, "end"), end.to_json())

    def was_ended(self, name: str, attempt: int) -> bool:
        """Whether somebody has ended an attempt."""
        return self.store.size(_key(name, attempt, "end")) is not None

    def read_ends(self, job: Job) -> list[JobEnd]:
        """The ends of all attempts that are over, in order."""
        return [self._end(_key(job.name, attempt, "end")) for attempt in sorted(job.ends)]

    def conclude(self, job: Job, *, permanent: bool = False) -> JobEnd | None:
        """Write the outcome if the attempts decide it: one finished, or too many failed.

        Args:
            job: The job, with its ends.
            permanent: Whether the last failure would recur.

        Returns:
            The outcome, or None if the job continues.
        """
        # From the stored ends, not from what this service knows: any service may conclude a job whose own
        # died in between, and all come to the same outcome.
        ends = self.read_ends(job)
        failed = [end for end in ends if end.state == "failed"]
        outcome = next((end for end in ends if end.state == "finished"), None)
        if outcome is None and failed and (permanent or len(failed) >= job.job.max_attempts):
            outcome = failed[-1]
        if outcome is not None:
            settle(self.store, f"{JOBS}/{job.name}/outcome.json", outcome.to_json())
        return outcome

    def outcome(self, name: str) -> JobEnd:
        """The outcome of a job that is done."""
        return self._end(f"{JOBS}/{name}/outcome.json")

    def _end(self, key: str) -> JobEnd:
        return JobEnd.from_json(self.store.get(key, _LIMIT), origin=f"{self.store.uri}/{key}")


def _key(name: str, attempt: int, kind: str) -> str:
    return f"{JOBS}/{name}/{attempt:04d}.{kind}.json"


def require_job(store: ObjectStore, out: str) -> None:
    """Check that a job of the queue trains into `out`; ConfigError if none does."""
    wanted = _fixed(out).rstrip("/")
    if wanted not in {one.rstrip("/") for job in Queue(store).jobs() for one in job.outs}:
        raise ConfigError(f"the queue {store.uri}", expected=f"a job that trains into {wanted}", got="none")


def _fixed(uri: str) -> str:
    return uri if "://" in uri else str(Path(uri).resolve())


def absolute(config: Config) -> Config:
    """The config with absolute local paths."""
    changes: dict[str, Any] = {"root": _fixed(config.root)}
    if config.train is not None:
        places: dict[str, Any] = {"out": _fixed(config.train.out)}
        if config.train.roots is not None:
            places["roots"] = {name: _fixed(uri) for name, uri in config.train.roots.items()}
        changes["train"] = config.train.model_copy(update=places)
    if config.sweep is not None:
        changes["sweep"] = config.sweep.model_copy(update={"out": _fixed(config.sweep.out)})
    return config.model_copy(update=changes)


def is_stopped(config: Config, outs: list[str]) -> bool:
    """Whether somebody asked one of a job's runs to stop (`winnow stop`)."""
    return any(_is_there(out, config, STOP_KEY) for out in outs)


def awaits_harvest(config: Config) -> bool:
    """Whether a job follows a harvest that has not begun: a device would only wait for it."""
    if config.train is None or not config.train.follow:
        return False
    roots = (config.train.roots or {"": config.root}).values()
    # `is False`: if storage is unreachable, the worker is started and reports the cause.
    return any(_is_there(root, config, PLAN_KEY) is False for root in roots)


def _is_there(uri: str, config: Config, key: str) -> bool | None:
    """Whether an object exists; None if storage does not tell, the cause of which the worker will report."""
    try:
        return open_store(uri, config.storage).size(key) is not None
    except (ConfigError, StoreError):
        return None


def job_facts(store: ObjectStore) -> list[dict[str, Any]]:
    """The facts that `winnow runs` shows of a root's jobs."""
    queue = Queue(store)
    facts: list[dict[str, Any]] = []
    for job in queue.jobs():
        ends = Counter(end.state for end in queue.read_ends(job))
        outcome = queue.outcome(job.name) if job.has_outcome else None
        state = outcome.state if outcome else job.state
        if state == "waiting" and is_stopped(job.job.config, job.outs):
            state = "stopped"
        failures = [end.cause for end in queue.read_ends(job) if end.state == "failed"]
        facts.append(
            {
                "job": job.name,
                "state": state,
                "submitted": job.job.submitted,
                "attempts": job.claims,
                "failed_attempts": ends["failed"],
                "max_attempts": job.job.max_attempts,
                "outs": job.outs,
                "cause": outcome.cause if outcome else (failures[-1] if failures else ""),
            }
        )
    return facts


def job_rows(facts: list[dict[str, Any]]) -> list[list[str]]:
    """The facts as lines of a table."""
    return [
        [
            fact["job"],
            fact["state"],
            f"{fact['attempts']}"
            + (f" ({fact['failed_attempts']} failed)" if fact["failed_attempts"] else ""),
            fact["outs"][0] + (f" and {len(fact['outs']) - 1} more" if len(fact["outs"]) > 1 else ""),
            fact["cause"][:120],
        ]
        for fact in facts
    ]
