"""The YAML file a run is started from. One file may hold every stage."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from pydantic import Field, model_validator

from winnow.schemas.base import Contract
from winnow.schemas.corpus import CorpusSpec
from winnow.schemas.errors import ConfigError
from winnow.schemas.evaluation import EvaluateSpec
from winnow.schemas.harvest import HarvestSpec, PlanSpec
from winnow.schemas.subject import SubjectSpec
from winnow.schemas.training import TrainSpec

T = TypeVar("T")


class StorageSpec(Contract):
    """How object storage is reached. Credentials come from the environment only, so none is ever stored."""

    allow_http: bool = False
    """Permit `http://` endpoints beyond this machine's loopback, as `AWS_ALLOW_HTTP=true` does for commands
    without a config. False, because plain HTTP exposes data and signatures to the network in between."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """Longest wait for one request, in seconds. A server that has answered before and then goes away, such as
    one that is restarted, is waited for three times as long, at most 240 s."""
    single_writer: bool = False
    """Accept a store that ignores if-none-match: you guarantee that nothing else writes to this root. Each
    put then checks first whether the object exists, and the harvest computes all units in its own process.
    False, because on such a store two writers would overwrite each other."""
    cache_folder: str | None = None
    """Local folder that keeps what is read from remote datasets, for later epochs and other runs; null, the
    default, keeps nothing."""
    cache_bytes: int = Field(default=64 * 2**30, gt=0)
    """Largest size of `cache_folder` in bytes, all datasets together."""


class PricesSpec(Contract):
    """Prices for the forecast's money lines, in any one currency. All are 0 unless given."""

    currency: str = Field(default="USD", min_length=1, max_length=12)
    """Name of the currency, printed beside the amounts."""
    gib_month: float = Field(default=0.0, ge=0)
    """Price of storing 1 GiB for a month."""
    months_kept: float = Field(default=1.0, ge=0)
    """Months for which the dataset is stored."""
    puts_1000: float = Field(default=0.0, ge=0)
    """Price of 1,000 requests that write or list."""
    gets_1000: float = Field(default=0.0, ge=0)
    """Price of 1,000 requests that read."""
    actor_hour: float = Field(default=0.0, ge=0)
    """Price of one actor for an hour: its share of a machine, with its GPUs."""
    trainer_hour: float = Field(default=0.0, ge=0)
    """Price of one training process for an hour: its GPU, or its share of a machine."""


class SweepSpec(Contract):
    """The section that `winnow sweep` reads: it trains `train` once per combination of the grid."""

    out: str = Field(min_length=1)
    """Folder or URI of the results. Each SAE gets a folder below it, named by its values:
    `<out>/latents-512_k-8`."""
    # Any: a value is validated as the field of `train` that it replaces, once a combination is made.
    grid: dict[str, tuple[Any, ...]] = Field(min_length=1)
    """Fields of `train`, each with the values to try: `{latents: [512, 1024], k: [8, 16]}`. Combinations with
    k above latents are left out. A grid over `seed` keeps `order_seed`, so that one read serves all SAEs."""


class Config(Contract):
    """The file that `winnow plan|harvest|train|evaluate` reads. Each stage reads only its own sections."""

    # Sections without a usable default are null rather than required: one file may serve a single stage.

    root: str = Field(min_length=1)
    """The dataset: a local folder or a URI (`file://`, `s3://bucket/prefix`). A relative path is relative to
    the working directory of the command, not to the config's folder. May be left out if there are
    `train.roots`."""
    subject: SubjectSpec | None = None
    """plan, harvest: the language model."""
    corpus: CorpusSpec | None = None
    """plan: the text."""
    plan: PlanSpec | None = None
    """plan, harvest: how text becomes rows."""
    harvest: HarvestSpec = HarvestSpec()
    """harvest: how the work is distributed and repeated."""
    storage: StorageSpec = StorageSpec()
    """All stages: how object storage is reached."""
    prices: PricesSpec | None = None
    """Prices for `harvest --forecast`, `estimate` and `runs`; null prints no money."""
    train: TrainSpec | None = None
    """train, sweep: the SAE."""
    sweep: SweepSpec | None = None
    """sweep: the grid."""
    evaluate: EvaluateSpec = EvaluateSpec()
    """evaluate: sample sizes and what optional families need."""

    @model_validator(mode="before")
    @classmethod
    def _root_of_roots(cls, raw: Any) -> Any:
        # What needs one dataset, such as the folder of a relative path, then takes the first.
        if isinstance(raw, dict) and "root" not in raw:
            fields = cast("dict[str, Any]", raw)
            train: Any = fields.get("train")
            if isinstance(train, dict):
                train = cast("dict[str, Any]", train)
                roots = train.get("roots")
            else:
                roots = getattr(train, "roots", None)
            if isinstance(roots, dict) and roots:
                return {**fields, "root": next(iter(cast("dict[str, Any]", roots).values()))}
        return cast("Any", raw)


def section(value: T | None, name: str) -> T:
    """Return a section that the caller needs; raise ConfigError if the config leaves it out."""
    if value is None:
        fix = f"Add `{name}:`, as docs/reference.md says; `winnow init` writes a config to start from"
        raise ConfigError(f"section {name!r}", expected="it in the config", got="nothing", fix=fix)
    return value
