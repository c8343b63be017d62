"""The position of a stream, which checkpoints hold."""

from __future__ import annotations

from pydantic import Field

from winnow.schemas.base import Contract, ReadHook, Sha256


class StreamState(Contract):
    """The position of a stream. Integers only, so that resuming takes O(1) and no replay."""

    plan_fingerprint: Sha256
    """Fingerprint of the dataset's plan."""
    split: str
    """Split that is read: `train`, `validation` or `all`."""
    hooks: tuple[ReadHook, ...]
    """Hooks that are read together."""
    # A version, so that a stream of another order is refused instead of being continued with other rows.
    algorithm: str
    """Name and version of the order, such as `lanes.v1`."""
    seed: int
    """Seed of the order."""
    lanes: int
    """Lanes G."""
    group_units: int
    """Units U that are shuffled together."""
    batch_rows: int
    """Rows B of a global batch."""
    step: int
    """The next step, counted over all epochs; epoch and group follow from it."""
    reading: Sha256 | None = Field(default=None, exclude_if=lambda reading: reading is None)
    """Digest of the reading whose rows are streamed; null for all rows."""
