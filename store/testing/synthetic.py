"""Synthetic datasets: a plan, tokens and rows that follow from a seed, written through the real writer.

Letters: W windows in a unit, T context length, R rows in a unit, D d_model.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from winnow.common.clock import now
from winnow.schemas.base import sha256_hex
from winnow.schemas.corpus import CorpusSpec, SourceSpec
from winnow.schemas.harvest import (
    Attempt,
    Compress,
    CorpusFacts,
    Dtype,
    Execution,
    HarvestManifest,
    HarvestPlan,
    PlanSpec,
    UnitReceipt,
)
from winnow.schemas.labels import ROLES, SPECIAL, PlannedLabels
from winnow.schemas.subject import HookSite, SubjectIdentity
from winnow.store.format.labels import LABELS, label_digests
from winnow.store.format.layout import philox_key, row_permutation
from winnow.store.format.shards import Stored, to_stored
from winnow.store.objects import ObjectStore
from winnow.store.write.writer import commit_unit, create_dataset, put_labels, put_tokens, seal, tokens_digest

_RowsFn = Callable[[HarvestPlan, int, str], NDArray[np.float32]]
"""(plan, unit, hook) -> float32 [R, D] in stored order."""
VOCABULARY = 500
"""Token ids of synthetic data are below this."""


_SUBJECT = SubjectIdentity(
    model="synthetic",
    architecture="llama",
    weights_sha256=sha256_hex(b"weights"),
    tokenizer_sha256=sha256_hex(b"tokenizer"),
    dtype="float32",
    attention="sdpa",
    layers=4,
    vocabulary=VOCABULARY,
    context_limit=None,
    eos_token_id=0,
)


def make_plan(
    units: int = 3,
    windows_per_unit: int = 64,
    context_length: int = 9,
    hooks: Mapping[str, int] | None = None,
    *,
    drop_leading: int = 1,
    validation_units: int = 1,
    dtype: Dtype = "bfloat16",
    compress: Compress = "none",
    seed: int = 0,
    sink_multiple: float = 10.0,
    adopt_tolerance: float = 0.05,
    labels: bool = False,
) -> HarvestPlan:
    """A valid plan over synthetic tokens (`synthetic_tokens`).

    Args:
        units: All units, including validation.
        windows_per_unit: W, a multiple of 64.
        context_length: T; rows per window are T - drop_leading.
        hooks: Hook -> D; None is `{"resid_post.1": 8}`.
        drop_leading: As in PlanSpec.
        validation_units: As in PlanSpec.
        dtype: As in PlanSpec.
        compress: As in PlanSpec.
        seed: As in PlanSpec; also of the synthetic tokens and rows.
        sink_multiple: As in PlanSpec.
        adopt_tolerance: As in PlanSpec.
        labels: Whether the tokens have labels (`synthetic_labels`); new plans do.
    """
    hooks = hooks or {"resid_post.1": 8}
    digests = _digests(units, windows_per_unit, context_length, seed)
    return HarvestPlan(
        subject=_SUBJECT,
        corpus=CorpusSpec(sources=(SourceSpec(uri="synthetic.txt"),)),
        corpus_facts=CorpusFacts(
            sha256=sha256_hex(b"corpus"), documents=1, tokens=units * windows_per_unit * context_length
        ),
        spec=PlanSpec(
            hooks=tuple(hooks),
            context_length=context_length,
            drop_leading=drop_leading,
            windows_per_unit=windows_per_unit,
            validation_units=validation_units,
            dtype=dtype,
            compress=compress,
            seed=seed,
            sink_multiple=sink_multiple,
            adopt_tolerance=adopt_tolerance,
        ),
        sites=tuple(HookSite(name=name, d_model=width) for name, width in hooks.items()),
        units=units,
        tokens_sha256=sha256_hex(digests.tobytes()),
        labels=_planned_labels(units, windows_per_unit, context_length, seed) if labels else None,
        # Constants, so that equal arguments give equal plan.json: golden files and joins depend on it.
        execution=Execution(
            batch_windows=8, threads_per_actor=1, code_version="0", created="2025-01-01T00:00:00+00:00"
        ),
    )


def synthetic_tokens(plan: HarvestPlan, unit: int) -> NDArray[np.uint32]:
    """[W, T] tokens of one unit of a `make_plan` plan."""
    return _tokens(unit, plan.spec.windows_per_unit, plan.spec.context_length, plan.spec.seed)


def synthetic_digests(plan: HarvestPlan) -> NDArray[np.uint8]:
    """[units, 32] token digests of a `make_plan` plan."""
    spec = plan.spec
    return _digests(plan.units, spec.windows_per_unit, spec.context_length, spec.seed)


def synthetic_labels(plan: HarvestPlan, unit: int) -> dict[str, NDArray[np.generic]]:
    """Label -> [W, T] of one unit of a `make_plan` plan: random, so that a chunk out of place shows."""
    return _labels(unit, plan.spec.windows_per_unit, plan.spec.context_length, plan.spec.seed)


def synthetic_label_digests(plan: HarvestPlan) -> NDArray[np.uint8]:
    """[units, labels, 32] label digests of a `make_plan` plan."""
    units = range(plan.units)
    return np.stack([label_digests(synthetic_labels(plan, unit)) for unit in units])


def _labels(unit: int, windows: int, length: int, seed: int) -> dict[str, NDArray[np.generic]]:
    count = windows * length
    raw = np.random.Philox(key=philox_key("synthetic.labels", seed, unit)).random_raw(count * len(LABELS))
    below = {"role": len(ROLES), "turn": 9, "flags": 8, "source": 1, "document": 1000, "offset": 500}
    drawn = zip(LABELS.items(), raw.reshape(len(LABELS), windows, length), strict=True)
    return {name: (values % below[name]).astype(dtype) for (name, dtype), values in drawn}


def _planned_labels(units: int, windows: int, length: int, seed: int) -> PlannedLabels:
    made = [_labels(unit, windows, length, seed) for unit in range(units)]
    digests = np.stack([label_digests(labels) for labels in made])

    def count(name: str, size: int) -> tuple[int, ...]:
        values = np.concatenate([labels[name].ravel() for labels in made])
        return tuple(np.bincount(values.astype(np.int64), minlength=size).tolist())

    return PlannedLabels(
        roles=ROLES,
        sha256=sha256_hex(digests.tobytes()),
        tokens_by_role=count("role", len(ROLES)),
        tokens_by_source=count("source", 1),
        tokens_by_turn=count("turn", 9),
        special=sum(int((labels["flags"].astype(np.int64) & SPECIAL).sum()) for labels in made),
    )


def _tokens(unit: int, windows: int, length: int, seed: int) -> NDArray[np.uint32]:
    # The raw stream and not `integers`: NumPy may change its distributions, never Philox itself.
    raw = np.random.Philox(key=philox_key("synthetic.tokens", seed, unit)).random_raw(windows * length)
    return (raw % VOCABULARY).astype(np.uint32).reshape(windows, length)


def _digests(units: int, windows: int, length: int, seed: int) -> NDArray[np.uint8]:
    found = [bytes.fromhex(tokens_digest(_tokens(unit, windows, length, seed))) for unit in range(units)]
    return np.frombuffer(b"".join(found), np.uint8).reshape(units, 32)


def planned_rows(plan: HarvestPlan, unit: int, hook: str) -> NDArray[np.float32]:
    """[R, D] the known synthetic rows in *planned* order: normal noise of std 1, exact in bfloat16."""
    key = philox_key("synthetic.rows", plan.spec.seed, unit, hook)
    shape = (plan.rows_per_unit, plan.d_model(hook))
    noise = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
    # The low half cleared is a bfloat16 value, so a test may compare what it reads bit by bit.
    return (noise.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def synthetic_rows(plan: HarvestPlan, unit: int, hook: str) -> NDArray[np.float32]:
    """[R, D] the known synthetic rows in *stored* order: what a reader must give back."""
    return planned_rows(plan, unit, hook)[row_permutation(plan, unit)]


def make_attempt() -> Attempt:
    """An attempt with a random id."""
    return Attempt(
        id=secrets.token_hex(8),
        worker="test",
        seconds=0.0,
        batch_windows=8,
        threads=1,
        device="cpu",
        finished=now(),
    )


def stored_rows(plan: HarvestPlan, unit: int, rows_fn: _RowsFn | None = None) -> dict[str, Stored]:
    """Hook -> [R, D] in the dtype on disk: what `commit_unit` takes."""
    make = rows_fn or synthetic_rows
    return {hook: to_stored(make(plan, unit, hook), plan.spec.dtype) for hook in plan.spec.hooks}


def write_unit(
    store: ObjectStore, plan: HarvestPlan, unit: int, rows_fn: _RowsFn | None = None
) -> UnitReceipt:
    """Commit one unit of a synthetic dataset; `rows_fn` as in `write_dataset`."""
    return commit_unit(
        store,
        plan,
        unit,
        stored_rows(plan, unit, rows_fn),
        tokens_sha256=tokens_digest(synthetic_tokens(plan, unit)),
        attempt=make_attempt(),
    )


def write_plan(store: ObjectStore, plan: HarvestPlan) -> None:
    """Put plan, metadata and tokens of a synthetic dataset."""
    labelled = plan.labels is not None
    create_dataset(store, plan, synthetic_digests(plan), synthetic_label_digests(plan) if labelled else None)
    for unit in range(plan.units):
        if labelled:
            put_labels(store, plan, unit, synthetic_labels(plan, unit))
        put_tokens(store, plan, unit, synthetic_tokens(plan, unit))


def write_dataset(
    store: ObjectStore,
    plan: HarvestPlan,
    rows_fn: _RowsFn | None = None,
    *,
    units: Sequence[int] | None = None,
) -> HarvestManifest | None:
    """Write a whole synthetic dataset.

    Args:
        store: An empty root, or one where an earlier call stopped.
        plan: From `make_plan`.
        rows_fn: Makes rows in stored order; None is `synthetic_rows`.
        units: Commit only these units, and do not seal.

    Returns:
        The manifest, or None if `units` was given.
    """
    write_plan(store, plan)
    for unit in units if units is not None else range(plan.units):
        write_unit(store, plan, unit, rows_fn)
    return seal(store, plan) if units is None else None
