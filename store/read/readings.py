"""Readings: the rows of a dataset whose labels fulfil conditions, as masks of units and as counts.

Letters: R rows in a unit, W windows in a unit, T context length.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from winnow.common.cores import usable_cores
from winnow.common.reporter import Progress
from winnow.schemas.base import canonical_json, sha256_hex
from winnow.schemas.errors import ConfigError, IntegrityError, MissingObject, StoreError, WinnowError
from winnow.schemas.harvest import SLICES, HarvestPlan
from winnow.schemas.labels import LAST_TURN, SPECIAL
from winnow.schemas.readings import ReadingCard, RowsSpec
from winnow.store.format.layout import READINGS_DIR, row_permutation
from winnow.store.objects import ObjectStore
from winnow.store.read.labels import load_label_digests, planned_labels, read_labels
from winnow.store.records.commit import settle

_LOG = logging.getLogger("winnow.store")
_THREADS = 8
"""Units whose labels are read at a time from a remote root."""
_MASKS = 256
"""Masks that are kept; a group's lanes are shuffled by several threads, which all want its units' masks."""


def none_held_out(reading: Reading | None) -> WinnowError:
    """Make the error that no held-out row counts: of chosen ones, none is chosen there."""
    if reading is None:
        return IntegrityError("the held-out windows", expected="rows of weight above 0", got="none")
    return ConfigError(
        f"rows: {reading.rows.words}",
        expected="a choice of at least one held-out row",
        got="none",
        fix="`winnow info` shows the tokens of each role, source and turn; a dataset with more validation "
        "units may have such rows",
    )


class Counts(NamedTuple):
    """How many rows of each unit a reading chooses."""

    slices: NDArray[np.uint32]
    """[units, 64]: of each slice."""
    squares: NDArray[np.uint64]
    """[units]: sum over a unit's windows of the square of their chosen rows, from which the order computes
    how often two rows of a batch share a window."""

    @property
    def chosen(self) -> int:
        """Rows of all units."""
        return int(self.slices.sum(dtype=np.int64))

    def to_bytes(self) -> bytes:
        """As they are stored."""
        return self.slices.astype("<u4").tobytes() + self.squares.astype("<u8").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, units: int, *, what: str) -> Counts:
        """Inverse of `to_bytes`; IntegrityError unless the length fits."""
        if len(data) != units * (SLICES * 4 + 8):
            raise IntegrityError(what, expected=f"{units * (SLICES * 4 + 8)} bytes", got=f"{len(data)} bytes")
        slices = np.frombuffer(data, "<u4", units * SLICES).reshape(units, SLICES)
        return cls(slices, np.frombuffer(data, "<u8", units, units * SLICES * 4))


class Reading:
    """A choice of rows of one dataset. Safe to use from threads.

    Args:
        store: The dataset's root.
        plan: Its plan.
        rows: The conditions.

    Raises:
        ConfigError: The dataset has no labels, or not this role or source.
    """

    def __init__(self, store: ObjectStore, plan: HarvestPlan, rows: RowsSpec) -> None:
        self.plan, self.rows, self._store = plan, rows, store
        self._labels = planned_labels(store, plan)
        self._roles = [self._number("role", role, self._labels.roles) for role in rows.roles]
        uris = [source.uri for source in plan.corpus.sources]
        self._sources = [number for source in rows.sources for number in self._numbers_of(source, uris)]
        self._masks: dict[int, NDArray[np.bool_]] = {}
        self._lock = threading.Lock()

    @classmethod
    def _numbers_of(cls, source: int | str, uris: Sequence[str]) -> list[int]:
        """The sources that one entry names: of a URI all, since files may be read by several columns."""
        if isinstance(source, int) and 0 <= source < len(uris):
            return [source]
        cls._number("source", source, uris)
        return [number for number, uri in enumerate(uris) if uri == source]

    @staticmethod
    def _number(what: str, name: object, names: Sequence[str]) -> int:
        if name in names:
            return names.index(cast("str", name))
        raise ConfigError(f"rows.{what}s", expected=f"any of {', '.join(names)}", got=repr(name))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of conditions, plan and labels: the reading's name."""
        parts = [self.rows.model_dump(mode="json"), self.plan.fingerprint, self._labels.sha256]
        return sha256_hex(canonical_json(parts))

    # Masks

    def mask(self, unit: int) -> NDArray[np.bool_]:
        """Mask [R]: the chosen rows of a unit in stored order.

        Raises:
            MissingObject, IntegrityError: The labels are not those that were planned.
        """
        # Under the lock, so that threads that want the same unit read its labels once.
        with self._lock:
            found = self._masks.get(unit)
            if found is None:
                found = self._masks[unit] = self._stored(self._chosen(unit), unit)
                while len(self._masks) > _MASKS:
                    del self._masks[next(iter(self._masks))]
            return found

    @cached_property
    def _digests(self) -> NDArray[np.uint8]:
        return load_label_digests(self._store, self.plan)

    def _stored(self, chosen: NDArray[np.bool_], unit: int) -> NDArray[np.bool_]:
        """By stored row, from the mask of the windows' positions."""
        return chosen.reshape(-1)[row_permutation(self.plan, unit)]

    def _chosen(self, unit: int) -> NDArray[np.bool_]:
        """Mask [W, T - dropped]: the chosen positions of a unit's windows."""
        rows = self.rows
        wanted = {
            "role": bool(rows.roles),
            "turn": bool(rows.turns) and rows.turns != "last",
            "flags": rows.special is not None or rows.turns == "last",
            "source": bool(rows.sources),
            "offset": rows.min_offset > 0,
        }
        names = [name for name, needed in wanted.items() if needed]
        read = read_labels(self._store, self.plan, unit, names, self._digests)
        # Signed and wide, so that any condition's number can be compared.
        labels = {name: values.astype(np.int64) for name, values in read.items()}
        spec = self.plan.spec
        chosen = np.ones((spec.windows_per_unit, spec.context_length), dtype=np.bool_)
        if rows.roles:
            chosen &= np.isin(labels["role"], self._roles)
        if rows.sources:
            chosen &= np.isin(labels["source"], self._sources)
        if rows.min_offset:
            chosen &= labels["offset"] >= rows.min_offset
        if rows.special is not None:
            chosen &= (labels["flags"] & SPECIAL != 0) == rows.special
        if rows.turns == "last":
            chosen &= labels["flags"] & LAST_TURN != 0
        elif rows.turns:
            chosen &= np.isin(labels["turn"], rows.turns)
        return chosen[:, spec.drop_leading :]

    # Counts

    @property
    def _keys(self) -> tuple[str, str]:
        """Keys of the counts and of the card, which names them and is written last."""
        return f"{READINGS_DIR}/{self.digest}.counts", f"{READINGS_DIR}/{self.digest}.json"

    @cached_property
    def counts(self) -> Counts:
        """The rows chosen of each unit: read if any run has counted them, else counted and stored.

        Raises:
            ConfigError: No row of the dataset is chosen.
            MissingObject, IntegrityError: Labels or stored counts are damaged.
        """
        found = self._load()
        if found is None:
            found = self._count()
            self._keep(found)
        if not found.chosen:
            raise ConfigError(
                f"rows: {self.rows.words}",
                expected="a choice of at least one row",
                got=f"none of {self.plan.rows}",
                fix="`winnow info` shows the tokens of each role, source and turn",
            )
        return found

    def require_held_out(self) -> None:
        """Raise ConfigError if no held-out row is chosen, on which a trained SAE could be measured."""
        units = self.plan.split_units("validation")
        if not self.counts.slices[units.start : units.stop].any():
            raise none_held_out(self)

    def _load(self) -> Counts | None:
        counts_key, card_key = self._keys
        try:
            data = self._store.get(card_key, limit=1 << 20)
        except MissingObject:
            return None
        card = ReadingCard.from_json(data, origin=f"{self._store.uri}/{card_key}")
        about = (card.rows, card.plan_fingerprint, card.labels_sha256)
        if about != (self.rows, self.plan.fingerprint, self._labels.sha256):
            raise IntegrityError(
                f"{card_key} is of another reading", expected=self.rows.words, got=card.rows.words
            )
        body = self._store.get(counts_key, limit=self.plan.units * (SLICES * 4 + 8) + 1)
        if sha256_hex(body) != card.counts_sha256:
            raise IntegrityError(
                f"{self._store.uri}/{counts_key}",
                expected=f"sha256 {card.counts_sha256}",
                got=sha256_hex(body),
                fix="Delete both objects of the reading: they are counted again from the labels",
            )
        return Counts.from_bytes(bytes(body), self.plan.units, what=counts_key)

    def _count(self) -> Counts:
        """Count from the labels of every unit."""
        units, slice_rows = self.plan.units, self.plan.rows_per_slice
        slices, squares = np.zeros((units, SLICES), np.uint32), np.zeros(units, np.uint64)

        def count(unit: int) -> None:
            chosen = self._chosen(unit)
            slices[unit] = self._stored(chosen, unit).reshape(SLICES, slice_rows).sum(1)
            squares[unit] = np.square(chosen.sum(1, dtype=np.uint64)).sum()

        threads = _THREADS if self._store.remote else min(_THREADS, usable_cores())
        label = f"counting rows ({self.rows.words})"
        with (
            ThreadPoolExecutor(threads, "winnow-reading") as pool,
            Progress(label, units, "units") as progress,
        ):
            for _ in pool.map(count, range(units)):
                progress.advance(1)
        return Counts(slices, squares)

    def _keep(self, counts: Counts) -> None:
        counts_key, card_key = self._keys
        body = counts.to_bytes()
        card = ReadingCard(
            rows=self.rows,
            plan_fingerprint=self.plan.fingerprint,
            labels_sha256=self._labels.sha256,
            counts_sha256=sha256_hex(body),
            chosen=counts.chosen,
        )
        try:
            # The card last: where it is, the counts are.
            for key, data in ((counts_key, body), (card_key, card.to_json())):
                stored = settle(self._store, key, data)
                if stored is not None and bytes(stored) != data:
                    raise IntegrityError(
                        f"{self._store.uri}/{key}",
                        expected=f"sha256 {sha256_hex(data)}",
                        got=f"sha256 {sha256_hex(stored)}",
                        fix="Delete it: it is counted again from the labels",
                    )
        except StoreError as error:
            # A dataset that may only be read can still be trained on; the next run counts again.
            _LOG.warning("the counts of the rows chosen could not be stored: %s", error)
