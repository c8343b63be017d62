"""The data plane's artefacts: plan (identity), receipt (commit point), manifest (seal)."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_validator,
)

from winnow.schemas.base import Artefact, Contract, HookName, RelativeKey, Sha256, canonical_json, sha256_hex
from winnow.schemas.corpus import CorpusSpec
from winnow.schemas.errors import ConfigError
from winnow.schemas.follow import FollowLimits
from winnow.schemas.subject import HookSite, SubjectIdentity

SLICES = 64
"""Inner chunks ("slices") of every shard; lanes own whole slices."""
MOMENT_UNITS = 16
"""Receipts of the first this-many units carry per-dimension moments."""
# A plan from elsewhere must not make a reader allocate what it merely claims.
MAX_UNITS = 1 << 24
MAX_HOOKS = 1024
MAX_CONTEXT = 1 << 20
MAX_ROWS_PER_UNIT = 1 << 26
MAX_SHARD_BYTES = 1 << 31
"""One shard is put in one part and read back whole when it is adopted."""
MAX_TOKENS_PER_UNIT = 1 << 28
"""Their chunk is read whole."""
Dtype = Literal["bfloat16", "float16", "float32", "int8"]
Compress = Literal["none", "zstd"]
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}
SCALE_BYTES = 4
"""Of an int8 row: its scale, float32 little-endian, after its D values."""
Crc32c = Annotated[int, Field(ge=0, le=0xFFFFFFFF)]


class PlanSpec(Contract):
    """How the corpus becomes rows: every field decides content."""

    hooks: tuple[HookName, ...] = Field(min_length=1, max_length=MAX_HOOKS)
    """Where activations are read; several are read in one pass of the LM."""
    context_length: int = Field(default=128, ge=8, le=MAX_CONTEXT)
    """Window length T in tokens."""
    drop_leading: int = Field(default=1, ge=0)
    """Leading positions of each window that are not stored (position 0 is an attention sink)."""
    windows_per_unit: int = Field(default=1024, gt=0, le=MAX_ROWS_PER_UNIT, multiple_of=SLICES)
    """Windows W in a unit; a unit is W x (T - drop_leading) rows, one shard a hook."""
    train_units: int | None = Field(default=None, gt=0)
    """Units kept for training, the first in keyed order; null keeps the whole corpus."""
    validation_units: int = Field(default=1, ge=1)
    """Units of held-out text; they come first."""
    split_by: Literal["document", "window"] = "document"
    """What is held out: whole documents, set aside before packing, or windows."""
    bos: Literal["auto", "none", "window"] = "auto"
    """`window` starts every window with the BOS token; `none` never adds one. `auto`: `window` where the
    tokenizer itself puts a BOS before a text, and that one is taken. A stored plan never says `auto`."""
    join: str = Field(default="auto", min_length=1, max_length=256)
    """The token after each document: `eos`, `bos`, or the text of one token. `auto`: EOS, except where that
    ends a chat's turn (`<|im_end|>`, `<|eot_id|>`, ...) and the vocabulary has a special token that ends
    documents (`<|endoftext|>`, `<|end_of_text|>`, ...): that one, as in pretraining. A stored plan says what
    was taken."""
    control_tokens: Literal["auto", "text", "token"] = "auto"
    """What the spelling of a special token inside a document is: `text`, cut like any other, or that `token`,
    for chats written out with their control tokens. `auto` is `text`. A stored plan never says `auto`."""
    dtype: Dtype = "bfloat16"
    """How activations are stored; `int8` keeps one float32 scale a row (docs/data.md has what it costs)."""
    compress: Compress = "none"
    """Codec of each slice: `zstd` saves some bytes and costs time (docs/data.md has the figures)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Key of the window order, the rows' order inside units and the held-out choice."""
    sink_multiple: float = Field(default=10.0, gt=1)
    """A row whose norm passes this multiple of its unit's median norm is marked (weight 0)."""
    adopt_tolerance: float = Field(default=0.05, gt=0)
    """Largest relative difference (Frobenius norm) at which rows stored by an attempt that died
    before its receipt are taken for the same rows."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.drop_leading >= self.context_length:
            raise ValueError("drop_leading must be smaller than context_length")
        if len(set(self.hooks)) != len(self.hooks):
            raise ValueError("hooks must not repeat")
        if self.windows_per_unit * self.context_length > MAX_TOKENS_PER_UNIT:
            raise ValueError(f"windows_per_unit x context_length must be at most {MAX_TOKENS_PER_UNIT}")
        if self.windows_per_unit * (self.context_length - self.drop_leading) > MAX_ROWS_PER_UNIT:
            raise ValueError(f"rows of a unit must be at most {MAX_ROWS_PER_UNIT}: lower windows_per_unit")
        return self

    def settled(self, found: Mapping[str, str]) -> PlanSpec:
        """This spec with `found`'s value for each field that says `auto`."""
        return self.model_copy(
            update={name: value for name, value in found.items() if getattr(self, name) == "auto"}
        )


BEFORE = {"bos": "none", "join": "eos", "control_tokens": "token"}
"""What plans mean that were stored before these fields had an `auto`; but for `bos`, left out of the JSON."""


class HarvestSpec(Contract):
    """How the harvest runs; nothing here changes which rows come out, only their float noise."""

    batch_windows: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Windows in one forward pass, halved where memory runs out. `auto` measures what is fastest, once for
    a root and a kind of device; the number decides the rows' last bits, so give it to get equal digests of
    two roots."""
    actors: int = Field(default=1, gt=0)
    """Ray actors, one copy of the truncated LM each."""
    threads_per_actor: int = Field(default=0, ge=0)
    """CPU threads of an actor; 0 divides the cores that this process may use by `actors`."""
    gpus_per_actor: float | None = Field(default=None, ge=0)
    """GPUs (or a share of one) that Ray reserves for an actor, which sees no others. Null: one where
    there are any and `subject.device` is not `cpu`, else none."""
    unit_attempts: int = Field(default=3, gt=0)
    """Failures of one unit before it is quarantined: the harvest goes on with the others and ends with
    a list. NaN and infinity quarantine at once; failures of storage are not the unit's."""
    abort_after_failures: int = Field(default=10, gt=0)
    """Failed attempts one after another, over all units, at which the harvest stops: the cause is then
    hardly the units'."""
    ray_address: str | None = None
    """A running cluster (`auto`, `host:6379`); null starts Ray on this machine for the run."""
    follow: FollowLimits | None = None
    """How far the harvest may run ahead of trainers with `train.follow`; null never waits for them."""
    temp_dir: str | None = None
    """Local folder for the planner's spill files; null takes the system's."""


class CorpusFacts(Contract):
    """What reading the corpus found."""

    sha256: Sha256
    """Digest over every document's text, length-prefixed, in order."""
    documents: int = Field(gt=0)
    tokens: int = Field(gt=0)
    """Tokens of all documents, with the one that joins them."""
    duplicates_dropped: int = Field(default=0, ge=0)
    """Documents equal to an earlier one."""
    bad_records: dict[str, Annotated[int, Field(gt=0)]] = Field(default={}, exclude_if=lambda bad: not bad)
    """Records left out by `corpus.bad_records: skip`, by reason."""
    bad_first: tuple[str, ...] = Field(default=(), exclude_if=lambda names: not names)
    """The first of them: `file, place: reason`."""
    windows_unused: int = Field(default=0, ge=0)
    """Whole windows beyond the planned units."""
    tokens_unused: int = Field(default=0, ge=0)
    """Tokens in no window: the tail of each split."""


class Execution(Contract):
    """Plan fields outside the fingerprint: they only move float noise, and receipts record them."""

    batch_windows: int | Literal["auto"]
    threads_per_actor: int
    code_version: str
    """Winnow's version at planning time."""
    created: str
    """UTC time, ISO 8601."""


def stored_width(dtype: Dtype, d_model: int) -> int:
    """Numbers on disk in a row of D values: D, and of int8 the scale's bytes after them."""
    return d_model + (SCALE_BYTES if dtype == "int8" else 0)


def row_bytes(dtype: Dtype, d_model: int) -> int:
    """Bytes on disk of a row of D values, uncompressed."""
    return stored_width(dtype, d_model) * DTYPE_BYTES[dtype]


def check_shard_size(spec: PlanSpec, site: HookSite) -> None:
    """ValueError where one shard would be larger than `MAX_SHARD_BYTES`."""
    rows = spec.windows_per_unit * (spec.context_length - spec.drop_leading)
    if rows * row_bytes(spec.dtype, site.d_model) > MAX_SHARD_BYTES - 4096:
        raise ValueError(
            f"a shard of {site.name} (D = {site.d_model}) would pass {MAX_SHARD_BYTES} bytes: "
            "lower windows_per_unit"
        )


class HarvestPlan(Artefact):
    """`plan.json`: the identity of a dataset. Create-only, never changed."""

    kind: Literal["winnow.plan"] = "winnow.plan"
    subject: SubjectIdentity
    corpus: CorpusSpec
    corpus_facts: CorpusFacts
    spec: PlanSpec
    sites: tuple[HookSite, ...]
    """One for each hook of the spec, in its order, with widths."""
    units: int = Field(gt=0, le=MAX_UNITS)
    """All units, the validation units first."""
    tokens_sha256: Sha256
    """SHA-256 of the `token_digests` array's bytes (uint8 [units, 32], each unit's token digest)."""
    bos_token_id: int | None = Field(default=None, ge=0, exclude_if=lambda token: token is None)
    """The token that windows start with, where it is not the subject's `bos_token_id`."""
    join_token_id: int | None = Field(default=None, ge=0, exclude_if=lambda token: token is None)
    """The token that joins documents, where it is not the subject's `eos_token_id`."""
    execution: Execution

    @field_validator("spec")
    @classmethod
    def _settled(cls, spec: PlanSpec) -> PlanSpec:
        return spec.settled(BEFORE)

    @field_serializer("spec", mode="wrap")
    def _as_before(self, spec: PlanSpec, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = serialise(spec)
        left_out = [name for name in ("join", "control_tokens") if fields.get(name) == BEFORE[name]]
        return {name: value for name, value in fields.items() if name not in left_out}

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if tuple(site.name for site in self.sites) != self.spec.hooks:
            raise ValueError("sites must name the spec's hooks in order")
        if self.units <= self.spec.validation_units:
            raise ValueError("a plan needs at least one training unit")
        if self.units * len(self.sites) > MAX_UNITS:
            raise ValueError(f"units x hooks must be at most {MAX_UNITS}")
        for site in self.sites:
            check_shard_size(self.spec, site)
        return self

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of every field but `execution`."""
        return sha256_hex(canonical_json(self.model_dump(mode="json", exclude={"execution"})))

    @property
    def bos_token(self) -> int | None:
        """The token that every window starts with; None where windows start with text."""
        if self.spec.bos != "window":
            return None
        return self.subject.bos_token_id if self.bos_token_id is None else self.bos_token_id

    @property
    def join_token(self) -> int | None:
        """The token that joins documents."""
        return self.subject.eos_token_id if self.join_token_id is None else self.join_token_id

    @property
    def rows_per_window(self) -> int:
        return self.spec.context_length - self.spec.drop_leading

    @property
    def rows_per_unit(self) -> int:
        return self.spec.windows_per_unit * self.rows_per_window

    @property
    def rows_per_slice(self) -> int:
        return self.rows_per_unit // SLICES

    @property
    def rows(self) -> int:
        """Rows of the whole dataset."""
        return self.units * self.rows_per_unit

    @property
    def windows(self) -> int:
        return self.units * self.spec.windows_per_unit

    def d_model(self, hook: str) -> int:
        """Width D at `hook`; ConfigError where the plan has no such hook."""
        for site in self.sites:
            if site.name == hook:
                return site.d_model
        raise ConfigError(f"hook {hook!r}", expected=f"one of {', '.join(self.spec.hooks)}", got=hook)

    def stored_width(self, hook: str) -> int:
        """Numbers on disk in a row of `hook`: D, or of int8 the scale's bytes more."""
        return stored_width(self.spec.dtype, self.d_model(hook))

    def split_units(self, split: str) -> range:
        """Unit numbers of `"train"`, `"validation"` or `"all"`."""
        held_out = self.spec.validation_units
        splits = {
            "train": range(held_out, self.units),
            "validation": range(held_out),
            "all": range(self.units),
        }
        if split not in splits:
            raise ConfigError("split", expected=" or ".join(splits), got=repr(split))
        return splits[split]

    def shard_bytes(self, hook: str) -> int:
        """Size of one uncompressed shard of `hook`, index and checksums included, in bytes.

        A compressed one is smaller, mostly; its receipt says by how much.
        """
        payload = self.rows_per_unit * row_bytes(self.spec.dtype, self.d_model(hook))
        return payload + SLICES * 4 + SLICES * 16 + 4


class Moments(Contract):
    """Per-dimension sums over a unit's rows of weight 1; raw units of the activation."""

    rows: int = Field(ge=0)
    sums: tuple[float, ...]
    """Sum over rows, one number a dimension."""
    squares: tuple[float, ...]
    """Sum of squares over rows, one number a dimension."""


class ShardRecord(Contract):
    """One committed shard, as read back or as written."""

    key: RelativeKey
    bytes: int = Field(ge=0)
    sha256: Sha256
    slice_crc32c: tuple[Crc32c, ...] = Field(min_length=SLICES, max_length=SLICES)
    """crc32c of each slice's payload as stored, in slice order."""
    slice_lengths: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(), max_length=SLICES, exclude_if=lambda lengths: not lengths
    )
    """Bytes of each slice's payload as stored, where the plan compresses; empty and left out otherwise."""
    sum_squares: float = Field(ge=0, allow_inf_nan=False)
    """Over all rows, in the stored values."""
    largest_norm: float = Field(ge=0, allow_inf_nan=False)
    median_norm: float = Field(ge=0, allow_inf_nan=False)
    sinks: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Stored row numbers inside the unit whose norm passes sink_multiple x median, ascending."""
    moments: Moments | None = None
    """For the first `MOMENT_UNITS` units."""


class Attempt(Contract):
    """Who made a unit and how: provenance, outside the content digest."""

    id: str
    """Random, new for every attempt."""
    worker: str = Field(default_factory=platform.node)
    seconds: float = Field(ge=0)
    """Wall-clock from the unit's start to its receipt."""
    batch_windows: int
    threads: int
    device: str
    finished: str
    """UTC time, ISO 8601."""
    adopted: tuple[HookName, ...] = ()
    """Hooks whose shard an earlier attempt had already stored."""


class UnitReceipt(Artefact):
    """`receipts/<unit>.json`: the unit is part of the dataset. Create-only; the commit point."""

    kind: Literal["winnow.receipt"] = "winnow.receipt"
    plan_fingerprint: Sha256
    unit: int = Field(ge=0, lt=MAX_UNITS)
    revision: int = Field(default=0, ge=0, lt=1 << 31)
    """Raised by a repair; readers take the highest."""
    tokens_sha256: Sha256
    """Digest of the unit's token chunk (uint32 little-endian [W, T])."""
    shards: dict[HookName, ShardRecord]
    """One for each hook of the plan; empty for a void unit."""
    void: str | None = Field(default=None, max_length=4096)
    """Why the unit holds no data: its rows keep their places with weight 0."""
    attempt: Attempt

    def content(self) -> bytes:
        """Canonical JSON of what the unit holds, free of attempt, time and revision."""
        return canonical_json(self.model_dump(mode="json", exclude={"attempt", "revision"}))


class ManifestPart(Contract):
    """A Parquet file of receipts."""

    key: RelativeKey
    bytes: int = Field(gt=0, le=1 << 30)
    sha256: Sha256
    first_unit: int = Field(ge=0, lt=MAX_UNITS)
    units: int = Field(gt=0, le=MAX_UNITS)


class HarvestManifest(Artefact):
    """`manifest.json`: every unit has a receipt; the dataset is sealed. Create-only."""

    kind: Literal["winnow.manifest"] = "winnow.manifest"
    plan_fingerprint: Sha256
    revision: int = Field(default=0, ge=0)
    parent: Sha256 | None = None
    """SHA-256 of the manifest this one follows after a repair."""
    units: int = Field(gt=0, le=MAX_UNITS)
    rows: int = Field(gt=0)
    bytes: int = Field(ge=0)
    """All shards together."""
    sinks: dict[HookName, int]
    """Marked rows (weight 0) by hook."""
    void_units: tuple[int, ...] = ()
    dataset_sha256: Sha256
    """SHA-256 over the plan fingerprint and every unit's content digest, in unit order: equal for
    equal data, whoever made it and whenever."""
    parts: tuple[ManifestPart, ...] = Field(min_length=1)
    created: str
    """UTC time, ISO 8601."""


class BatchRecord(Artefact):
    """`batches/<device>.json`: the windows in a pass that one kind of device harvests this root with.

    `batches/<device>/<windows>.json` says that memory ran out since, and how many windows are left.
    Create-only.
    """

    kind: Literal["winnow.batch"] = "winnow.batch"
    plan_fingerprint: Sha256
    batch_windows: int = Field(gt=0)
    tokens_per_s: dict[int, float] = {}
    """Size -> what was measured; empty where memory ran out."""


class TokenAccount(Contract):
    """Where every token of the corpus went: `corpus + bos_added` is the sum of the four below it."""

    corpus: int = Field(ge=0)
    """Tokens of all documents, with the one that joins them."""
    bos_added: int = Field(ge=0)
    """BOS tokens that planned windows begin with; they are not of the corpus."""
    beyond_plan: int = Field(ge=0)
    """In whole windows beyond the planned units."""
    tails: int = Field(ge=0)
    """In no window: the end of each split."""
    leading: int = Field(ge=0)
    """At the leading positions of planned windows, which are not stored."""
    stored: int = Field(ge=0)
    """Rows of each hook once every unit is there."""
    sinks: dict[HookName, int] = {}
    """Of `stored`: rows marked with weight 0, by hook; known once the dataset is sealed."""
    void: int | None = None
    """Of `stored`: rows of void units, weight 0; known once the dataset is sealed."""


class LedgerRun(Contract):
    """What one run of `winnow harvest` did."""

    id: str = ""
    """Random, new for every run."""
    finished: str
    """UTC time of the last entry, ISO 8601."""
    ended: bool = True
    """False while the run is going on, and for ever where it was killed."""
    units: int = Field(ge=0)
    """Units committed by this run."""
    tokens: int = Field(ge=0)
    """Tokens of those units' windows (W x T each)."""
    bytes: int = Field(default=0, ge=0)
    """Shard bytes of those units."""
    seconds: float = Field(ge=0)
    """Wall-clock from the first unit handed out to the last receipt, model loading left out."""
    lm_seconds: float = Field(default=0.0, ge=0)
    """Seconds the LM worked, summed over actors."""
    storage_wait_seconds: float = Field(default=0.0, ge=0)
    """Seconds the LM stood still for storage (tokens to come, units to be committed), over actors."""
    failures: int = Field(default=0, ge=0)
    """Unit attempts that failed and were tried again."""
    batch_windows: int | None = None
    """Windows in a pass of the LM for the unit that was committed last."""


class HarvestLedger(Artefact):
    """`ledger.json`: how the harvest went, run by run. Rewritten; no part of the dataset's identity."""

    kind: Literal["winnow.ledger"] = "winnow.ledger"
    runs: tuple[LedgerRun, ...] = ()
    account: TokenAccount | None = None
    """Where the corpus's tokens went."""

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens over seconds of all runs; None before the first."""
        seconds = sum(run.seconds for run in self.runs)
        tokens = sum(run.tokens for run in self.runs)
        return tokens / seconds if seconds and tokens else None

    @property
    def bytes_per_second(self) -> float | None:
        """Shard bytes over seconds of all runs that counted them; None before the first."""
        counted = [run for run in self.runs if run.bytes]
        seconds = sum(run.seconds for run in counted)
        return sum(run.bytes for run in counted) / seconds if seconds else None

    @property
    def storage_wait_seconds(self) -> float:
        """Seconds the LM stood still for storage, over all runs and actors."""
        return sum(run.storage_wait_seconds for run in self.runs)
