"""Reading a dataset: its plan, receipts, tokens and rows, every byte checked. NumPy only.

Letters: D d_model, T context length, W windows in a unit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.base import MAX_JSON_BYTES, sha256_hex
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError, IntegrityError, MissingObject
from winnow.schemas.harvest import MOMENT_UNITS, SLICES, HarvestManifest, HarvestPlan, UnitReceipt
from winnow.schemas.readings import RowsSpec
from winnow.schemas.service import STATUS_KEY
from winnow.schemas.sets import CARD_KEY, SET_KEY
from winnow.store.format import layout
from winnow.store.format.labels import LABELS
from winnow.store.format.order import LaneOrder
from winnow.store.format.reading_order import ReadingOrder
from winnow.store.format.shards import decode_chunk, to_float32
from winnow.store.objects import ObjectStore, open_store
from winnow.store.read.cache import SliceCache
from winnow.store.read.fetch import fetch_slices
from winnow.store.read.follow import Arrivals, deleted_units, wait_for_plan
from winnow.store.read.labels import load_label_digests, read_labels, window_positions
from winnow.store.read.readings import Reading
from winnow.store.records.commit import list_receipts, load_receipt
from winnow.store.records.index import ReceiptIndex
from winnow.store.records.manifest import find_manifest, load_index, load_manifest

if TYPE_CHECKING:
    from winnow.store.read.stream import Rows
    from winnow.store.read.torch_stream import Stream

# A plan from elsewhere may claim any size: nothing larger is allocated for it.
MAX_TOKEN_CHUNK_BYTES = 1 << 30
"""Largest chunk of tokens or token digests that is read, in bytes."""
CHOSEN_MOMENT_ROWS = 1 << 18
"""Rows of a reading, about, from which mean and variance are taken: receipts describe all rows only."""


def load_plan(store: ObjectStore) -> HarvestPlan:
    """Read the plan of the dataset at this root.

    Raises:
        ConfigError: There is no dataset.
        IntegrityError, UnsupportedVersion: It cannot be read, or only it is missing.
    """
    try:
        data = store.get(layout.PLAN_KEY, limit=MAX_JSON_BYTES)
    except MissingObject as error:
        # Receipts are of some plan. Another one, made in this place, would never fit them.
        if next(store.list(layout.RECEIPTS_DIR), None) is not None:
            raise IntegrityError(
                f"{store.uri}/{layout.PLAN_KEY} is missing, which a dataset with receipts has",
                fix="Put back a copy of it; `winnow plan` with the same config makes the same plan again",
            ) from error
        got, fix = "nothing there", "Check the root, or run `winnow plan` and `winnow harvest` first"
        if any(store.size(key) is not None for key in (CARD_KEY, SET_KEY)):
            got, fix = "an SAE", "Name the dataset that it was trained on, the config's `root`"
        elif store.size(STATUS_KEY) is not None:
            got, fix = "a run that has published no SAE yet", f"`winnow watch {store.uri}` shows it"
        raise ConfigError(f"{store.uri} holds no dataset", expected="plan.json", got=got, fix=fix) from error
    return HarvestPlan.from_json(data, origin=f"{store.uri}/{layout.PLAN_KEY}")


def load_token_digests(store: ObjectStore, plan: HarvestPlan) -> NDArray[np.uint8]:
    """uint8 [units, 32]: SHA-256 of every unit's token chunk, checked against the plan.

    Raises:
        MissingObject: They do not exist: planning has not finished.
        IntegrityError: They differ from the plan's digest.
    """
    key = f"{layout.TOKEN_DIGESTS_ARRAY}/c/0/0"
    try:
        data = store.get(key, limit=MAX_TOKEN_CHUNK_BYTES)
    except MissingObject as error:
        raise MissingObject(
            f"{store.uri} lacks its token digests", expected=key, fix="Run `winnow plan` again"
        ) from error
    digests = decode_chunk(data, "u1", (plan.units, 32), what="token digests")
    found = sha256_hex(digests.tobytes())
    if found != plan.tokens_sha256:
        raise IntegrityError("token digests", expected=f"sha256 {plan.tokens_sha256}", got=found)
    return digests


def read_tokens(
    store: ObjectStore, plan: HarvestPlan, unit: int, digests: NDArray[np.uint8] | None = None
) -> NDArray[np.uint32]:
    """uint32 [W, T]: a unit's tokens, checked against the plan.

    Args:
        store: The dataset's root.
        plan: Its plan.
        unit: The unit's number.
        digests: Result of `load_token_digests`, to load it once for many units.

    Raises:
        MissingObject: The chunk does not exist.
        IntegrityError: The tokens differ from those that were planned.
    """
    if digests is None:
        digests = load_token_digests(store, plan)
    key, what = layout.tokens_key(unit), f"tokens of unit {unit}"
    try:
        data = store.get(key, limit=MAX_TOKEN_CHUNK_BYTES)
    except MissingObject as error:
        raise MissingObject(f"{what} are missing", expected=key, fix="Run `winnow plan` again") from error
    shape = (plan.spec.windows_per_unit, plan.spec.context_length)
    tokens: NDArray[np.uint32] = decode_chunk(data, "<u4", shape, what=what)
    # The chunk's crc32c guards against accidents only; the digest ties the tokens to the plan.
    expected, found = digests[unit].tobytes().hex(), sha256_hex(tokens.tobytes())
    if found != expected:
        raise IntegrityError(what, expected=f"sha256 {expected}", got=found)
    return tokens


# Receipts


def receipts_present(store: ObjectStore, plan: HarvestPlan) -> dict[int, int]:
    """Find unit -> highest revision of its receipt, by one listing; no receipt is read."""
    return list_receipts(store, plan)


def read_receipt(store: ObjectStore, plan: HarvestPlan, unit: int, revision: int = 0) -> UnitReceipt:
    """Read a unit's receipt, checked against the plan.

    Raises:
        MissingObject: The unit has no such receipt.
        IntegrityError, UnsupportedVersion: It cannot be read or does not fit the plan.
    """
    return load_receipt(store, plan, unit, revision)


class ActivationStore:
    """A sealed dataset, for reading. Safe to use from threads.

    Open one with `ActivationStore.open(uri)`; every error it raises is a `WinnowError`.
    """

    def __init__(
        self,
        store: ObjectStore,
        plan: HarvestPlan,
        manifest: HarvestManifest | None,
        index: ReceiptIndex,
        arrivals: Arrivals | None = None,
        cache: SliceCache | None = None,
    ) -> None:
        self.store = store
        """The root."""
        self.plan = plan
        """The dataset's plan."""
        self.index = index
        """Its receipts, in columns; of a followed dataset, only those that were needed so far."""
        self.arrivals = arrivals
        """Waits for receipts while the dataset is harvested; None if it is sealed."""
        self.cache = cache
        """Keeps slices on a local disk; None if all come from storage."""
        self._manifest = manifest
        self._digests: NDArray[np.uint8] | None = None
        self._label_digests: NDArray[np.uint8] | None = None
        self._chosen_moments: dict[str, tuple[int, NDArray[np.float64], NDArray[np.float64]]] = {}
        self.reading: Reading | None = None
        """The choice of rows that this handle is restricted to; None for all. See `only`."""

    def only(self, rows: RowsSpec) -> ActivationStore:
        """The same dataset restricted to the rows that `rows` chooses by their tokens' labels.

        Streams yield chosen rows only; `weights` and `window_weights` are 0 elsewhere; `mean` and `variance`
        are those of chosen rows. Rows keep their numbers, and `read_rows` reads any.

        Raises:
            ConfigError: The dataset has no labels, or not this role or source.
        """
        if rows == (self.reading.rows if self.reading else RowsSpec()):
            return self
        return self._restricted(None if rows.everything else self._reading(rows))

    def _reading(self, rows: RowsSpec) -> Reading:
        return Reading(self.store, self.plan, rows)

    def _restricted(self, reading: Reading | None) -> ActivationStore:
        """The same dataset with another reading, or with none."""
        made = ActivationStore(self.store, self.plan, self._manifest, self.index, self.arrivals, self.cache)
        made._digests, made.reading = self._digests, reading
        return made

    @classmethod
    def open(
        cls,
        uri: str | os.PathLike[str],
        storage: StorageSpec | None = None,
        *,
        follow: bool = False,
        timeout_seconds: float = 600.0,
    ) -> ActivationStore:
        """Open the dataset at `uri`: verify manifest, receipts and plan against each other.

        No activation is read.

        Args:
            uri: A local path, `file://` or `s3://bucket/prefix`.
            storage: Time-outs, permissions, and a cache folder for remote data.
            follow: Open a dataset that is not sealed, or not even planned yet. Reads then wait for their
                units' receipts; streams yield exactly the batches that they would yield later.
            timeout_seconds: Longest wait, for the plan or while no unit is committed.

        Raises:
            ConfigError: There is no dataset, or it is not sealed (with `follow`: no plan by the time-out).
            IntegrityError, UnsupportedVersion: Its artefacts cannot be read or disagree.
            StoreError: The storage cannot be reached.
        """
        store = open_store(uri, storage)
        opened = cls.over(store, follow=follow, timeout_seconds=timeout_seconds)
        if storage is not None and storage.cache_folder and store.remote:
            opened.cache = SliceCache(storage.cache_folder, storage.cache_bytes, opened.plan)
        return opened

    @classmethod
    def over(
        cls, store: ObjectStore, *, follow: bool = False, timeout_seconds: float = 600.0
    ) -> ActivationStore:
        """Open the dataset of an object store that is open already; otherwise like `open`."""
        if follow:
            wait_for_plan(store, timeout_seconds)
        plan = load_plan(store)
        # Sealed by now: opened like any other, with all receipts from the manifest's parts.
        if follow and find_manifest(store, plan) is None:
            index = ReceiptIndex(plan)
            return cls(store, plan, None, index, Arrivals(store, plan, index, timeout_seconds))
        manifest = load_manifest(store, plan)
        opened = cls(store, plan, manifest, load_index(store, plan, manifest))
        opened._check_tokens()
        return opened

    def _check_tokens(self) -> None:
        """Raise IntegrityError if a receipt is for other tokens than were planned."""
        # A plan fingerprint alone does not show it: rows of other tokens would be sound and meaningless.
        self._digests = load_token_digests(self.store, self.plan)
        other = np.flatnonzero(np.any(self.index.token_sha256 != self._digests, axis=1))
        if other.size:
            raise IntegrityError(
                f"{self.store.uri}: the receipt of unit {int(other[0])} is for other tokens "
                "than were planned",
                expected=f"sha256 {self._digests[other[0]].tobytes().hex()}",
                got=self.index.token_sha256[other[0]].tobytes().hex(),
            )

    @property
    def manifest(self) -> HarvestManifest:
        """The dataset's manifest; ConfigError if it is not sealed yet."""
        # Looked for again while there is none: a followed dataset is sealed in the end.
        if self._manifest is None:
            self._manifest = load_manifest(self.store, self.plan)
        return self._manifest

    @property
    def dataset_sha256(self) -> str | None:
        """The dataset's digest; None while it is not sealed."""
        if self._manifest is None:
            self._manifest = find_manifest(self.store, self.plan)
        return self._manifest.dataset_sha256 if self._manifest else None

    def _await(self, units: Iterable[int]) -> None:
        """Wait for the receipts of some units, if the dataset is followed."""
        if self.arrivals is not None:
            for unit in units:
                self.arrivals.wait(unit)

    @property
    def datasets(self) -> tuple[ActivationStore, ...]:
        """The datasets that are read: this one, or those that were joined."""
        return (self,)

    @property
    def uri(self) -> str:
        """Address of the root."""
        return self.store.uri

    def deleted_units(self) -> set[int]:
        """List the units whose shards a ring has deleted, or was about to."""
        return deleted_units(self.store, self.plan)

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the hooks that were harvested."""
        return self.plan.spec.hooks

    @property
    def rows(self) -> int:
        """Rows of the whole dataset, validation units first."""
        return self.plan.rows

    def d_model(self, hook: str) -> int:
        """Width D at `hook`."""
        return self.plan.d_model(hook)

    def read_rows(self, hook: str, start: int, stop: int) -> NDArray[np.float32]:
        """Read dataset rows in stored order, checked.

        Returns:
            float32 [stop - start, D]; zeros for rows of a void unit, whose `weights` are 0.

        Raises:
            ConfigError: Unknown hook, or rows outside the dataset.
            MissingObject, IntegrityError: Storage no longer has what was committed.
        """
        width = self._check(hook, start, stop)
        out = np.empty((stop - start, width), dtype=np.float32)
        unit_rows, slice_rows = self.plan.rows_per_unit, self.plan.rows_per_slice
        for unit in range(start // unit_rows, -(-stop // unit_rows)):
            self._await((unit,))
            low, high = max(start, unit * unit_rows), min(stop, (unit + 1) * unit_rows)
            target = out[low - start : high - start]
            if self.index.void[unit]:
                target[:] = 0
                continue
            low, high = low - unit * unit_rows, high - unit * unit_rows
            # Whole slices are read even for one row: a crc32c covers a slice, and less cannot be checked.
            first, last = low // slice_rows, -(-high // slice_rows)
            shape = (last - first, slice_rows, self.plan.stored_width(hook))
            stored = np.empty(shape, dtype=layout.STORED_DTYPES[self.plan.spec.dtype])
            places = list(stored.view(np.uint8).reshape(last - first, -1))
            fetch_slices(self.store, self.plan, self.index, hook, unit, first, places, self.cache)
            chosen = stored.reshape(-1, shape[2])[low - first * slice_rows : high - first * slice_rows]
            to_float32(chosen, self.plan.spec.dtype, out=target)
        return out

    def locate(self, rows: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find (window, position in it) of each dataset row; see `winnow.store.format.layout.locate`."""
        return layout.locate(self.plan, np.asarray(rows, dtype=np.int64))

    def tokens(self, window: int) -> NDArray[np.uint32]:
        """Read the token ids of a window of the dataset, uint32 [T], checked."""
        if not 0 <= window < self.plan.windows:
            raise ConfigError("window", expected=f"0 to {self.plan.windows - 1}", got=window)
        unit, number = divmod(int(window), self.plan.spec.windows_per_unit)
        return self.unit_tokens(unit)[number]

    def unit_tokens(self, unit: int) -> NDArray[np.uint32]:
        """Read the token ids of a unit's windows, uint32 [W, T], checked; ConfigError if they are no text."""
        self.require_text()
        if self._digests is None:
            self._digests = load_token_digests(self.store, self.plan)
        return read_tokens(self.store, self.plan, unit, self._digests)

    def unit_labels(self, unit: int, names: Iterable[str] = LABELS) -> dict[str, NDArray[np.generic]]:
        """Read what each token of a unit's windows is: label -> [W, T], checked; see `store.format.labels`.

        ConfigError if the dataset was planned before labels existed. `plan.labels.roles` names the roles.
        """
        if self._label_digests is None:
            self._label_digests = load_label_digests(self.store, self.plan)
        return read_labels(self.store, self.plan, unit, names, self._label_digests)

    def positions(self, windows: Sequence[int]) -> NDArray[np.int64] | None:
        """int64 [len(windows), T]: each token's place in its document, for passes as in the harvest.

        None if a token sees its whole window (`plan.attend`).
        """
        self.require_text()
        return window_positions(self.plan, windows, lambda unit: self.unit_labels(unit, ["document"]))

    def weights(self, hooks: Sequence[str], start: int, stop: int) -> NDArray[np.float32]:
        """float32 [stop - start]: the weight of each row.

        0 at sinks of any of `hooks`, in void units and at rows not chosen (see `only`), otherwise 1.
        """
        hooks = self._hooks(hooks)
        self._check(hooks[0], start, stop)
        unit_rows = self.plan.rows_per_unit
        units = range(start // unit_rows, -(-stop // unit_rows))
        self._await(units)
        parts = [self._unit_weights(hooks, unit) for unit in units]
        whole = np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
        offset = units.start * unit_rows
        return whole[start - offset : stop - offset]

    def window_weights(self, hooks: Sequence[str], windows: Sequence[int]) -> NDArray[np.float32]:
        """float32 [len(windows), T]: the weight of every position of some windows.

        0 at the leading positions that are not stored, at sinks of any of `hooks`, in void units and at rows
        that are not chosen (see `only`), otherwise 1: a splice replaces the activation there.
        """
        hooks = self._hooks(hooks)
        plan, asked = self.plan, np.asarray(windows, dtype=np.int64)
        if asked.size and not 0 <= asked.min() <= asked.max() < plan.windows:
            raise ConfigError("windows", expected=f"0 to {plan.windows - 1}", got=windows)
        out = np.zeros((asked.size, plan.spec.context_length), dtype=np.float32)
        units, numbers = np.divmod(asked, plan.spec.windows_per_unit)
        self._await(np.unique(units).tolist())
        for unit in np.unique(units):
            # Weights are by stored row; a window's rows are neighbours in planned order only.
            planned = np.empty(plan.rows_per_unit, dtype=np.float32)
            planned[layout.row_permutation(plan, int(unit))] = self._unit_weights(hooks, int(unit))
            chosen = units == unit
            by_window = planned.reshape(plan.spec.windows_per_unit, plan.rows_per_window)
            out[chosen, plan.spec.drop_leading :] = by_window[numbers[chosen]]
        return out

    def _unit_weights(self, hooks: tuple[str, ...], unit: int) -> NDArray[np.float32]:
        weights = self.index.weights(hooks, unit)
        return weights if self.reading is None else weights * self.reading.mask(unit)

    def moments(self, hook: str) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
        """Sum over the training rows of weight 1 that the first units' receipts describe.

        Returns:
            (rows, sums float64 [D], sums of squares float64 [D]), raw units.

        Raises:
            ConfigError: Unknown hook, or no training unit among those described.
        """
        if self.reading is not None:
            return self._moments_of_chosen(hook, self.reading)
        # Of the first units only, which is an unbiased sample: windows are shuffled over the whole corpus.
        self._await(range(min(MOMENT_UNITS, self.plan.units)))
        width, held = self.plan.d_model(hook), self.index.hooks[hook].moments
        chosen = [held[unit] for unit in sorted(held) if unit in self.plan.split_units("train")]
        rows = sum(moments.rows for moments in chosen)
        if not rows:
            raise ConfigError(
                f"hook {hook!r} has no moments of training rows",
                expected="a training unit among the first units",
                got=f"{self.plan.spec.validation_units} validation units before them",
                fix="Plan fewer validation units",
            )
        sums, squares = np.zeros(width), np.zeros(width)
        for moments in chosen:
            sums += moments.sums
            squares += moments.squares
        return rows, sums, squares

    def _moments_of_chosen(
        self, hook: str, reading: Reading
    ) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
        """`moments` of a reading, from the rows of the first training units that have enough of them."""
        found = self._chosen_moments.get(hook)
        if found is None:
            rows, size = 0, self.plan.rows_per_unit
            sums, squares = np.zeros(self.plan.d_model(hook)), np.zeros(self.plan.d_model(hook))
            for unit in self.plan.split_units("train"):
                chosen = self.weights([hook], unit * size, (unit + 1) * size) > 0
                if not chosen.any():
                    continue
                some = self.read_rows(hook, unit * size, (unit + 1) * size)[chosen].astype(np.float64)
                rows, sums, squares = rows + len(some), sums + some.sum(0), squares + np.square(some).sum(0)
                if rows >= CHOSEN_MOMENT_ROWS:
                    break
            if not rows:
                raise ConfigError(
                    f"rows: {reading.rows.words}", expected="a training row of weight 1", got="none"
                )
            found = self._chosen_moments[hook] = (rows, sums, squares)
        return found

    def mean(self, hook: str) -> NDArray[np.float64]:
        """float64 [D]: mean of the training rows of weight 1 (see `moments`), in raw units."""
        rows, sums, _ = self.moments(hook)
        return sums / rows

    def variance(self, hook: str) -> NDArray[np.float64]:
        """float64 [D]: variance of the training rows of weight 1 (see `moments`), in raw units."""
        rows, sums, squares = self.moments(hook)
        # The difference of two rounded numbers can be just below 0 for a constant dimension.
        return np.maximum(squares / rows - np.square(sums / rows), 0)

    def order(
        self,
        *,
        batch_rows: int,
        seed: int,
        split: str = "train",
        lanes: int = SLICES,
        group_units: int = 16,
    ) -> LaneOrder:
        """Make the order of a stream with these arguments; see `winnow.store.format.order.LaneOrder`."""
        if self.reading is None:
            return LaneOrder.for_plan(
                self.plan, split=split, batch_rows=batch_rows, seed=seed, lanes=lanes, group_units=group_units
            )
        counts, units = self.reading.counts, self.plan.split_units(split)
        return ReadingOrder.for_plan(
            self.plan,
            split=split,
            batch_rows=batch_rows,
            seed=seed,
            lanes=lanes,
            group_units=group_units,
            slices=counts.slices[units.start : units.stop],
            squares=counts.squares[units.start : units.stop],
            mask=self.reading.mask,
            reading=self.reading.digest,
        )

    def stream(
        self,
        hooks: Sequence[str] | str,
        *,
        split: str = "train",
        batch_rows: int,
        seed: int,
        lanes: int = SLICES,
        group_units: int = 16,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        epochs: int | None = None,
        steps: int | None = None,
        prefetch: int = 8,
        dtype: Literal["float32", "stored", "packed"] = "float32",
    ) -> Stream:
        """Stream batches in lane order, read ahead in the background.

        The global batch of a step is the ranks' batches one after another, the same for every `world` that
        divides `lanes`. Two groups are in memory (one, if the split is one group).

        Args:
            hooks: Hooks to read together: row i is the same token for each, and their weights multiply.
            split: `train`, `validation` or `all`.
            batch_rows: Rows B of a global batch, a multiple of `lanes`.
            seed: Key of the order.
            lanes: Lanes G, a divisor of 64. Part of the order.
            group_units: Units U shuffled together. Part of the order.
            rank: This process's rank, 0 to world - 1.
            world: Processes that share the batch; it must divide `lanes`.
            start_step: The first step, counted over all epochs: resumes in O(1).
            epochs: Stop after this many epochs counted from step 0; None never stops.
            steps: Stop before this step, counted from step 0; None never stops.
            prefetch: Range requests in flight; for a local root at most one per core.
            dtype: Dtype of the batches' rows: `float32`, or `stored`, the plan's (mostly bfloat16), but
                float32 if that is int8; or `packed`, the bytes as they are on disk, of int8 [B, D + 4]: D
                values and the row's scale, a little-endian float32. Half or a quarter of the bytes to copy to
                a GPU, which widens them there.

        Returns:
            An iterator of `winnow.store.read.torch_stream.Batch` that is also a context manager.

        Raises:
            ConfigError: Impossible arguments; raised before any data is read.
            MissingObject, IntegrityError: While iterating, storage no longer has what was committed; names
                unit, hook and slice.
        """
        # Imported here, since only streams need torch, which takes seconds to import.
        from winnow.store.read.torch_stream import Stream, widen

        order = self.order(
            batch_rows=batch_rows, seed=seed, split=split, lanes=lanes, group_units=group_units
        )
        if epochs is not None:
            if steps is not None:
                raise ConfigError("epochs and steps", expected="one of them", got="both")
            steps = epochs * order.steps_per_epoch
        return Stream(
            self.open_rows(
                order,
                (hooks,) if isinstance(hooks, str) else tuple(hooks),
                split=split,
                rank=rank,
                world=world,
                start_step=start_step,
                stop_step=steps,
                requests=prefetch,
                dtype=dtype,
                widen=widen,
            )
        )

    def open_rows(self, order: LaneOrder, hooks: tuple[str, ...], **options: Any) -> Rows:
        """Start reading in an order; `options` as in `winnow.store.read.stream.RowStream`."""
        # Here, not above: few users of a dataset stream it.
        from winnow.store.read.stream import RowStream

        facts: dict[str, Any] = {"arrivals": self.arrivals, "cache": self.cache}
        return RowStream(self.store, self.plan, self.index, order, hooks, **options, **facts)

    def require_text(self) -> None:
        """Raise ConfigError if the dataset was derived and its windows are no text."""
        if (why := self.plan.no_text) is not None:
            raise ConfigError(f"{self.uri}: {why}", fix="Take the dataset that it was derived from")

    def _check(self, hook: str, start: int, stop: int) -> int:
        if not 0 <= start <= stop <= self.rows:
            raise ConfigError(
                "rows", expected=f"0 <= start <= stop <= {self.rows}", got=f"start {start}, stop {stop}"
            )
        return self.plan.d_model(hook)

    def _hooks(self, hooks: Sequence[str] | str) -> tuple[str, ...]:
        named = (hooks,) if isinstance(hooks, str) else tuple(hooks)
        for hook in named:
            self.plan.d_model(hook)
        if not named:
            raise ConfigError("hooks", expected="one or more", got="none")
        return named
