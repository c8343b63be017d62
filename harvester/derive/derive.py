"""`winnow derive`: a dataset from a dataset, unit by unit, committed as a harvest commits.

Letters: R rows of a unit, D width at a hook.

A rule that keeps every row keeps the parent's windows, tokens and labels. One that regroups rows makes units
of R entries in the order of the parent's units; a unit's tokens and labels are those of its entries.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from winnow.common.clock import now
from winnow.common.figures import count_of, human_bytes
from winnow.common.reporter import Progress, say
from winnow.harvester.derive.entries import Entries, EntryFinder, planned_unit
from winnow.harvester.plan.digests import MakeUnit, PlannedUnit, digests_of
from winnow.schemas.base import sha256_hex, validate
from winnow.schemas.derived import Derivation, DeriveRule
from winnow.schemas.errors import DISTRIBUTION, ConfigError, PlanMismatch, StoreError
from winnow.schemas.harvest import SLICES, Attempt, Dtype, Execution, HarvestManifest, HarvestPlan
from winnow.schemas.joined import difference
from winnow.store.format.layout import PLAN_KEY, row_permutation
from winnow.store.format.shards import Stored, to_stored
from winnow.store.objects import ObjectStore
from winnow.store.read.labels import load_label_digests, read_labels
from winnow.store.read.reader import ActivationStore, load_token_digests, read_tokens, receipts_present
from winnow.store.write.writer import (
    commit_unit,
    commit_void,
    create_dataset,
    put_labels,
    put_tokens,
    seal,
    tokens_digest,
)

_CONTEXT = 8
"""Tokens of a window of regrouped rows, the fewest that a plan may have: a window then means nothing."""


def derive(
    parent: ActivationStore,
    out: ObjectStore,
    rule: DeriveRule,
    *,
    minus: ActivationStore | None = None,
    dtype: Dtype | None = None,
    single_writer: bool = False,
) -> tuple[HarvestPlan, HarvestManifest]:
    """Make every unit of the derived dataset that has no receipt yet, then seal it.

    Memory holds the rows of one unit of each parent and of one unit that is made. Repeated after any
    interruption, it makes the same dataset.

    Args:
        parent: The sealed dataset.
        out: Root of the new one.
        rule: How rows are made; `minus` and `minus_subject` are filled in.
        minus: An aligned dataset of the same hooks and widths, whose rows are subtracted.
        dtype: How rows are stored; None takes the parent's.
        single_writer: See `StorageSpec.single_writer`.

    Raises:
        ConfigError: The rule chooses too few rows or needs labels that the parent lacks, the datasets do not
            fit each other, or the two roots are one.
        PlanMismatch: `out` holds another plan, or the parents are not aligned.
        IntegrityError, MissingObject: A parent no longer holds what was committed.
        StoreError: The store fails the probe, or has too little space.
    """
    if out.uri == parent.uri or (minus is not None and out.uri == minus.uri):
        raise ConfigError("the derived dataset", expected="a root of its own", got=out.uri)
    if minus is not None:
        _check_aligned(parent, minus)
        subtracted = {"minus": minus.dataset_sha256, "minus_subject": minus.plan.subject.weights_sha256}
        rule = rule.model_copy(update=subtracted)
    parents = (parent,) if minus is None else (parent, minus)
    if rule.mean is not None and parent.plan.no_text is not None:
        raise ConfigError(
            f"the mean of each {rule.mean}",
            expected="windows of text",
            got=f"{parent.uri}: {parent.plan.no_text}",
            fix="Take the dataset that it was derived from",
        )
    made = (_Regrouped if rule.regroups else _Kept)(parents, rule, dtype or parent.plan.spec.dtype)
    out.probe(single_writer=single_writer)
    have = receipts_present(out, made.plan) if out.size(PLAN_KEY) is not None else set()
    todo = [unit for unit in range(made.plan.units) if unit not in have]
    _check_room(out, made.plan, len(todo))
    plan = create_dataset(out, made.plan, *made.digests)
    say(f"derive: {len(todo):,} of {count_of(plan.units, 'unit')} to do")
    with Progress("derive", plan.units, "units", plan.units - len(todo)) as bar:
        for unit in todo:
            _commit(out, plan, unit, made)
            bar.advance(1)
    return plan, seal(out, plan)


def _commit(out: ObjectStore, plan: HarvestPlan, unit: int, made: _Kept | _Regrouped) -> None:
    started = time.monotonic()
    planned = made.planned(unit)
    put_tokens(out, plan, unit, planned.tokens)
    put_labels(out, plan, unit, planned.labels)
    rows = made.rows(unit)
    attempt = Attempt(
        id=uuid.uuid4().hex,
        seconds=time.monotonic() - started,
        batch_windows=0,
        threads=1,
        device="none",
        finished=now(),
    )
    tokens = tokens_digest(planned.tokens)
    if rows is None:
        commit_void(
            out, plan, unit, "void in what it was derived from", tokens_sha256=tokens, attempt=attempt
        )
    else:
        commit_unit(out, plan, unit, rows, tokens_sha256=tokens, attempt=attempt)


class _Kept:
    """Rows of the same tokens as the parent's: another dtype, or the difference of two datasets."""

    def __init__(self, parents: tuple[ActivationStore, ...], rule: DeriveRule, dtype: Dtype) -> None:
        self._parents, first = parents, parents[0]
        labels = None if first.plan.labels is None else load_label_digests(first.store, first.plan)
        self.digests = load_token_digests(first.store, first.plan), labels
        self.plan = _plan(first, rule, {"dtype": dtype}, {}, 0)
        """The plan of the derived dataset."""

    def planned(self, unit: int) -> PlannedUnit:
        """Read the tokens and labels of a unit."""
        first = self._parents[0]
        tokens, labels = self.digests
        return PlannedUnit(
            read_tokens(first.store, first.plan, unit, tokens),
            {} if labels is None else read_labels(first.store, first.plan, unit, digests=labels),
        )

    def rows(self, unit: int) -> dict[str, Stored] | None:
        """Make the rows of a unit, hook -> [R, D]; None if a parent has none."""
        if any(parent.index.void[unit] for parent in self._parents):
            return None
        return {
            hook: to_stored(_read(self._parents, hook, unit), self.plan.spec.dtype)
            for hook in self.plan.spec.hooks
        }


class _Regrouped:
    """Chosen rows, or means of rows, in units of their own."""

    def __init__(self, parents: tuple[ActivationStore, ...], rule: DeriveRule, dtype: Dtype) -> None:
        self._parents, parent = parents, parents[0].plan
        self._finder = EntryFinder(parents, rule)
        with Progress("choosing rows", parent.units, "units") as bar:
            self._counts = np.zeros(parent.units, np.int64)
            for unit in range(parent.units):
                self._counts[unit] = len(self._finder.of(unit))
                bar.advance(1)
        splits = [parent.split_units(split) for split in ("validation", "train")]
        found = [int(self._counts[units.start : units.stop].sum()) for units in splits]
        # A multiple of the slices in windows; no larger than what is held out, which fills a unit at least.
        step = SLICES * _CONTEXT
        size = min(parent.rows_per_unit, *found) // step * step
        if not size:
            raise ConfigError(
                f"rows: {rule.words}",
                expected=f"at least {step} held-out and {step} training entries",
                got=f"{found[0]} and {found[1]}",
                fix="Choose more rows, or derive from a larger dataset",
            )
        held, train = (count // size for count in found)
        self._units = [
            (split, number * size) for split, count in ((0, held), (1, train)) for number in range(count)
        ]
        self._splits, self._size = splits, size
        # Of the parent's unit that was read last.
        self._found: tuple[int, Entries] | None = None
        self._values: tuple[int, dict[str, NDArray[np.float32]]] = (-1, {})
        geometry = {
            "context_length": _CONTEXT,
            "drop_leading": 0,
            "windows_per_unit": size // _CONTEXT,
            "validation_units": held,
            "train_units": train,
            "dtype": dtype,
        }
        labels = parent.labels
        assert labels is not None, "the finder has read them"
        digests = digests_of(self._all(geometry), labels.roles, len(parent.corpus.sources))
        self.digests = digests.tokens, digests.labels
        facts = {
            "units": held + train,
            "tokens_sha256": sha256_hex(digests.tokens.tobytes()),
            "labels": digests.planned_labels(),
        }
        self.plan = _plan(parents[0], rule, geometry, facts, sum(found) - (held + train) * size)
        """The plan of the derived dataset."""

    def _all(self, geometry: dict[str, Any]) -> Iterator[MakeUnit]:
        spec = self._parents[0].plan.spec.model_copy(update=geometry)
        plan = self._parents[0].plan.model_copy(update={"spec": spec})
        return (partial(planned_unit, plan, self._facts(unit)) for unit in range(len(self._units)))

    def planned(self, unit: int) -> PlannedUnit:
        """Make the tokens and labels of a unit."""
        return planned_unit(self.plan, self._facts(unit))

    def rows(self, unit: int) -> dict[str, Stored]:
        """Make the rows of a unit, hook -> [R, D] in stored order."""
        parts: dict[str, list[NDArray[np.float32]]] = {hook: [] for hook in self.plan.spec.hooks}
        for number, entries, low, high in self._parts(unit):
            for hook, values in self._made(number, entries).items():
                parts[hook].append(values[low:high])
        order, dtype = row_permutation(self.plan, unit), self.plan.spec.dtype
        return {hook: to_stored(np.concatenate(each)[order], dtype) for hook, each in parts.items()}

    def _made(self, number: int, entries: Entries) -> dict[str, NDArray[np.float32]]:
        """The entries' rows of one of the parent's units, hook -> [E, D]."""
        # Kept: the next unit begins where this one ends, mostly inside the same unit of the parent.
        if self._values[0] != number:
            made = {hook: entries.of(_read(self._parents, hook, number)) for hook in self.plan.spec.hooks}
            self._values = number, made
        return self._values[1]

    def _facts(self, unit: int) -> dict[str, NDArray[np.generic]]:
        parts = [
            {name: values[low:high] for name, values in entries.facts.items()}
            for _, entries, low, high in self._parts(unit)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _parts(self, unit: int) -> Iterator[tuple[int, Entries, int, int]]:
        """Yield the parent's units that a unit is made of, with the range of entries taken of each."""
        split, begin = self._units[unit]
        units = self._splits[split]
        ends = np.cumsum(self._counts[units.start : units.stop])
        end = begin + self._size
        for place in range(int(np.searchsorted(ends, begin, side="right")), len(ends)):
            first = int(ends[place]) - int(self._counts[units.start + place])
            if first >= end:
                return
            number = units.start + place
            if count := int(self._counts[number]):
                yield number, self._entries(number), max(begin - first, 0), min(end - first, count)

    def _entries(self, number: int) -> Entries:
        if self._found is None or self._found[0] != number:
            self._found = number, self._finder.of(number)
        return self._found[1]


def _read(parents: tuple[ActivationStore, ...], hook: str, unit: int) -> NDArray[np.float32]:
    """Rows [R, D] of a unit of the parent, less those of the one that is subtracted."""
    size = parents[0].plan.rows_per_unit
    first, *others = (parent.read_rows(hook, unit * size, (unit + 1) * size) for parent in parents)
    for other in others:
        first -= other
    return first


def _check_aligned(parent: ActivationStore, minus: ActivationStore) -> None:
    found = difference(parent.plan, minus.plan)
    if found is not None:
        field, expected, got = found
        raise PlanMismatch(
            f"{minus.uri} is not aligned with {parent.uri}: {field}",
            expected=expected,
            got=got,
            fix="Harvest one on the other's windows (plan.tokens_from)",
        )
    for site in parent.plan.sites:
        width = minus.plan.d_model(site.name)
        if width != site.d_model:
            raise ConfigError(
                f"the width D at {site.name} of {minus.uri}",
                expected=f"{site.d_model}, as in {parent.uri}",
                got=width,
            )


def _plan(
    parent: ActivationStore, rule: DeriveRule, geometry: dict[str, Any], facts: dict[str, Any], left_out: int
) -> HarvestPlan:
    """The plan of a derived dataset: the parent's, with other units and with where its rows come from."""
    plan, digest = parent.plan, parent.dataset_sha256
    assert digest is not None, "an unsealed dataset cannot be opened without `follow`"
    before = () if plan.derived is None else plan.derived.rules
    made = plan.model_copy(
        update={
            **facts,
            "spec": plan.spec.model_copy(update=geometry),
            "derived": Derivation(parent=digest, rule=rule, earlier=before, left_out=left_out),
            "execution": Execution(
                batch_windows=1,
                threads_per_actor=1,
                code_version=metadata.version(DISTRIBUTION),
                created=now(),
            ),
        }
    )
    # A copy is not validated, and keeps the parent's cached fingerprint.
    return validate(HarvestPlan, made.model_dump(mode="json"), origin="the derived plan")


def _check_room(out: ObjectStore, plan: HarvestPlan, units: int) -> None:
    need, free = units * sum(plan.shard_bytes(site.name) for site in plan.sites), out.free_bytes()
    if free is not None and need > free:
        raise StoreError(
            f"disk of {out.uri} is too small",
            expected=f"{human_bytes(need)} free",
            got=human_bytes(free),
            fix="Free space, or choose another root",
        )
