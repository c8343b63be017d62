"""Digests of planned units, and counts of their labels."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from winnow.common.cores import usable_cores
from winnow.schemas.labels import COUNTED_TURNS, FIRST, SPECIAL, PlannedLabels
from winnow.store.format.labels import LABELS, Labels, label_digests
from winnow.store.write.writer import tokens_digest


@dataclass(frozen=True)
class PlannedUnit:
    """What the plan stores of a unit."""

    tokens: NDArray[np.uint32]
    """uint32 little-endian [W, T]."""
    labels: Labels
    """Label -> [W, T]."""


MakeUnit = Callable[[], PlannedUnit]
"""Makes what the plan stores of a unit, wherever it is called: labels are computed from windows."""


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
    own_bos: int | None

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
            own_bos=self.own_bos,
        )


def digests_of(
    makers: Iterable[MakeUnit], roles: tuple[str, ...], sources: int, *, own_bos: bool = False
) -> PlanDigests:
    """Make every unit once and describe it; as many at a time as there are cores.

    Args:
        makers: Makes each unit, in their order; called by threads.
        roles: Names of the roles.
        sources: Number of the corpus's sources.
        own_bos: Whether windows begin with BOS, some of them with a document's own.
    """
    tokens, labels = list[bytes](), list[NDArray[np.uint8]]()
    by_role, by_source = np.zeros(len(roles), np.int64), np.zeros(sources, np.int64)
    by_turn, special, own = np.zeros(COUNTED_TURNS, np.int64), 0, 0

    def describe(make: MakeUnit) -> _UnitFacts:
        return _facts_of(make(), len(roles), sources)

    for unit in _mapped(describe, makers):
        tokens.append(unit.tokens)
        labels.append(unit.labels)
        by_role += unit.by_role
        by_source += unit.by_source
        by_turn += unit.by_turn
        special += unit.special
        own += unit.first
    return PlanDigests(
        np.frombuffer(b"".join(tokens), np.uint8).reshape(-1, 32),
        np.array(labels, np.uint8).reshape(-1, len(LABELS), 32),
        roles,
        by_role,
        by_source,
        by_turn,
        special,
        own if own_bos else None,
    )


class _UnitFacts(NamedTuple):
    """One unit's part of `PlanDigests`."""

    tokens: bytes
    labels: NDArray[np.uint8]
    by_role: NDArray[np.int64]
    by_source: NDArray[np.int64]
    by_turn: NDArray[np.int64]
    special: int
    first: int
    """Windows that begin with the first token of a document."""


def _facts_of(unit: PlannedUnit, roles: int, sources: int) -> _UnitFacts:
    labels = unit.labels
    return _UnitFacts(
        bytes.fromhex(tokens_digest(unit.tokens)),
        label_digests(labels),
        _counts(labels["role"], roles),
        _counts(labels["source"], sources),
        _counts(np.minimum(labels["turn"], COUNTED_TURNS - 1), COUNTED_TURNS),
        int(np.count_nonzero(labels["flags"].astype(np.uint8, copy=False) & SPECIAL)),
        int(np.count_nonzero(labels["flags"][:, 0].astype(np.uint8) & FIRST)),
    )


def _mapped(describe: Callable[[MakeUnit], _UnitFacts], makers: Iterable[MakeUnit]) -> Iterator[_UnitFacts]:
    """Describe units in threads, and yield in their order."""
    # A bounded number ahead, not `pool.map`, which would read the whole spill file into memory.
    threads = usable_cores()
    waiting: deque[Future[_UnitFacts]] = deque()
    with ThreadPoolExecutor(threads, "winnow-digests") as pool:
        try:
            for make in makers:
                waiting.append(pool.submit(describe, make))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _counts(values: NDArray[np.generic], size: int) -> NDArray[np.int64]:
    return np.bincount(values.ravel().astype(np.int64), minlength=size)
