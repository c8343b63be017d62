"""The YAML file a run is started from. One file may hold every stage."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import Field

from winnow.schemas.base import Contract
from winnow.schemas.corpus import CorpusSpec
from winnow.schemas.errors import ConfigError
from winnow.schemas.evaluation import EvaluateSpec
from winnow.schemas.harvest import HarvestSpec, PlanSpec
from winnow.schemas.subject import SubjectSpec
from winnow.schemas.training import TrainSpec

T = TypeVar("T")


class StorageSpec(Contract):
    """How object storage is reached. Credentials never stand here: they come from the environment."""

    allow_http: bool = False
    """Permit `http://` endpoints beyond this machine's loopback."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """Longest wait for one request."""
    single_writer: bool = False
    """Accept a store that ignores if-none-match, since nobody else writes to this root: existing objects
    are looked for instead, and a harvest makes its units in its own process."""
    cache_folder: str | None = None
    """Local folder that keeps what is read of a remote dataset, for later epochs and runs; null: none."""
    cache_bytes: int = Field(default=64 * 2**30, gt=0)
    """Most bytes that folder may hold, all datasets together."""


class PricesSpec(Contract):
    """What things cost, for the forecast's money lines; any currency. Leave out what costs nothing."""

    currency: str = Field(default="USD", min_length=1, max_length=12)
    """Printed beside the amounts."""
    gib_month: float = Field(default=0.0, ge=0)
    """Keeping 1 GiB for a month."""
    months_kept: float = Field(default=1.0, ge=0)
    """Months the dataset is kept."""
    puts_1000: float = Field(default=0.0, ge=0)
    """1,000 writing or listing requests."""
    gets_1000: float = Field(default=0.0, ge=0)
    """1,000 reading requests."""
    actor_hour: float = Field(default=0.0, ge=0)
    """One actor's share of a machine, with its GPUs, for an hour."""
    trainer_hour: float = Field(default=0.0, ge=0)
    """One training process with its GPU, or its share of a machine, for an hour."""


class SweepSpec(Contract):
    """`winnow sweep`: the section `train`, once for every combination of the grid."""

    out: str = Field(min_length=1)
    """Folder or URI that holds the SAEs' folders, named by their values: `<out>/latents-512_k-8`."""
    grid: dict[str, tuple[Any, ...]] = Field(min_length=1)
    """Fields of `train` and their values: `{latents: [512, 1024], k: [8, 16]}`. Combinations with k above
    latents are left out. A grid over `seed` keeps `order_seed`, so that one read serves all."""


class Config(Contract):
    """`winnow plan|harvest|train|evaluate CONFIG`. Stages read their own sections."""

    root: str = Field(min_length=1)
    """The dataset: a local folder or a URI (`file://`, `s3://bucket/prefix`)."""
    subject: SubjectSpec | None = None
    """plan, harvest: the language model."""
    corpus: CorpusSpec | None = None
    """plan: the text."""
    plan: PlanSpec | None = None
    """plan, harvest: how text becomes rows."""
    harvest: HarvestSpec = HarvestSpec()
    """harvest: how the work is run."""
    storage: StorageSpec = StorageSpec()
    """All stages."""
    prices: PricesSpec | None = None
    """Prices for `harvest --forecast`, `estimate` and `runs`; null prints no money."""
    train: TrainSpec | None = None
    """train, sweep: the SAE."""
    sweep: SweepSpec | None = None
    """sweep: the grid."""
    evaluate: EvaluateSpec = EvaluateSpec()
    """evaluate: sample sizes and what optional families need."""


def section(value: T | None, name: str) -> T:
    """A section the caller needs; ConfigError if the config leaves it out."""
    if value is None:
        raise ConfigError(f"section {name!r}", expected="it in the config", got="nothing", fix="Add it")
    return value
