"""Description and progress of a dataset, from its plan, listing and manifest; no data is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from winnow.schemas.base import Contract
from winnow.schemas.derived import Derivation
from winnow.schemas.fit import ranges
from winnow.schemas.harvest import HarvestPlan
from winnow.schemas.labels import PlannedLabels
from winnow.store.format.layout import TOKENS_ARRAY, tokens_key
from winnow.store.objects import ObjectStore
from winnow.store.read.reader import load_plan
from winnow.store.records.commit import list_receipts
from winnow.store.records.manifest import find_manifest

State = Literal["planning", "planned", "harvesting", "harvested", "sealed"]


class DatasetInfo(Contract):
    """The answer of `winnow info`."""

    uri: str
    """The root."""
    state: State
    """`planning`: token chunks are missing; `harvested`: every receipt exists, but no manifest yet."""
    subject: str
    """The language model."""
    subject_weights_sha256: str
    corpus: tuple[str, ...]
    """URIs of the sources."""
    documents: int
    corpus_tokens: int
    """Tokens of the whole corpus."""
    bad_records: dict[str, int]
    """Records of the corpus that were omitted, by reason."""
    bad_first: tuple[str, ...]
    """The first of them."""
    hooks: dict[str, int]
    """Hook -> width D."""
    dtype: str
    """How activations are stored."""
    context_length: int
    drop_leading: int
    """Leading positions of a window that are not stored."""
    bos_token: int | None
    """Id of the token that every window starts with; null if windows start with text."""
    join: str
    """The token between documents: `eos`, `bos` or a token's text."""
    join_token: int | None
    """Its id."""
    control_tokens: str
    """How special tokens' spellings in documents were read: `text` or `token`."""
    derived: Derivation | None
    """What the rows were made from; null if the subject gave them."""
    attend: str
    """What a token saw: its `window`, or its `document` only."""
    windows_per_unit: int
    rows_per_unit: int
    units: int
    """Planned units, including validation."""
    validation_units: int
    units_with_tokens: int
    units_committed: int
    """Units that have a receipt."""
    void_units: int | None
    """Units without data; null until the dataset is sealed."""
    rows: int
    """Planned rows of every hook."""
    planned_bytes: int
    """Bytes of all shards once the harvest is finished, uncompressed."""
    stored_bytes: int
    """Bytes of all objects under `activations/`."""
    labels: PlannedLabels | None
    """Roles, and planned tokens of each role, source and turn; null if the plan was made before labels
    existed."""
    sinks: dict[str, int] | None
    """Marked rows by hook; null until the dataset is sealed."""
    plan_fingerprint: str
    dataset_sha256: str | None
    """Null until the dataset is sealed."""
    revision: int | None
    """The manifest's revision: repairs so far."""


def token_rows(plan: HarvestPlan | DatasetInfo) -> list[tuple[str, object]]:
    """Describe a plan's tokens that are not text, as rows of a table."""
    spec = plan.spec if isinstance(plan, HarvestPlan) else plan
    first = "text, no BOS" if plan.bos_token is None else f"BOS (token {plan.bos_token})"
    rows: list[tuple[str, object]] = [
        ("windows begin with", first),
        ("documents joined by", f"{spec.join} (token {plan.join_token})"),
    ]
    if spec.attend == "document":
        rows.append(("a token sees", "its own document"))
    if spec.control_tokens == "token":
        rows.append(("control tokens in text", "taken as tokens"))
    return rows


def derived_rows(derived: Derivation | None) -> list[tuple[str, object]]:
    """Describe what a derived dataset was made from, as rows of a table; none if it was harvested."""
    if derived is None:
        return []
    rows: list[tuple[str, object]] = [
        ("derived from", f"dataset {derived.parent[:12]}"),
        ("rule", derived.words),
    ]
    if derived.left_out:
        rows.append(("left over", f"{derived.left_out:,} rows fill no unit"))
    return rows


def label_rows(labels: PlannedLabels | None, sources: Sequence[str]) -> list[tuple[str, object]]:
    """Describe how many tokens there are of each kind and of each of the `sources`, as rows of a table."""
    if labels is None:
        return [("labels", "none (planned by an earlier version)")]
    rows: list[tuple[str, object]] = [("special tokens", f"{labels.special:,}")]
    by_role = {role: n for role, n in zip(labels.roles, labels.tokens_by_role, strict=True) if n}
    if set(by_role) != {"none"}:
        rows.append(("tokens by role", _shares(by_role)))
    if len(labels.tokens_by_source) > 1:
        for index, (uri, count) in enumerate(zip(sources, labels.tokens_by_source, strict=True)):
            rows.append(("" if index else "tokens by source", f"{uri} {count:,}"))
    if len(labels.tokens_by_turn) > 1:
        turns = {f"turn {turn}:": count for turn, count in enumerate(labels.tokens_by_turn)}
        rows.append(("tokens by turn", _shares(turns)))
    return rows


def _shares(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def dataset_info(store: ObjectStore) -> DatasetInfo:
    """Describe the dataset at a root.

    Raises:
        ConfigError: There is no dataset.
        IntegrityError, UnsupportedVersion: Plan or manifest cannot be read.
        StoreError: Storage cannot be reached.
    """
    plan = load_plan(store)
    manifest = find_manifest(store, plan)
    committed = len(list_receipts(store, plan))
    token_keys = {key for key, _ in store.list(TOKENS_ARRAY)}
    # A plan from elsewhere may claim any number of units; there cannot be more with tokens than keys.
    with_tokens = sum(tokens_key(unit) in token_keys for unit in range(min(plan.units, len(token_keys))))
    return DatasetInfo(
        uri=store.uri,
        state="sealed" if manifest else _state(plan, with_tokens, committed),
        subject=plan.subject.model,
        subject_weights_sha256=plan.subject.weights_sha256,
        corpus=tuple(source.uri for source in plan.corpus.sources),
        documents=plan.corpus_facts.documents,
        corpus_tokens=plan.corpus_facts.tokens,
        bad_records=plan.corpus_facts.bad_records,
        bad_first=plan.corpus_facts.bad_first,
        hooks={site.name: site.d_model for site in plan.sites},
        dtype=plan.spec.dtype,
        context_length=plan.spec.context_length,
        drop_leading=plan.spec.drop_leading,
        bos_token=plan.bos_token,
        join=plan.spec.join,
        join_token=plan.join_token,
        control_tokens=plan.spec.control_tokens,
        derived=plan.derived,
        attend=plan.spec.attend,
        windows_per_unit=plan.spec.windows_per_unit,
        rows_per_unit=plan.rows_per_unit,
        units=plan.units,
        validation_units=plan.spec.validation_units,
        units_with_tokens=with_tokens,
        units_committed=committed,
        void_units=len(manifest.void_units) if manifest else None,
        rows=plan.rows,
        planned_bytes=plan.units * sum(plan.shard_bytes(hook) for hook in plan.spec.hooks),
        stored_bytes=sum(size for _, size in store.list("activations")),
        labels=plan.labels,
        sinks=manifest.sinks if manifest else None,
        plan_fingerprint=plan.fingerprint,
        dataset_sha256=manifest.dataset_sha256 if manifest else None,
        revision=manifest.revision if manifest else None,
    )


def hook_rows(widths: Mapping[str, int]) -> list[tuple[str, str]]:
    """Describe the hooks of a dataset and their widths as rows of a table, one for each width."""
    hooks: dict[int, list[str]] = {}
    for hook, width in widths.items():
        hooks.setdefault(width, []).append(hook)
    rows = [f"{', '.join(ranges(named))} (D = {width})" for width, named in hooks.items()]
    return [("" if index else "hooks", row) for index, row in enumerate(rows)]


def bad_records(counts: Mapping[str, int], first: Sequence[str]) -> list[tuple[str, str]]:
    """Describe the records of the corpus that were omitted, as rows of a table; none if there are none."""
    if not counts:
        return []
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))
    more = sum(counts.values()) - len(first)
    names = [*first, f"and {more:,} more"] if more else first
    return [("records left out", reasons), *[("", name) for name in names]]


def _state(plan: HarvestPlan, with_tokens: int, committed: int) -> State:
    # Receipts before tokens: what they say is later in a harvest's life, and tokens may be missing by damage.
    if committed == plan.units:
        return "harvested"
    if committed:
        return "harvesting"
    return "planned" if with_tokens == plan.units else "planning"
