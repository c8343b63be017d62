"""A run's checkpoints: which files hold which latents, and where in the stream they were taken."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from winnow.schemas.base import Artefact, Contract, RelativeKey, Sha256
from winnow.schemas.stream import StreamState
from winnow.schemas.training import SaeIdentity, TrainSpec


class CheckpointRows(Contract):
    """A file of a checkpoint that contains some latents' rows of every tensor that has latents."""

    file: RelativeKey
    """Name of the file beside the index."""
    first: int = Field(ge=0)
    """The first latent in it."""
    stop: int = Field(gt=0)
    """The latent after the last in it."""


class CheckpointIndex(Artefact):
    """`checkpoints/<step>/index.json`: create-only, written after the state it names is durable."""

    kind: Literal["winnow.checkpoint"] = "winnow.checkpoint"
    version: str = "1.1"
    """1.1 moved the latents' rows into files of their own; 1.0 had one file."""
    step: int = Field(ge=0)
    """Steps finished."""
    spec: TrainSpec
    """The spec that the run was started with."""
    identity: SaeIdentity
    """What it was trained on."""
    stream: StreamState
    """Position of the stream after those steps."""
    files: dict[RelativeKey, Sha256]
    """Names of the safetensors files beside the index -> their digests."""
    # By latents, not by ranks, so that any number of processes can read what any number wrote.
    rows: tuple[CheckpointRows, ...] = ()
    """Which of the files contain which latents: together all latents, each once. The rest of the state is in
    one further file."""
    world: int = Field(default=1, gt=0)
    """Number of processes that wrote it; any number can read it."""
    threads: int
    """CPU threads per process. With another number, a resume is not bit-identical."""
    device: str
    """Device that it was trained on."""
    tokens: int
    """Rows trained on so far."""
    created: str
    """When it was written: UTC, ISO 8601."""
