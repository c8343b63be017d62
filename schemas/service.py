"""The small objects by which runs and the trainer service communicate: status, jobs, claims, ends."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from winnow.schemas.base import Artefact
from winnow.schemas.config import Config

STATUS_KEY = "status.json"
"""In a run's folder: its `RunStatus`."""
JOBS = "jobs"
"""Folder of the queue below a service's root."""
# From the config's content, so that submitting the same config twice makes one job.
JobName = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
"""The first 16 digits of a config's digest: the same config is the same job."""

# A worker and its service share only a process, so the exit code says whether another attempt can succeed.
STOPPED, PERMANENT = 75, 65
"""Exit codes of an attempt at a job, after sysexits.h: EX_TEMPFAIL, try again later; EX_DATAERR, do not."""

RunState = Literal["training", "finished", "stopped", "failed"]


class RunStatus(Artefact):
    """`status.json` in a run's folder: what the run is doing. Only its trainer rewrites it.

    ::

        training ──▶ finished | stopped | failed       stopped, failed ──▶ training (the same command again)

    A run that says `training` but whose `beat` is old was killed; it resumes from its last checkpoint.
    """

    kind: Literal["winnow.run"] = "winnow.run"
    state: RunState
    """What the run is doing, or how it ended."""
    step: int = Field(ge=0)
    """Steps finished."""
    steps: int = Field(ge=0)
    """Steps of the whole run."""
    tokens: int = Field(ge=0)
    """Rows trained on so far."""
    latents: int
    """Number of latents N."""
    k: int
    """Active latents K per row."""
    hook: str
    """The hook that it reads."""
    fvu: float | None = None
    """FVU of the last batch that was logged; once the run has finished, that of held-out rows."""
    tokens_per_s: float = 0.0
    """Rows per second."""
    seconds: float = 0.0
    """Wall-clock time of the steps, in seconds; if several SAEs share a stream, this one's share."""
    waiting_share: float = 0.0
    """Share of `seconds` spent waiting for data, 0 to 1."""
    eta_seconds: float | None = None
    """Seconds to the end at the pace of this process; null while there is none."""
    cost: float | None = None
    """Cost of `seconds` at `prices.trainer_hour`; null without prices."""
    currency: str = ""
    """Currency of `cost`."""
    device: str = ""
    """Device that it trains on."""
    host: str = ""
    """Name of its machine."""
    pid: int = 0
    """Process id on that machine."""
    # A time, unlike the counter of a lease: it only decides whether a list of runs shows this one as `lost`.
    beat: float
    """When this was written, in seconds since 1970 (UTC)."""
    cause: str = ""
    """Why it failed; empty otherwise."""


class TrainJob(Artefact):
    """`jobs/<name>/job.json`: a submitted config. Create-only."""

    kind: Literal["winnow.job"] = "winnow.job"
    config: Config
    """The submitted config. Its digest is the job's name."""
    submitted: str
    """When: UTC, ISO 8601."""
    max_attempts: int = Field(default=3, gt=0)
    """Failed attempts after which the job has failed."""


class JobClaim(Artefact):
    """`jobs/<name>/<attempt>.claim.json`: a service took the job. Create-only, so that only one can."""

    kind: Literal["winnow.claim"] = "winnow.claim"
    service: str
    """Unique name of the service, new at each start."""
    # Without boot and namespace, a restarted machine or another container could hold an unrelated process of
    # that number, and a dead service would seem alive.
    machine: str
    """Names the machine, its boot and the process namespace in which `pid` is valid."""
    pid: int
    """Process id of the service."""
    claimed: str
    """When: UTC, ISO 8601."""


class JobBeat(Artefact):
    """`jobs/<name>/<attempt>.beat.json`: the lease, which the claim's service renews while it trains."""

    kind: Literal["winnow.beat"] = "winnow.beat"
    service: str
    """Name of the service, as in its claim."""
    beat: int = Field(ge=0)
    """A counter that changes at every writing: a sign of life that needs no common clock."""
    pids: tuple[int, ...] = ()
    """Process ids of the workers, on the claim's machine."""


class JobEnd(Artefact):
    """`jobs/<name>/<attempt>.end.json`: how an attempt ended; `outcome.json`: how the job ended."""

    kind: Literal["winnow.end"] = "winnow.end"
    state: Literal["finished", "failed", "released"]
    """How it ended. `released`: it wrote a checkpoint and the job is free again, because the service drained
    or was killed, or the run was stopped."""
    cause: str = ""
    """Why it failed or was released; empty otherwise."""
    attempt: int = Field(ge=0)
    """Number of the attempt, from 0."""
    ended: str
    """When: UTC, ISO 8601."""
