"""A harvest and its followers: the small objects under the root by which they coordinate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from winnow.schemas.base import Artefact, Contract, RelativeKey, Sha256

# The name is part of an object's key, so it must not contain a slash or a dot.
FollowerName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,80}$")]


class FollowLimits(Contract):
    """How far a harvest may run ahead of the trainers that follow it."""

    high_water_bytes: int = Field(gt=0)
    """High-water mark: the harvest pauses before it holds more shard bytes than this that some follower has
    not yet checkpointed."""
    low_water_bytes: int | None = Field(default=None, ge=0)
    """Low-water mark: a paused harvest resumes once no more shard bytes than this are held. Null, the
    default, takes half of `high_water_bytes`."""
    silence_seconds: float = Field(default=600.0, gt=0)
    """A paused harvest exits if all of its followers have been silent for this many seconds. A follower that
    is alive renews its object every ten seconds."""
    ring: bool = False
    """Delete the shards that every follower has passed, for a dataset larger than the disk. One epoch only.
    False, because deleted rows can only be harvested again."""


class FollowerPosition(Artefact):
    """`followers/<name>.json`: the progress of a trainer. Only that trainer rewrites it."""

    kind: Literal["winnow.follower"] = "winnow.follower"
    name: FollowerName
    """Name of the follower."""
    plan_fingerprint: Sha256
    """Fingerprint of the plan that it trains on."""
    step: int = Field(ge=0)
    """Step of its newest checkpoint."""
    # Counted at the checkpoint, not at the step: a trainer that is killed reads again from there.
    units_passed: int = Field(ge=0)
    """Units before its newest checkpoint, in plan order: it will not read units 0 to this - 1 again."""
    units_ahead: int = Field(gt=0)
    """Further units that it needs before it can continue."""
    epochs: float = Field(gt=0)
    """Passes that it makes over the training split."""
    beat: int = Field(ge=0)
    """A counter that changes at every writing: a sign of life that needs no common clock."""
    finished: bool = False
    """Whether it has ended, and needs no more units."""


class RingRecord(Artefact):
    """`ring/<unit>.json`: a unit's shards were deleted on purpose; its receipt remains. Create-only."""

    kind: Literal["winnow.ring"] = "winnow.ring"
    plan_fingerprint: Sha256
    """Fingerprint of the dataset's plan."""
    unit: int = Field(ge=0)
    """Number of the unit."""
    # Written before the deletion: a crash in between leaves a record of shards that still exist, never an
    # unexplained gap.
    keys: tuple[RelativeKey, ...]
    """Keys of the shards that are deleted."""
    deleted: str
    """When: UTC, ISO 8601."""
