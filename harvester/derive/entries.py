"""Which rows of a dataset a derived one takes, and from where: groups of stored rows, unit by unit.

Letters: R rows of a unit, E entries of a unit, n rows of all entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from winnow.harvester.plan.digests import PlannedUnit
from winnow.schemas.derived import DeriveRule
from winnow.schemas.harvest import HarvestPlan
from winnow.store.format.labels import LABELS
from winnow.store.format.layout import row_permutation
from winnow.store.read.labels import load_label_digests, read_labels
from winnow.store.read.reader import ActivationStore, load_token_digests, read_tokens
from winnow.store.read.readings import Reading


class Entries(NamedTuple):
    """The entries that one unit gives: each a row, or several whose mean is taken."""

    rows: NDArray[np.int64]
    """[n]: their stored rows, entry after entry."""
    starts: NDArray[np.int64]
    """[E]: where each entry begins in `rows`."""
    facts: Mapping[str, NDArray[np.generic]]
    """`token` and every label, [E] each: those of the entry's last token."""

    def __len__(self) -> int:
        return len(self.starts)

    def of(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rows [E, D] of the entries, from those of the unit [R, D]."""
        taken = values[self.rows]
        if len(self.rows) == len(self.starts):
            return taken
        sizes = np.diff(self.starts, append=len(self.rows))
        # In float64, so that the mean of a long turn does not depend on the order of its rows.
        return (np.add.reduceat(taken.astype(np.float64), self.starts) / sizes[:, None]).astype(np.float32)


class EntryFinder:
    """Finds the entries of a dataset's units.

    Rows of weight 0 (sinks of any hook, void units) are left out: a mean must not be one of sinks.

    Args:
        parents: The dataset, and one that is subtracted from it if there is any.
        rule: How rows are chosen and averaged.

    Raises:
        ConfigError: The dataset has no labels, or not this role or source.
    """

    def __init__(self, parents: tuple[ActivationStore, ...], rule: DeriveRule) -> None:
        self._parents, self._rule = parents, rule
        first = parents[0]
        self._plan: HarvestPlan = first.plan
        self._labels = load_label_digests(first.store, first.plan)
        self._tokens = load_token_digests(first.store, first.plan)
        self._reading = None if rule.rows.everything else Reading(first.store, first.plan, rule.rows)

    def of(self, unit: int) -> Entries:
        """Find the entries of a unit, in its stored order, or for means in the order of its tokens."""
        plan, size = self._plan, self._plan.rows_per_unit
        chosen = np.ones(size, np.bool_) if self._reading is None else self._reading.mask(unit).copy()
        for parent in self._parents:
            chosen &= parent.weights(plan.spec.hooks, unit * size, (unit + 1) * size) > 0
        facts = self._facts(unit)
        rows = np.flatnonzero(chosen)
        if self._rule.mean is None:
            return Entries(rows, np.arange(len(rows)), {name: each[rows] for name, each in facts.items()})
        # By planned place: a window's rows are neighbours only there.
        places = row_permutation(plan, unit)
        rows = rows[np.argsort(places[rows])]
        windows = places[rows] // plan.rows_per_window
        keys = [windows, facts["document"][rows]]
        keys += [facts["turn"][rows]] if self._rule.mean == "turn" else []
        begins = np.ones(len(rows), np.bool_)
        begins[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
        starts = np.flatnonzero(begins)
        last = rows[np.append(starts[1:], len(rows)) - 1] if len(rows) else rows
        return Entries(rows, starts, {name: each[last] for name, each in facts.items()})

    def _facts(self, unit: int) -> dict[str, NDArray[np.generic]]:
        """Token and labels of every stored row of a unit, [R] each."""
        # Not `unit_tokens`, which refuses tokens that are no text.
        first = self._parents[0]
        read = {
            "token": read_tokens(first.store, first.plan, unit, self._tokens),
            **read_labels(first.store, first.plan, unit, digests=self._labels),
        }
        order = row_permutation(self._plan, unit)
        drop = self._plan.spec.drop_leading
        return {name: values[:, drop:].reshape(-1)[order] for name, values in read.items()}


def planned_unit(plan: HarvestPlan, facts: Mapping[str, NDArray[np.generic]]) -> PlannedUnit:
    """Make windows of a unit's tokens and labels, [R] each in planned order, of a plan that drops none."""
    shape = (plan.spec.windows_per_unit, plan.spec.context_length)
    return PlannedUnit(
        facts["token"].astype("<u4").reshape(shape),
        {name: facts[name].astype(dtype).reshape(shape) for name, dtype in LABELS.items()},
    )
