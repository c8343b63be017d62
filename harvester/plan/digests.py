"""Digests of planned units, and counts of their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.labels import COUNTED_TURNS, SPECIAL, PlannedLabels
from winnow.store.format.labels import LABELS, Labels, label_digests
from winnow.store.write.writer import tokens_digest


@dataclass(frozen=True)
class PlannedUnit:
    """What the plan stores of a unit."""

    tokens: NDArray[np.uint32]
    """uint32 little-endian [W, T]."""
    labels: Labels
    """Label -> [W, T]."""


@dataclass(frozen=True)
class PlanDigests:
    """The digests of all units, and how many tokens there are of each kind."""

    tokens: NDArray[np.uint8]
    """[units, 32] SHA-256 of each unit's tokens."""
    labels: NDArray[np.uint8]
    """[units, labels, 32] SHA-256 of each unit's labels."""
    roles: tuple[str, ...]
    by_role: NDArray[np.int64]
    by_source: NDArray[np.int64]
    by_turn: NDArray[np.int64]
    special: int

    def planned_labels(self) -> PlannedLabels:
        """What the plan says of the labels."""
        turns = np.trim_zeros(self.by_turn, "b").tolist() or [0]
        return PlannedLabels(
            roles=self.roles,
            sha256=hashlib.sha256(self.labels.tobytes()).hexdigest(),
            tokens_by_role=tuple(self.by_role.tolist()),
            tokens_by_source=tuple(self.by_source.tolist()),
            tokens_by_turn=tuple(turns),
            special=self.special,
        )


def digests_of(units: Iterable[PlannedUnit], roles: tuple[str, ...], sources: int) -> PlanDigests:
    """Read all units once; `sources` is the number of the corpus's sources."""
    tokens, labels = list[bytes](), list[NDArray[np.uint8]]()
    by_role, by_source = np.zeros(len(roles), np.int64), np.zeros(sources, np.int64)
    by_turn, special = np.zeros(COUNTED_TURNS, np.int64), 0
    for unit in units:
        tokens.append(bytes.fromhex(tokens_digest(unit.tokens)))
        labels.append(label_digests(unit.labels))
        by_role += _counts(unit.labels["role"], len(roles))
        by_source += _counts(unit.labels["source"], sources)
        by_turn += _counts(np.minimum(unit.labels["turn"].astype(np.int64), COUNTED_TURNS - 1), COUNTED_TURNS)
        special += int(np.count_nonzero(unit.labels["flags"].astype(np.uint8) & SPECIAL))
    return PlanDigests(
        np.frombuffer(b"".join(tokens), np.uint8).reshape(-1, 32),
        np.array(labels, np.uint8).reshape(-1, len(LABELS), 32),
        roles,
        by_role,
        by_source,
        by_turn,
        special,
    )


def _counts(values: NDArray[np.generic], size: int) -> NDArray[np.int64]:
    return np.bincount(values.ravel().astype(np.int64), minlength=size)
