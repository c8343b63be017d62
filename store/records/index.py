"""The receipts in columns: small enough for 100,000 units in memory, checked against the plan.

Letters: D d_model, R rows in a unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.errors import IntegrityError, MissingObject
from winnow.schemas.harvest import MOMENT_UNITS, SLICES, HarvestPlan, Moments, UnitReceipt
from winnow.store.format.layout import receipt_key, shard_key, slice_bytes, slice_starts
from winnow.store.format.shards import INDEX_BYTES, packed_bound


@dataclass
class _HookColumns:
    """One hook's facts by unit."""

    crc32c: NDArray[np.uint32]
    """[units, 64] checksum of each slice's payload as stored."""
    lengths: NDArray[np.uint32] | None = None
    """[units, 64] bytes of each slice's payload as stored; None if the plan does not compress."""
    sinks: dict[int, NDArray[np.int64]] = field(default_factory=dict[int, "NDArray[np.int64]"])
    """Unit -> stored rows of weight 0, ascending; units without any are absent."""
    sum_squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """[units] sum of squares over all rows."""
    moments: dict[int, Moments] = field(default_factory=dict[int, Moments])
    """Unit -> per-dimension sums, for the first units only."""


class UnitColumns(NamedTuple):
    """Facts of consecutive units in columns; hooks are sorted by name.

    Letters: n units, h of them with data, H hooks.
    """

    units: NDArray[np.int64]
    """[n] unit numbers."""
    held: NDArray[np.bool_]
    """[n] False for void units."""
    revision: NDArray[np.int32]
    """[n]"""
    token_sha256: NDArray[np.uint8]
    """[n, 32]"""
    content_sha256: list[str]
    """[n] digest of each receipt's content."""
    crc32c: NDArray[np.uint32]
    """[h, H, 64]"""
    lengths: NDArray[np.uint32] | None
    """[h, H, 64]; None if the plan does not compress."""
    sum_squares: NDArray[np.float64]
    """[h, H]"""
    sinks: list[NDArray[np.int64]] | None
    """[h * H] marked rows; None if no unit has any."""


class ReceiptIndex:
    """The receipts of a dataset in columns.

    A unit is *present* once its receipt was added, and *void* if the receipt says that it has no data.

    Args:
        plan: The dataset's plan; every receipt is checked against it.
    """

    def __init__(self, plan: HarvestPlan) -> None:
        self.plan = plan
        self.present = np.zeros(plan.units, dtype=np.bool_)
        self.void = np.zeros(plan.units, dtype=np.bool_)
        self.revision = np.zeros(plan.units, dtype=np.int32)
        self.token_sha256 = np.zeros((plan.units, 32), dtype=np.uint8)
        shape, packed = (plan.units, SLICES), plan.spec.compress != "none"
        self.hooks = {
            name: _HookColumns(
                crc32c=np.zeros(shape, dtype=np.uint32),
                lengths=np.zeros(shape, dtype=np.uint32) if packed else None,
                sum_squares=np.zeros(plan.units),
            )
            for name in plan.spec.hooks
        }

    @classmethod
    def of(cls, plan: HarvestPlan, receipts: Iterable[UnitReceipt]) -> ReceiptIndex:
        """Make the index of these receipts."""
        index = cls(plan)
        for receipt in receipts:
            index.add(receipt)
        return index

    def add(self, receipt: UnitReceipt) -> None:
        """Check a receipt against the plan and add it.

        Raises:
            IntegrityError: The receipt is of another plan, or its facts don't fit the plan.
        """
        plan = self.plan
        check_receipt(plan, receipt)
        unit = receipt.unit
        self.void[unit] = receipt.void is not None
        self.revision[unit] = receipt.revision
        self.token_sha256[unit] = np.frombuffer(bytes.fromhex(receipt.tokens_sha256), dtype=np.uint8)
        for hook, shard in receipt.shards.items():
            columns = self.hooks[hook]
            columns.crc32c[unit] = shard.slice_crc32c
            if columns.lengths is not None:
                columns.lengths[unit] = shard.slice_lengths
            columns.sum_squares[unit] = shard.sum_squares
            # A revision after a repair may mark no rows, where the one before it did.
            columns.sinks.pop(unit, None)
            if shard.sinks:
                columns.sinks[unit] = np.asarray(shard.sinks, dtype=np.int64)
            if shard.moments is not None:
                columns.moments[unit] = shard.moments
        # Last: until it is set, no reader of a followed dataset looks at the unit's other columns.
        self.present[unit] = True

    def add_columns(self, columns: UnitColumns) -> None:
        """Add many units at once, without their moments; they were checked against the plan before."""
        units = columns.units[columns.held]
        self.present[columns.units] = True
        self.void[columns.units] = ~columns.held
        self.revision[columns.units] = columns.revision
        self.token_sha256[columns.units] = columns.token_sha256
        for number, hook in enumerate(sorted(self.hooks)):
            self.hooks[hook].crc32c[units] = columns.crc32c[:, number]
            held = self.hooks[hook].lengths
            if held is not None and columns.lengths is not None:
                held[units] = columns.lengths[:, number]
            self.hooks[hook].sum_squares[units] = columns.sum_squares[:, number]
            if columns.sinks is not None:
                lists = columns.sinks[number :: len(self.hooks)]
                found = {unit: rows for unit, rows in zip(units.tolist(), lists, strict=True) if rows.size}
                self.hooks[hook].sinks.update(found)

    def require(self, units: Sequence[int]) -> None:
        """Raise MissingObject unless every one of `units` has a receipt."""
        chosen = np.asarray(units, dtype=np.int64)
        missing = chosen[~self.present[chosen]]
        if missing.size:
            raise MissingObject(
                f"{missing.size} units have no receipt, the first is unit {int(missing[0])}",
                expected=receipt_key(int(missing[0])),
                fix="Run `winnow harvest` again: it harvests what is missing",
            )

    def starts(self, hook: str, unit: int) -> NDArray[np.int64]:
        """[65] offset of each slice of a unit's shard, and the last one's end."""
        lengths = self.hooks[hook].lengths
        return slice_starts(self.plan, hook, () if lengths is None else lengths[unit].tolist())

    def sinks(self, hook: str, unit: int) -> NDArray[np.int64]:
        """Stored rows of a unit that one hook marks, ascending."""
        return self.hooks[hook].sinks.get(unit, _NONE)

    def weights(self, hooks: Sequence[str], unit: int) -> NDArray[np.float32]:
        """[R] weight of each stored row: 0 at sinks of any of the hooks and in void units, otherwise 1."""
        rows = self.plan.rows_per_unit
        if self.void[unit]:
            return np.zeros(rows, dtype=np.float32)
        weights = np.ones(rows, dtype=np.float32)
        for hook in hooks:
            weights[self.sinks(hook, unit)] = 0
        return weights


_NONE = np.zeros(0, dtype=np.int64)


def check_receipt(plan: HarvestPlan, receipt: UnitReceipt) -> None:
    """Refuse a receipt that does not fit the plan.

    Raises:
        IntegrityError: It names the unit, the field, what the plan expects and what was found.
    """
    unit = receipt.unit
    name = f"receipt of unit {unit}"
    # The fingerprint first: of another plan's receipt, every later message would mislead.
    _same(f"{name}: plan_fingerprint", plan.fingerprint, receipt.plan_fingerprint)
    if unit >= plan.units:
        raise IntegrityError(name, expected=f"a unit below {plan.units}", got=unit)
    if receipt.void is not None:
        _same(f"{name} (void): shards", (), tuple(receipt.shards))
        return
    _same(f"{name}: hooks", sorted(plan.spec.hooks), sorted(receipt.shards))
    for hook, shard in receipt.shards.items():
        where = f"{name}, hook {hook}"
        # Receipts from elsewhere are hostile input: a key of their own could name any object of the root.
        _same(f"{where}: key", shard_key(hook, unit), shard.key)
        if plan.spec.compress == "none":
            _same(f"{where}: slice_lengths", (), shard.slice_lengths)
        else:
            _same(f"{where}: slice_lengths", SLICES, len(shard.slice_lengths))
            # Before a buffer of that length is allocated.
            most = packed_bound(slice_bytes(plan, hook) - 4)
            if max(shard.slice_lengths) > most:
                raise IntegrityError(
                    f"{where}: slice_lengths", expected=f"at most {most}", got=max(shard.slice_lengths)
                )
        size = int(slice_starts(plan, hook, shard.slice_lengths)[-1]) + INDEX_BYTES
        _same(f"{where}: bytes", size, shard.bytes)
        sinks = np.asarray(shard.sinks, dtype=np.int64)
        if sinks.size and (sinks[-1] >= plan.rows_per_unit or np.any(np.diff(sinks) <= 0)):
            raise IntegrityError(
                f"{where}: sinks", expected=f"ascending rows below {plan.rows_per_unit}", got=shard.sinks[:8]
            )
        if shard.moments is None:
            if unit < MOMENT_UNITS:
                raise IntegrityError(f"{where}: moments", expected="per-dimension sums", got=None)
            continue
        width = plan.d_model(hook)
        _same(f"{where}: moments.sums length", width, len(shard.moments.sums))
        _same(f"{where}: moments.squares length", width, len(shard.moments.squares))


def _same(what: str, expected: object, got: object) -> None:
    if expected != got:
        raise IntegrityError(what, expected=expected, got=got)
