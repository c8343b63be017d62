"""What runs and the trainer service tell through small objects: status, jobs, claims, ends."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from winnow.schemas.base import Artefact
from winnow.schemas.config import Config

JOBS = "jobs"
"""Folder of the queue below a service's root."""
JobName = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
"""The first 16 digits of a config's digest: the same config is the same job."""

STOPPED, PERMANENT = 75, 65
"""Exit codes of an attempt at a job, after sysexits.h: try again later; the data is wrong."""

RunState = Literal["training", "finished", "stopped", "failed"]


class RunStatus(Artefact):
    """`status.json` in a run's folder: what it is doing. Rewritten by its trainer alone.

    ::

        training ──▶ finished | stopped | failed       stopped, failed ──▶ training (the same command again)

    A run that says `training` and whose `beat` is old was killed: it goes on from its last checkpoint.
    """

    kind: Literal["winnow.run"] = "winnow.run"
    state: RunState
    step: int = Field(ge=0)
    steps: int = Field(ge=0)
    """Of the whole run."""
    tokens: int = Field(ge=0)
    """Rows trained on."""
    latents: int
    k: int
    hook: str
    fvu: float | None = None
    """Of the last batch that was logged; once finished, held out."""
    tokens_per_s: float = 0.0
    seconds: float = 0.0
    """Wall-clock of its steps; of several SAEs on one stream, its own share."""
    waiting_share: float = 0.0
    """Share of it spent waiting for data."""
    eta_seconds: float | None = None
    """At the pace of this process; null where there is none yet."""
    cost: float | None = None
    """`seconds` at `prices.trainer_hour`."""
    currency: str = ""
    device: str = ""
    host: str = ""
    pid: int = 0
    beat: float
    """UTC, seconds since 1970, of this writing."""
    cause: str = ""
    """Why it failed."""


class TrainJob(Artefact):
    """`jobs/<name>/job.json`: a submitted config. Create-only."""

    kind: Literal["winnow.job"] = "winnow.job"
    config: Config
    submitted: str
    """UTC time, ISO 8601."""
    max_attempts: int = Field(default=3, gt=0)
    """Attempts that may fail before the job has failed."""


class JobClaim(Artefact):
    """`jobs/<name>/<attempt>.claim.json`: a service took the job. Create-only, so one service wins."""

    kind: Literal["winnow.claim"] = "winnow.claim"
    service: str
    """A name that no other service, and no other start of this one, has."""
    machine: str
    """Names machine, boot and process namespace: where `pid` means something."""
    pid: int
    """The service's process."""
    claimed: str
    """UTC time, ISO 8601."""


class JobBeat(Artefact):
    """`jobs/<name>/<attempt>.beat.json`: the lease. Rewritten by the claim's service while it trains."""

    kind: Literal["winnow.beat"] = "winnow.beat"
    service: str
    beat: int = Field(ge=0)
    """Another number each time: a sign of life that needs no common clock."""
    pids: tuple[int, ...] = ()
    """The workers' processes, on the claim's machine."""


class JobEnd(Artefact):
    """`jobs/<name>/<attempt>.end.json`, and for the job as a whole `outcome.json`. Create-only."""

    kind: Literal["winnow.end"] = "winnow.end"
    state: Literal["finished", "failed", "released"]
    """`released`: checkpointed and handed back (the service drained, was killed, or the run was stopped)."""
    cause: str = ""
    attempt: int = Field(ge=0)
    ended: str
