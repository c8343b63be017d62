"""Several aligned datasets read as one; their hooks are `NAME/HOOK`. NumPy only.

Letters: B rows in a batch, D d_model, T context length, W windows in a unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from winnow.common.closing import Closing
from winnow.schemas.base import canonical_json, sha256_hex
from winnow.schemas.config import StorageSpec
from winnow.schemas.harvest import HarvestManifest
from winnow.schemas.joined import JoinedPlan, difference, hooks_by_root, not_aligned
from winnow.schemas.readings import RowsSpec
from winnow.schemas.stream import StreamState
from winnow.store.format.order import LaneOrder
from winnow.store.objects import ObjectStore, open_store
from winnow.store.read.assemble import RowBatch
from winnow.store.read.reader import ActivationStore, load_plan, load_token_digests
from winnow.store.read.readings import Reading
from winnow.store.read.stream import Rows


def open_roots(
    root: str,
    roots: Mapping[str, str] | None,
    storage: StorageSpec | None = None,
    *,
    follow: bool = False,
    timeout_seconds: float = 600.0,
) -> ActivationStore:
    """Open the dataset at `root`, or, if there are `roots`, those as one; see `ActivationStore.open`.

    Raises:
        PlanMismatch: Two of `roots` are not aligned; the first difference is named.
    """
    options: dict[str, Any] = {"follow": follow, "timeout_seconds": timeout_seconds}
    if not roots:
        return ActivationStore.open(root, storage, **options)
    # Plans first: datasets that are not aligned are refused before the receipts of any are read.
    if not follow:
        _require_aligned({name: open_store(uri, storage) for name, uri in roots.items()})
    return JoinedStore({name: ActivationStore.open(uri, storage, **options) for name, uri in roots.items()})


def _require_aligned(stores: Mapping[str, ObjectStore]) -> None:
    """Raise PlanMismatch unless the plans are aligned; names the first unit whose tokens differ."""
    plans = {name: load_plan(stores[name]) for name in sorted(stores)}
    first, *others = plans
    for other in others:
        found = difference(plans[first], plans[other])
        if found is None or found[0] != "tokens_sha256":
            continue
        one, two = (load_token_digests(stores[name], plans[name]) for name in (first, other))
        unit = int(np.flatnonzero((one != two).any(axis=1))[0])
        digests = one[unit].tobytes().hex(), two[unit].tobytes().hex()
        raise not_aligned(first, other, f"tokens of unit {unit}", *digests)
    JoinedPlan.of(plans)


class JoinedStore(ActivationStore):
    """Aligned datasets as one, with the interface of each: row i is the same token in all of them.

    A row's weight is the product of its weights, so a sink or a void unit of one has weight 0 in all.

    Args:
        parts: Name -> the dataset.

    Raises:
        PlanMismatch: They are not aligned; the first difference is named.
    """

    def __init__(self, parts: Mapping[str, ActivationStore]) -> None:
        self.parts = {name: parts[name] for name in sorted(parts)}
        """Name -> the dataset, in the order of the names."""
        self._joined = JoinedPlan.of({name: part.plan for name, part in self.parts.items()})
        first = next(iter(self.parts.values()))
        super().__init__(first.store, self._joined, None, first.index)
        followed = [part.arrivals for part in self.parts.values() if part.arrivals is not None]
        self.arrivals = followed[0] if followed else None

    def _reading(self, rows: RowsSpec) -> Reading:
        # Of one of them for all: the tokens are the same, so the labels of the others need not be read.
        return self.datasets[0]._reading(rows)

    def _restricted(self, reading: Reading | None) -> ActivationStore:
        made = JoinedStore({name: part._restricted(reading) for name, part in self.parts.items()})
        made.reading = reading
        return made

    @property
    def datasets(self) -> tuple[ActivationStore, ...]:
        """The datasets that are joined."""
        return tuple(self.parts.values())

    @property
    def manifest(self) -> HarvestManifest:
        """There is none: ask the parts."""
        raise TypeError("joined datasets have a manifest each")

    @property
    def dataset_sha256(self) -> str | None:
        """The digest of all names and digests; None while one is not sealed."""
        digests = {name: part.dataset_sha256 for name, part in self.parts.items()}
        return None if None in digests.values() else sha256_hex(canonical_json(digests))

    def part_of(self, hook: str) -> tuple[ActivationStore, str]:
        """Find the dataset that a hook belongs to, and the hook's name there; ConfigError if none has it."""
        self._joined.d_model(hook)
        name, _, own = hook.rpartition("/")
        return self.parts[name], own

    def read_rows(self, hook: str, start: int, stop: int) -> NDArray[np.float32]:
        """See `ActivationStore.read_rows`."""
        part, own = self.part_of(hook)
        return part.read_rows(own, start, stop)

    def unit_tokens(self, unit: int) -> NDArray[np.uint32]:
        """See `ActivationStore.unit_tokens`; the tokens are the same in all of them."""
        return self.datasets[0].unit_tokens(unit)

    def positions(self, windows: Sequence[int]) -> NDArray[np.int64] | None:
        """There are none: ask the parts, which may attend differently."""
        raise TypeError(f"joined datasets have positions each: ask the parts for those of {len(windows)}")

    def weights(self, hooks: Sequence[str], start: int, stop: int) -> NDArray[np.float32]:
        """See `ActivationStore.weights`."""
        found = [part.weights(own, start, stop) for part, own in self._parts_of(hooks)]
        return np.prod(found, axis=0, dtype=np.float32)

    def window_weights(self, hooks: Sequence[str], windows: Sequence[int]) -> NDArray[np.float32]:
        """See `ActivationStore.window_weights`."""
        found = [part.window_weights(own, windows) for part, own in self._parts_of(hooks)]
        return np.prod(found, axis=0, dtype=np.float32)

    def moments(self, hook: str) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
        """See `ActivationStore.moments`."""
        part, own = self.part_of(hook)
        return part.moments(own)

    @property
    def uri(self) -> str:
        """Addresses of the roots, with their names."""
        return "; ".join(f"{name}: {part.uri}" for name, part in self.parts.items())

    def deleted_units(self) -> set[int]:
        """See `ActivationStore.deleted_units`: those of any."""
        return set[int]().union(*(part.deleted_units() for part in self.datasets))

    def _parts_of(self, hooks: Sequence[str]) -> list[tuple[ActivationStore, tuple[str, ...]]]:
        named = self._hooks(hooks)
        return [(self.parts[name], own) for name, own in hooks_by_root(named).items()]

    def open_rows(self, order: LaneOrder, hooks: tuple[str, ...], **options: Any) -> Rows:
        """See `ActivationStore.open_rows`."""
        rows: dict[str, Rows] = {}
        try:
            for name, own in hooks_by_root(self._hooks(hooks)).items():
                rows[name] = self.parts[name].open_rows(order, own, **options)
        except BaseException:
            for opened in rows.values():
                opened.close()
            raise
        return _JoinedRows(rows, self._joined, hooks, order, options.get("split", "train"))


class _JoinedRows(Closing):
    """The batches of several streams of one order, side by side."""

    def __init__(
        self, rows: dict[str, Rows], plan: JoinedPlan, hooks: tuple[str, ...], order: LaneOrder, split: str
    ) -> None:
        self._rows, self._plan, self._hooks, self._split = rows, plan, hooks, split
        self.order = order

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RowBatch:
        batches = {name: next(rows) for name, rows in self._rows.items()}
        first, *others = batches.values()
        # New weights, since a batch's arrays belong to its own stream's run.
        weights = first.weights.copy()
        for other in others:
            # One order and one step give one set of rows: anything else would pair different tokens.
            if other.step != first.step:
                raise RuntimeError(f"streams of one order are at steps {first.step} and {other.step}")
            weights *= other.weights
        found = {
            f"{name}/{hook}": rows for name, batch in batches.items() for hook, rows in batch.rows.items()
        }
        return RowBatch({hook: found[hook] for hook in self._hooks}, weights, first.step)

    @property
    def next_step(self) -> int:
        return next(iter(self._rows.values())).next_step

    @property
    def seconds_waiting(self) -> float:
        return sum(rows.seconds_waiting for rows in self._rows.values())

    @property
    def bytes_read(self) -> int:
        return sum(rows.bytes_read for rows in self._rows.values())

    @property
    def memory_bytes(self) -> int:
        return sum(rows.memory_bytes for rows in self._rows.values())

    def ready(self, seconds: float) -> bool:
        return all(rows.ready(seconds) for rows in self._rows.values())

    def state(self) -> StreamState:
        return self.order.state(self._plan.fingerprint, self._split, self._hooks, self.next_step)

    def close(self) -> None:
        for rows in self._rows.values():
            rows.close()
