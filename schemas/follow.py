"""A harvest and its followers: what each tells the other through small objects under the root."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from winnow.schemas.base import Artefact, Contract, RelativeKey, Sha256

FollowerName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,80}$")]


class FollowLimits(Contract):
    """How far a harvest may run ahead of the trainers that follow it."""

    high_water_bytes: int = Field(gt=0)
    """The harvest pauses rather than hold more shard bytes that some follower has not checkpointed."""
    low_water_bytes: int | None = Field(default=None, ge=0)
    """It goes on once no more than this is held; null takes half of the high mark."""
    silence_seconds: float = Field(default=600.0, gt=0)
    """A paused harvest whose followers show no sign of life for so long is parked."""
    ring: bool = False
    """Delete the shards that every follower has passed: for datasets larger than the disk, one epoch."""


class FollowerPosition(Artefact):
    """`followers/<name>.json`: how far a trainer is. Rewritten by that trainer alone."""

    kind: Literal["winnow.follower"] = "winnow.follower"
    name: FollowerName
    plan_fingerprint: Sha256
    step: int = Field(ge=0)
    """Of its newest checkpoint."""
    units_passed: int = Field(ge=0)
    """Units 0 to this - 1 lie behind the newest checkpoint, counted in plan order."""
    units_ahead: int = Field(gt=0)
    """Units beyond those that it must have to go on."""
    epochs: float = Field(gt=0)
    """Passes it makes over the training split."""
    beat: int = Field(ge=0)
    """Another number each time it is written: a sign of life that needs no common clock."""
    finished: bool = False


class RingRecord(Artefact):
    """`ring/<unit>.json`: a unit's shards were deleted on purpose; its receipt stays. Create-only."""

    kind: Literal["winnow.ring"] = "winnow.ring"
    plan_fingerprint: Sha256
    unit: int = Field(ge=0)
    keys: tuple[RelativeKey, ...]
    """The shards that are gone."""
    deleted: str
    """UTC time, ISO 8601."""
