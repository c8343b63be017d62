"""The data plane's artefacts: plan (identity), receipt (commit point), manifest (seal)."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_validator,
)

from winnow.schemas.base import Artefact, Contract, HookName, RelativeKey, Sha256, canonical_json, sha256_hex
from winnow.schemas.corpus import CorpusSpec
from winnow.schemas.derived import Derivation
from winnow.schemas.errors import ConfigError
from winnow.schemas.follow import FollowLimits
from winnow.schemas.labels import PlannedLabels
from winnow.schemas.subject import HookSite, SubjectIdentity, expand_hooks, parse_lens

SLICES = 64
"""Inner chunks, called slices, of every shard. Lanes own whole slices, so the number of lanes divides it."""
MOMENT_UNITS = 16
"""Only the receipts of this many first units contain per-dimension moments: windows are shuffled over the
corpus, so every unit is an unbiased sample of it."""
# A plan from elsewhere must not make a reader allocate what it merely claims, so every count in it is
# bounded.
MAX_UNITS = 1 << 24
MAX_HOOKS = 1024
MAX_CONTEXT = 1 << 20
MAX_ROWS_PER_UNIT = 1 << 26
# A shard is put in one part, and is read back whole when a later attempt adopts it.
MAX_SHARD_BYTES = 1 << 31
# The tokens of a unit are one chunk, which is read whole.
MAX_TOKENS_PER_UNIT = 1 << 28
Dtype = Literal["bfloat16", "float16", "float32", "int8"]
Compress = Literal["none", "zstd"]
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}
SCALE_BYTES = 4
"""Bytes of an int8 row's scale, a little-endian float32 after its D values. It is in the row so that a slice
contains everything that its rows need."""
Crc32c = Annotated[int, Field(ge=0, le=0xFFFFFFFF)]


class PlanSpec(Contract):
    """How the corpus becomes rows. Every field affects the dataset's content, and so its identity.

    `tokens_from` is the exception: it says where the windows are read, and no stored plan contains it.
    """

    hooks: Annotated[tuple[HookName, ...], BeforeValidator(expand_hooks)] = Field(
        min_length=1, max_length=MAX_HOOKS
    )
    """Hooks at which activations are read. Several are read in one pass of the model, and their rows stay
    aligned: row i is the same token at each. `mlp_in.0-29` stands for those of layers 0 to 29."""
    tokens_from: str | None = Field(default=None, min_length=1, exclude_if=lambda root: root is None)
    """Another dataset's root, whose windows are taken: the same tokens, in the same order and with the same
    permutation of rows, so that rows of both are aligned (`train.roots`). The corpus and every field below
    that decides windows are then that dataset's; those given here must agree with it. Refused if the two
    tokenizers have different vocabularies. Null, the default, reads `corpus`."""
    context_length: int = Field(default=128, ge=8, le=MAX_CONTEXT)
    """Window length T in tokens."""
    drop_leading: int = Field(default=1, ge=0)
    """Leading positions of each window that are not stored. 1, because position 0 is an attention sink: in
    SmolLM2's layer 15 it alone has 99.7 % of the variance."""
    # A multiple of the slices, so that all slices of a shard have the same number of rows.
    windows_per_unit: int = Field(default=1024, gt=0, le=MAX_ROWS_PER_UNIT, multiple_of=SLICES)
    """Windows W per unit. A unit has W x (T - drop_leading) rows and one shard per hook; shards of 128 to 512
    MiB are a good size. Choose fewer for a small corpus, so that there are many units."""
    train_units: int | None = Field(default=None, gt=0)
    """Units kept for training: the first in the shuffled order. Null, the default, keeps the whole corpus."""
    # At least one: every figure that is reported is measured on held-out rows.
    validation_units: int = Field(default=1, ge=1)
    """Units of held-out text. They are the first of the dataset, and are harvested first."""
    split_by: Literal["document", "window"] = "document"
    """What is held out. `document`: whole documents, set aside before packing, so that no held-out text
    continues in a training window. `window`: windows."""
    bos: Literal["auto", "none", "window"] = "auto"
    """`window` begins every window with the BOS token; `none` never adds one. `auto`: `window` if the
    tokenizer itself puts a BOS before a text, and then with that token. A stored plan records which it
    was."""
    join: str = Field(default="auto", min_length=1, max_length=256)
    """The token after each document: `eos`, `bos`, or the text of one token. `auto`: EOS, unless it ends a
    chat's turn (`<|im_end|>`, `<|eot_id|>`, ...) and the vocabulary has a special token that ends documents
    (`<|endoftext|>`, `<|end_of_text|>`, ...); then that one, as in pretraining. A stored plan records which
    it was."""
    control_tokens: Literal["auto", "text", "token"] = "auto"
    """How the spelling of a special token inside a document is read: as `text` like any other, or as that
    `token`, for chats that are written out with their control tokens. `auto` is `text`, because a document
    that only mentions such a token must not end there. A stored plan records which it was."""
    attend: Literal["window", "document"] = Field(
        default="window", exclude_if=lambda attend: attend == "window"
    )
    """What a token sees. `window`: all earlier tokens of its window, also those of other documents, as in
    pretraining. `document`: those of its own document only, with positions from 0, so that its row is that of
    the document run alone. A document that began in an earlier window begins again at the window's start,
    as after any cut. Needs a subject that keeps packed documents apart, which is checked when it is loaded;
    docs/subjects.md names those that do."""
    dtype: Dtype = "bfloat16"
    """Type in which activations are stored. `int8` takes half the bytes of bfloat16, with one float32 scale
    per row; docs/data.md has its cost in FVU and delta CE."""
    compress: Compress = "none"
    """Codec of each slice. `none`, because `zstd` saves a fifth of the bytes of bfloat16 but reduces its read
    speed by a fifth (docs/data.md)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Key of the order of the windows, of the rows inside units, and of the choice of held-out text."""
    sink_multiple: float = Field(default=10.0, gt=1)
    """A row whose norm exceeds this multiple of its unit's median norm is marked as a sink: it is stored,
    with weight 0. 10, because a few such rows dominate every sum: in SmolLM2's layer 15, 30 rows of 177,800
    had 73 % of the variance."""
    adopt_tolerance: float = Field(default=0.05, gt=0)
    """Largest relative difference, in the Frobenius norm, at which rows that an earlier attempt stored before
    it died count as the same rows. Two attempts differ in float noise."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        # Refused here, before a corpus is read and tokenised for a plan that could not be harvested.
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
        """Return this spec with `found`'s value for each field that says `auto`."""
        return self.model_copy(
            update={name: value for name, value in found.items() if getattr(self, name) == "auto"}
        )

    def on_windows_of(self, parent: PlanSpec) -> PlanSpec:
        """Return this spec with the windows of `parent`'s: what decides them and is not given is taken over.

        A field that is given and differs stays as it is, so that a comparison with `parent` names it.
        """
        taken = {name: getattr(parent, name) for name in WINDOW_FIELDS if name not in self.model_fields_set}
        settled = self.settled(parent.model_dump(include=set(BEFORE)))
        return settled.model_copy(update={**taken, "tokens_from": None})


WINDOW_FIELDS = (
    "context_length",
    "drop_leading",
    "windows_per_unit",
    "train_units",
    "validation_units",
    "split_by",
    "bos",
    "join",
    "control_tokens",
    "seed",
)
"""Fields of `PlanSpec` that decide which token each stored row is; the others decide how rows are stored."""


# Plans stored before these fields existed must keep both their meaning and their fingerprint, so a value that
# says nothing new is not written. `bos` existed already, without `auto`, and is always written.
BEFORE = {"bos": "none", "join": "eos", "control_tokens": "token"}
"""What a plan means by `auto`, or by the absence of these fields, if it was stored before they had an
`auto`."""


class HarvestSpec(Contract):
    """How the harvest runs. Nothing here changes which rows come out, only their float noise."""

    batch_windows: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Windows per forward pass; halved if memory runs out. `auto` measures which number is fastest, once per
    root and kind of device; delete `batches/<device>.json` in the root to measure again. The number affects
    the last bits of the rows: set it if two roots should have equal digests."""
    actors: int = Field(default=1, gt=0)
    """Largest number of Ray actors, each with its own copy of the truncated model."""
    threads_per_actor: int = Field(default=0, ge=0)
    """CPU threads per actor. 0, the default, divides the cores that this process may use by `actors`. The
    number affects the last bits of the rows."""
    gpus_per_actor: float | None = Field(default=None, ge=0)
    """GPUs, or a share of one, that Ray reserves for each actor, which sees no others. Null, the default, is
    1 if there are any and `subject.device` is not `cpu`, otherwise 0."""
    unit_attempts: int = Field(default=3, gt=0)
    """Failures of one unit after which it is quarantined; the harvest continues with the others and lists it
    at the end. NaN and infinity would recur and quarantine at once; failures of storage do not count."""
    abort_after_failures: int = Field(default=10, gt=0)
    """Failed attempts in a row, over all units, after which the harvest stops, because then the cause is
    hardly in the units."""
    ray_address: str | None = None
    """Address of a running Ray cluster (`auto`, `host:6379`). Null, the default, starts Ray on this machine
    for the run."""
    follow: FollowLimits | None = None
    """How far the harvest may be ahead of trainers with `train.follow`. Null, the default, never waits for
    them."""
    temp_dir: str | None = None
    """Local folder for the planner's spill files. Null, the default, takes the system's."""


class CorpusFacts(Contract):
    """What was found when the corpus was read. Part of the dataset's identity."""

    sha256: Sha256
    """Digest of every document's text in order, each prefixed with its length, so that documents that are
    divided differently give another digest."""
    documents: int = Field(gt=0)
    """Number of documents, without duplicates."""
    tokens: int = Field(gt=0)
    """Tokens of all documents, including those that join them."""
    duplicates_dropped: int = Field(default=0, ge=0)
    """Documents that were dropped because they equal an earlier one."""
    # Both are left out of the JSON while empty, so that older plans keep their fingerprints.
    bad_records: dict[str, Annotated[int, Field(gt=0)]] = Field(default={}, exclude_if=lambda bad: not bad)
    """Number of records that `corpus.bad_records: skip` left out, by reason."""
    bad_first: tuple[str, ...] = Field(default=(), exclude_if=lambda names: not names)
    """The first of those records, as `file, place: reason`."""
    templates: dict[int, Sha256] = Field(default={}, exclude_if=lambda found: not found)
    """SHA-256 of the chat template of each source that has one, by the source's number."""
    windows_unused: int = Field(default=0, ge=0)
    """Whole windows that were left over after the planned units."""
    tokens_unused: int = Field(default=0, ge=0)
    """Tokens that are in no window: the tail of each split."""


class Execution(Contract):
    """Plan fields outside the fingerprint: they affect float noise only, and receipts record them."""

    batch_windows: int | Literal["auto"]
    """As in `HarvestSpec`."""
    threads_per_actor: int
    """As in `HarvestSpec`."""
    code_version: str
    """Version of Winnow that made the plan."""
    tokens_from: Sha256 | None = Field(default=None, exclude_if=lambda plan: plan is None)
    """Fingerprint of the plan whose windows were taken; null if the corpus was read."""
    created: str
    """When the plan was made: UTC, ISO 8601."""


def stored_width(dtype: Dtype, d_model: int) -> int:
    """Return the numbers on disk per row of D values: D, and for int8 the scale's bytes after them."""
    return d_model + (SCALE_BYTES if dtype == "int8" else 0)


def row_bytes(dtype: Dtype, d_model: int) -> int:
    """Return the bytes on disk per row of D values, uncompressed."""
    return stored_width(dtype, d_model) * DTYPE_BYTES[dtype]


def check_shard_size(spec: PlanSpec, site: HookSite) -> None:
    """Raise ValueError if one shard would be larger than `MAX_SHARD_BYTES`."""
    # 4096: the shard's index and its checksums also need room (see `HarvestPlan.shard_bytes`).
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
    """The model that is read."""
    corpus: CorpusSpec
    """The text that is read."""
    corpus_facts: CorpusFacts
    """What reading the text found."""
    spec: PlanSpec
    """How text becomes rows, with every `auto` resolved."""
    sites: tuple[HookSite, ...]
    """The hooks of `spec`, in its order, with their widths."""
    units: int = Field(gt=0, le=MAX_UNITS)
    """Number of units, validation units included; those come first."""
    # One digest for all units: 64 digits for each of 2**20 units alone would reach MAX_JSON_BYTES.
    tokens_sha256: Sha256
    """SHA-256 of the `token_digests` array's bytes: uint8 [units, 32], the digest of each unit's tokens."""
    # Left out of the JSON if null, so that older plans keep their fingerprints.
    bos_token_id: int | None = Field(default=None, ge=0, exclude_if=lambda token: token is None)
    """Id of the token that windows begin with, if it is not the subject's `bos_token_id`."""
    join_token_id: int | None = Field(default=None, ge=0, exclude_if=lambda token: token is None)
    """Id of the token that joins documents, if it is not the subject's `eos_token_id`."""
    labels: PlannedLabels | None = Field(default=None, exclude_if=lambda labels: labels is None)
    """What the tokens are (role, turn, source, ...); null in plans that were made before labels existed."""
    derived: Derivation | None = Field(default=None, exclude_if=lambda derived: derived is None)
    """What the rows were made from, if not by the subject (`winnow derive`). If the rule regroups rows,
    a window is only a group of rows with their tokens, and no text."""
    execution: Execution
    """What else the plan was made with, outside its fingerprint."""

    @field_validator("spec")
    @classmethod
    def _settled(cls, spec: PlanSpec) -> PlanSpec:
        # `auto` in a stored plan is a default filled in on reading: the plan was made before the field
        # existed.
        return spec.settled(BEFORE)

    @field_serializer("spec", mode="wrap")
    def _as_before(self, spec: PlanSpec, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The counterpart of `_settled`: what it filled in is left out again, for the fingerprint's sake.
        fields = serialise(spec)
        left_out = [name for name in ("join", "control_tokens") if fields.get(name) == BEFORE[name]]
        return {name: value for name, value in fields.items() if name not in left_out}

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        # Sites and hooks are paired by their place.
        if tuple(site.name for site in self.sites) != self.spec.hooks:
            raise ValueError("sites must name the spec's hooks in order")
        if self.labels is not None:
            if len(self.labels.tokens_by_role) != len(self.labels.roles):
                raise ValueError("labels.tokens_by_role must have a number for each role")
            if len(self.labels.tokens_by_source) != len(self.corpus.sources):
                raise ValueError("labels.tokens_by_source must have a number for each source")
        if self.spec.attend == "document" and self.labels is None:
            raise ValueError("spec.attend: document needs labels, which tell where documents begin")
        if self.units <= self.spec.validation_units:
            raise ValueError("a plan needs at least one training unit")
        # The product too: a reader has an entry for every shard, not only for every unit.
        if self.units * len(self.sites) > MAX_UNITS:
            raise ValueError(f"units x hooks must be at most {MAX_UNITS}")
        for site in self.sites:
            check_shard_size(self.spec, site)
        return self

    # Cached, because every receipt is compared with it.
    @cached_property
    def fingerprint(self) -> str:
        """The dataset's identity: SHA-256 of the canonical JSON of every field except `execution`."""
        return sha256_hex(canonical_json(self.model_dump(mode="json", exclude={"execution"})))

    @property
    def no_text(self) -> str | None:
        """Why the dataset's windows cannot be run or read as text; None if they can."""
        if self.derived is None or not any(rule.regroups for rule in self.derived.rules):
            return None
        return f"its rows were regrouped ({self.derived.words}) and are no windows of text"

    @property
    def no_subject(self) -> str | None:
        """Why the subject, run on the dataset's windows, does not give its rows; None if it does."""
        if self.derived is not None and any(rule.minus for rule in self.derived.rules):
            return "its rows are differences of two datasets, which no subject gives"
        return self.no_text

    @property
    def bos_token(self) -> int | None:
        """Id of the token that every window begins with; None if windows begin with text."""
        if self.spec.bos != "window":
            return None
        return self.subject.bos_token_id if self.bos_token_id is None else self.bos_token_id

    @property
    def join_token(self) -> int | None:
        """Id of the token that joins documents; None if the subject has none."""
        return self.subject.eos_token_id if self.join_token_id is None else self.join_token_id

    @property
    def rows_per_window(self) -> int:
        """Stored rows per window."""
        return self.spec.context_length - self.spec.drop_leading

    @property
    def rows_per_unit(self) -> int:
        """Rows per unit."""
        return self.spec.windows_per_unit * self.rows_per_window

    @property
    def rows_per_slice(self) -> int:
        """Rows per slice; a whole number, because the windows of a unit are a multiple of `SLICES`."""
        return self.rows_per_unit // SLICES

    @property
    def rows(self) -> int:
        """Rows of the whole dataset, held-out ones included."""
        return self.units * self.rows_per_unit

    @property
    def windows(self) -> int:
        """Windows of the whole dataset, held-out ones included."""
        return self.units * self.spec.windows_per_unit

    def d_model(self, hook: str) -> int:
        """Return the width D at `hook`; raise ConfigError if the plan has no such hook."""
        for site in self.sites:
            if site.name == hook:
                return site.d_model
        ours = parse_lens(hook)
        raise ConfigError(
            f"hook {hook!r} is not in the dataset",
            expected=f"one of {', '.join(self.spec.hooks)}",
            got=f"TransformerLens' name of {ours}" if ours else hook,
            fix="Name one of them; any other hook takes a harvest of its own, into another `root`",
        )

    def stored_width(self, hook: str) -> int:
        """Return the numbers on disk per row of `hook`: D, and for int8 the scale's bytes after them."""
        return stored_width(self.spec.dtype, self.d_model(hook))

    def split_units(self, split: str) -> range:
        """Return the unit numbers of the split `"train"`, `"validation"` or `"all"`."""
        # Held-out units come first, so that every split is a range and they are harvested before any other.
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
        """Return the size of one uncompressed shard of `hook` in bytes, index and checksums included.

        A compressed shard is usually smaller; its receipt says by how much.
        """
        payload = self.rows_per_unit * row_bytes(self.spec.dtype, self.d_model(hook))
        # zarr's sharding: a crc32c (4) after each slice; the index, an offset and a length (8 + 8) for each
        # slice, and its own crc32c.
        return payload + SLICES * 4 + SLICES * 16 + 4


class Moments(Contract):
    """Per-dimension sums over a unit's rows of weight 1, in the activation's own units."""

    rows: int = Field(ge=0)
    """Number of those rows."""
    sums: tuple[float, ...]
    """Sum over the rows, one number per dimension."""
    squares: tuple[float, ...]
    """Sum of squares over the rows, one number per dimension."""


class ShardRecord(Contract):
    """One committed shard, described from the bytes that are stored."""

    key: RelativeKey
    """Key of the shard below the root."""
    bytes: int = Field(ge=0)
    """Its size as stored."""
    sha256: Sha256
    """Digest of its bytes as stored."""
    # In the receipt, because zarr reads a flipped bit as data unless the checksums it finds in the shard are
    # right.
    slice_crc32c: tuple[Crc32c, ...] = Field(min_length=SLICES, max_length=SLICES)
    """crc32c of each slice's payload as stored, in the order of the slices."""
    slice_lengths: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(), max_length=SLICES, exclude_if=lambda lengths: not lengths
    )
    """Bytes of each slice's payload as stored, if the plan compresses; otherwise empty, and left out of the
    JSON."""
    sum_squares: float = Field(ge=0, allow_inf_nan=False)
    """Sum of squares over all rows, of the values as stored."""
    largest_norm: float = Field(ge=0, allow_inf_nan=False)
    """Largest norm of a row."""
    median_norm: float = Field(ge=0, allow_inf_nan=False)
    """Median norm of the rows."""
    sinks: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Numbers, inside the unit, of the rows whose norm exceeds sink_multiple x median_norm; ascending."""
    moments: Moments | None = None
    """Per-dimension sums; only in the first `MOMENT_UNITS` units."""


class Attempt(Contract):
    """Where and how a unit was computed: provenance, outside the content digest."""

    id: str
    """Random id, new for every attempt."""
    worker: str = Field(default_factory=platform.node)
    """Name of the machine."""
    seconds: float = Field(ge=0)
    """Wall-clock time from the unit's start to its receipt, in seconds."""
    batch_windows: int
    """Windows per forward pass; the same for all passes of the unit."""
    threads: int
    """CPU threads of the actor."""
    device: str
    """Device that ran the model."""
    finished: str
    """When: UTC, ISO 8601."""
    adopted: tuple[HookName, ...] = ()
    """Hooks whose shard an earlier attempt had stored already."""
    engine_difference: float | None = Field(default=None, exclude_if=lambda found: found is None)
    """Largest difference between a row and that of transformers, as a fraction of its norm; null if the unit
    was not compared (`SubjectSpec.engine_check_every`)."""


class UnitReceipt(Artefact):
    """`receipts/<unit>.json`: the unit is part of the dataset. Create-only; this is the commit point."""

    kind: Literal["winnow.receipt"] = "winnow.receipt"
    plan_fingerprint: Sha256
    """Fingerprint of the dataset's plan."""
    unit: int = Field(ge=0, lt=MAX_UNITS)
    """Number of the unit."""
    revision: int = Field(default=0, ge=0, lt=1 << 31)
    """0 at first; each repair adds a receipt with the next number, and readers take the highest."""
    tokens_sha256: Sha256
    """Digest of the unit's token chunk: little-endian uint32 [W, T]."""
    shards: dict[HookName, ShardRecord]
    """The shard of each hook of the plan; empty for a void unit."""
    void: str | None = Field(default=None, max_length=4096)
    """Why the unit has no data; its rows then keep their places with weight 0. Null for an ordinary unit."""
    attempt: Attempt
    """The attempt that committed the unit."""

    def content(self) -> bytes:
        """Encode what the unit contains as canonical JSON, without attempt and revision."""
        # Two harvests of the same plan must agree on the dataset's digest, whoever computed a unit and when.
        return canonical_json(self.model_dump(mode="json", exclude={"attempt", "revision"}))


class ManifestPart(Contract):
    """A Parquet file that gathers receipts."""

    key: RelativeKey
    """Key of the file below the root."""
    # Bounded, because a part is read whole.
    bytes: int = Field(gt=0, le=1 << 30)
    """Its size."""
    sha256: Sha256
    """Its digest."""
    first_unit: int = Field(ge=0, lt=MAX_UNITS)
    """The first unit in it."""
    units: int = Field(gt=0, le=MAX_UNITS)
    """Number of units in it."""


class HarvestManifest(Artefact):
    """`manifest.json`: every unit has a receipt; the dataset is sealed. Create-only."""

    kind: Literal["winnow.manifest"] = "winnow.manifest"
    plan_fingerprint: Sha256
    """Fingerprint of the dataset's plan."""
    revision: int = Field(default=0, ge=0)
    """0 at first; each repair adds a manifest with the next number, and readers take the highest."""
    parent: Sha256 | None = None
    """SHA-256 of the manifest that this one replaces after a repair; null for the first."""
    units: int = Field(gt=0, le=MAX_UNITS)
    """Number of units, validation units included."""
    rows: int = Field(gt=0)
    """Rows of each hook."""
    bytes: int = Field(ge=0)
    """Size of all shards together."""
    sinks: dict[HookName, int]
    """Number of rows marked as sinks (weight 0), by hook."""
    void_units: tuple[int, ...] = ()
    """Units that were committed without data; ascending."""
    dataset_sha256: Sha256
    """SHA-256 over the plan's fingerprint and every unit's content digest, in the order of units: equal for
    equal data, whoever harvested it and when."""
    # The receipts in a few files: a reader would otherwise make one request per unit to open the dataset.
    parts: tuple[ManifestPart, ...] = Field(min_length=1)
    """The files that contain all receipts, in the order of units."""
    created: str
    """When the dataset was sealed: UTC, ISO 8601."""


class BatchRecord(Artefact):
    """`batches/<device>.json`: the windows per pass with which one kind of device harvests this root.

    `batches/<device>/<windows>.json` says that memory ran out later, and how many windows are left. Both are
    create-only, so that restarts and nodes that join use one number and give the same bits.
    """

    kind: Literal["winnow.batch"] = "winnow.batch"
    plan_fingerprint: Sha256
    """Fingerprint of the dataset's plan."""
    batch_windows: int = Field(gt=0)
    """Windows per pass to use."""
    tokens_per_s: dict[int, float] = {}
    """Windows per pass -> tokens per second that were measured; empty if memory ran out."""
