"""Verification: what is missing, incomplete or corrupted in a dataset, at four levels of depth.

======= ==================================================================================
list    every object exists; manifest, receipts, plan and digests of tokens agree; strays
size    and has the length that receipts promise
index   and every shard's index and all zarr metadata are sound
full    and every byte is what was committed: sha256, crc32c of each slice, tokens, labels, finite
======= ==================================================================================

A dataset that is not sealed yet is checked as far as it goes. Nothing is changed.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.errors import (
    ConfigError,
    IntegrityError,
    MissingObject,
    NonFiniteError,
    UnsupportedVersion,
    WinnowError,
)
from winnow.schemas.harvest import SLICES, HarvestManifest, HarvestPlan, ShardRecord, UnitReceipt
from winnow.store.format.labels import LABELS, label_keys
from winnow.store.format.layout import (
    BATCHES_DIR,
    FOLLOWERS_DIR,
    MANIFEST_DIR,
    PLAN_KEY,
    READINGS_DIR,
    RING_DIR,
    manifest_key,
    receipt_key,
    shard_key,
    slice_bytes,
    slice_starts,
    tokens_key,
)
from winnow.store.format.shards import INDEX_BYTES, check_index, decode_slices, square_norms
from winnow.store.format.zarr_metadata import LABEL_DIGESTS_KEY, TOKEN_DIGESTS_KEY, same_array, zarr_objects
from winnow.store.objects import ObjectStore
from winnow.store.read.follow import deleted_units
from winnow.store.read.labels import load_label_digests, read_labels
from winnow.store.read.reader import load_plan, load_token_digests, read_tokens
from winnow.store.records.commit import RECEIPT_KEY, list_receipts, load_receipt
from winnow.store.records.manifest import find_manifest
from winnow.store.records.parts import DatasetDigest, check_columns, read_part

Level = Literal["list", "size", "index", "full"]
LEVELS: tuple[Level, ...] = get_args(Level)
"""Levels from the quickest to the deepest; each includes those before it."""

LEDGER_KEY = "ledger.json"
"""What harvests cost, kept beside the manifest by the harvester; no part of the data."""
READ_BYTES = 16 << 20
"""Bytes of a shard that one thread reads at a time."""

_BESIDE = (
    f"{MANIFEST_DIR}/",
    "manifest.",
    *(f"{name}/" for name in (FOLLOWERS_DIR, RING_DIR, BATCHES_DIR, READINGS_DIR)),
)
"""Prefixes of objects that may be there beside the data."""

# A problem has fields for unit, hook and slice, which its own words need not repeat.
_PLACE = re.compile(r"^unit \d+, hook '[^']*'(, slices? \d+(-\d+)?)?[:,] ")
"""Beginning of errors about a shard."""

T = TypeVar("T")
_WRONG = (IntegrityError, MissingObject, UnsupportedVersion, NonFiniteError)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    level: Level
    """The level that finds it."""
    key: str
    """The object."""
    what: str
    """What is wrong with it."""
    unit: int | None = None
    hook: str | None = None
    slice: int | None = None
    stray: bool = False
    """Whether it is an object that no dataset accounts for: worth a look, but no damage."""
    lost: bool = False
    """Whether rows or tokens are lost: nothing else in the dataset determines them."""

    def __str__(self) -> str:
        place = [
            f"{name} {value}"
            for name, value in (("unit", self.unit), ("hook", self.hook), ("slice", self.slice))
            if value is not None
        ]
        return f"{', '.join(place) or 'dataset'}: {self.what} [{self.key}]"


def verify(
    store: ObjectStore,
    level: str = "list",
    progress: Callable[[int, int], object] | None = None,
    threads: int = 4,
) -> list[Problem]:
    """Check the dataset at a root.

    Args:
        store: The root.
        level: `list`, `size`, `index` or `full`; each includes those before it.
        progress: Called with (shards done, shards), from several threads.
        threads: Shards read at a time; each thread needs memory for `READ_BYTES`.

    Returns:
        Every problem found, in unit order; empty if all is well.

    Raises:
        ConfigError: There is no dataset, or no such level.
        StoreError: Storage cannot be reached.
    """
    if level not in LEVELS:
        raise ConfigError("level", expected=" or ".join(LEVELS), got=repr(level))
    try:
        plan = load_plan(store)
    except (IntegrityError, UnsupportedVersion) as error:
        return [Problem("list", PLAN_KEY, _sentence(error))]
    return _Check(store, plan, LEVELS.index(level), threads, progress).run()


class _Check:
    """One verification; its steps append to `problems`."""

    def __init__(
        self,
        store: ObjectStore,
        plan: HarvestPlan,
        depth: int,
        threads: int,
        progress: Callable[[int, int], object] | None,
    ) -> None:
        self.store, self.plan, self.depth = store, plan, depth
        self.threads, self.progress = threads, progress
        self.sizes = dict(store.list())
        self.problems: list[Problem] = []
        self.deleted = deleted_units(store, plan)
        self.metadata = zarr_objects(plan)
        self.digests: NDArray[np.uint8] | None = None
        self.label_digests: NDArray[np.uint8] | None = None
        # A plan from elsewhere may claim any number of units: believe no more than the digests' length backs.
        backed = self.sizes.get(TOKEN_DIGESTS_KEY) == plan.units * 32 + 4
        self.units = range(plan.units if backed else min(plan.units, len(self.sizes)))

    def run(self) -> list[Problem]:
        """All steps of the level."""
        manifest = self.guarded(manifest_key(), lambda: find_manifest(self.store, self.plan))
        # A seal writes the parts first and ends soon after; without parts the harvest is not that far yet.
        if manifest is None and any(key.startswith(f"{MANIFEST_DIR}/") for key in self.sizes):
            self.present(manifest_key(), None)
        receipts = self.receipts(manifest)
        self.planned(receipts, manifest is not None)
        self.strays(manifest)
        with ThreadPoolExecutor(self.threads, thread_name_prefix="winnow-verify") as pool:
            if self.depth >= 2:
                self.zarr()
            shards = [
                (receipt.unit, hook, shard)
                for receipt in receipts.values()
                for hook, shard in receipt.shards.items()
            ]
            done, lock = [0], threading.Lock()

            def one(item: tuple[int, str, ShardRecord]) -> list[Problem]:
                found = list(self.shard(*item))
                with lock:
                    done[0] += 1
                    if self.progress:
                        self.progress(done[0], len(shards))
                return found

            for found in pool.map(one, shards):
                self.problems += found
            if self.depth >= 3:
                for found in pool.map(self.tokens, self.units):
                    self.problems += found
        # Threads end in any order; reports of two runs should be alike. Strays last: they are no damage.
        order = {name: number for number, name in enumerate(self.plan.spec.hooks)}
        self.problems.sort(
            key=lambda p: (
                p.stray,
                p.unit if p.unit is not None else -1,
                order.get(p.hook or "", -1),
                p.slice or 0,
            )
        )
        return self.problems

    def guarded(self, key: str, act: Callable[[], T], unit: int | None = None) -> T | None:
        """Return `act()`; if it fails, note a problem and return None."""
        try:
            return act()
        except _WRONG as error:
            self.problems.append(Problem("list", key, _sentence(error), unit=unit))
            return None

    # Facts: plan, receipts, manifest

    def receipts(self, manifest: HarvestManifest | None) -> dict[int, UnitReceipt]:
        """Find unit -> its receipt: in the manifest's parts, otherwise in the receipts' own objects."""
        standing = list_receipts(self.store, self.plan)
        found: dict[int, UnitReceipt] = {}
        if manifest is not None:
            for part in manifest.parts:
                gathered = self.guarded(part.key, lambda p=part: list(read_part(self.store, self.plan, p)))
                for receipt in gathered or ():
                    found[receipt.unit] = receipt
                if gathered is not None:
                    self.guarded(part.key, lambda p=part: check_columns(self.store, self.plan, p))
            self.sealed(manifest, found)
            for unit in self.units:
                if unit not in standing:
                    self.problems.append(
                        Problem("list", receipt_key(unit), "the receipt is missing", unit=unit)
                    )
        # Of a sealed dataset the parts have every receipt; its own object is read at the deepest level only.
        wanted = [u for u in sorted(standing) if u not in found or self.depth >= 3]
        revisions = [standing[u] for u in wanted]
        with ThreadPoolExecutor(16, thread_name_prefix="winnow-receipts") as pool:
            for unit, receipt in zip(wanted, pool.map(self.receipt, wanted, revisions), strict=True):
                if isinstance(receipt, Problem):
                    self.problems.append(receipt)
                elif unit not in found:
                    found[unit] = receipt
                elif found[unit].content() != receipt.content():
                    what = "the receipt differs from the manifest's copy of it"
                    self.problems.append(Problem("full", receipt_key(unit, standing[unit]), what, unit=unit))
        return dict(sorted(found.items()))

    def receipt(self, unit: int, revision: int) -> UnitReceipt | Problem:
        try:
            return load_receipt(self.store, self.plan, unit, revision)
        except _WRONG as error:
            return Problem("list", receipt_key(unit, revision), _sentence(error), unit=unit)

    def sealed(self, manifest: HarvestManifest, receipts: dict[int, UnitReceipt]) -> None:
        """Compare the manifest with the receipts in its parts."""
        if len(receipts) != self.plan.units:
            return  # a part is damaged, and was named already
        digest = DatasetDigest(self.plan)
        for _, receipt in sorted(receipts.items()):
            digest.add(receipt)
        shards = [shard for receipt in receipts.values() for shard in receipt.shards.values()]
        facts = (
            ("dataset_sha256", digest.hexdigest(), manifest.dataset_sha256),
            ("bytes", sum(shard.bytes for shard in shards), manifest.bytes),
            (
                "void_units",
                sorted(u for u, r in receipts.items() if r.void is not None),
                [*manifest.void_units],
            ),
        )
        for name, expected, got in facts:
            if expected != got:
                what = f"{name} is wrong: the receipts give {expected!r:.100}, it says {got!r:.100}"
                self.problems.append(Problem("list", manifest_key(manifest.revision), what))

    def planned(self, receipts: dict[int, UnitReceipt], sealed: bool) -> None:
        """Check what plan and receipts promise: presence and length of objects, and token digests."""
        plan = self.plan
        for key in self.metadata:
            self.present(key, None)
        if self.present(TOKEN_DIGESTS_KEY, plan.units * 32 + 4):
            self.digests = self.guarded(TOKEN_DIGESTS_KEY, lambda: load_token_digests(self.store, plan))
        if plan.labels is not None and self.present(LABEL_DIGESTS_KEY, plan.units * len(LABELS) * 32 + 4):
            self.label_digests = self.guarded(LABEL_DIGESTS_KEY, lambda: load_label_digests(self.store, plan))
        tokens = plan.spec.windows_per_unit * plan.spec.context_length
        for unit in self.units:
            # While planning goes on, a chunk may be missing without harm, unless its unit is committed.
            chunks = {tokens_key(unit): 4}
            chunks |= {key: LABELS[name].itemsize for name, key in label_keys(plan, unit).items()}
            for key, width in chunks.items():
                if sealed or unit in receipts or key in self.sizes:
                    self.present(key, tokens * width + 4, unit=unit)
        for unit, receipt in receipts.items():
            promised = self.digests[unit].tobytes().hex() if self.digests is not None else None
            if promised not in (None, receipt.tokens_sha256):
                what = "the receipt is for other tokens than were planned"
                self.problems.append(Problem("list", receipt_key(unit, receipt.revision), what, unit=unit))
            for hook, shard in receipt.shards.items():
                # Deleted by a ring, on purpose. One that still exists is checked like any other.
                if unit in self.deleted and shard.key not in self.sizes:
                    continue
                self.present(shard.key, shard.bytes, unit=unit, hook=hook)

    def present(
        self, key: str, length: int | None, *, unit: int | None = None, hook: str | None = None
    ) -> bool:
        """Return whether an object exists; note it if it is missing or has another length."""
        size = self.sizes.get(key)
        if size is None:
            what = "the object is missing"
            self.problems.append(Problem("list", key, what, unit=unit, hook=hook, lost=unit is not None))
        elif self.depth >= 1 and length is not None and size != length:
            what = f"the object has {size} bytes instead of {length}"
            self.problems.append(Problem("size", key, what, unit=unit, hook=hook, lost=unit is not None))
        return size is not None

    def strays(self, manifest: HarvestManifest | None) -> None:
        """Note objects that no plan, receipt or manifest accounts for."""
        plan = self.plan
        known = {PLAN_KEY, TOKEN_DIGESTS_KEY, LEDGER_KEY, *self.metadata}
        known |= {tokens_key(unit) for unit in self.units}
        if plan.labels is not None:
            known.add(LABEL_DIGESTS_KEY)
            known |= {key for unit in self.units for key in label_keys(plan, unit).values()}
        known |= {shard_key(hook, unit) for hook in plan.spec.hooks for unit in self.units}
        if manifest is not None:
            known |= {manifest_key(revision) for revision in range(manifest.revision + 1)}
            known |= {part.key for part in manifest.parts}
        for key in self.sizes:
            match = RECEIPT_KEY.fullmatch(key)
            of_plan = match is not None and int(match[1]) < plan.units
            # Parts of an interrupted seal, or of a manifest with a later revision, are no strays.
            if key in known or of_plan or key.startswith(_BESIDE):
                continue
            self.problems.append(Problem("list", key, "a stray: no part of this dataset", stray=True))

    # Bytes

    def zarr(self) -> None:
        """Compare every `zarr.json` with the plan's."""
        for key, expected in self.metadata.items():
            if key in self.sizes:
                found = self.store.get(key)
                # Another zarr release words it differently.
                if found != expected and not same_array(found, expected):
                    self.problems.append(Problem("index", key, "the zarr metadata does not match the plan"))

    def shard(self, unit: int, hook: str, record: ShardRecord) -> Iterator[Problem]:
        """Check the index and, at level `full`, every byte of one shard."""
        size = self.sizes.get(record.key)
        if self.depth < 2 or size is None:
            return
        if size != record.bytes:
            return  # truncated or lengthened, and named already

        def problem(level: Level, error: WinnowError | str, number: int | None = None) -> Problem:
            what = error if isinstance(error, str) else _PLACE.sub("", _sentence(error))
            return Problem(level, record.key, what, unit=unit, hook=hook, slice=number)

        try:
            footer = bytes(self.store.get_suffix(record.key, INDEX_BYTES))
            check_index(footer, self.plan, hook, unit, record.slice_lengths)
        except _WRONG as error:
            yield problem("index", error)
        if self.depth < 3:
            return
        # On past a bad index: the receipt says where the slices are, so that all damage is named in one run.
        whole, damaged = hashlib.sha256(), False
        starts = slice_starts(self.plan, hook, record.slice_lengths).tolist()
        step = max(1, READ_BYTES // slice_bytes(self.plan, hook))
        # In pieces of `READ_BYTES`: four threads with whole shards would hold gigabytes.
        for first in range(0, SLICES, step):
            stop = min(first + step, SLICES)
            try:
                data = memoryview(self.store.get_range(record.key, starts[first], starts[stop]))
            except _WRONG as error:
                yield problem("full", error, first)
                return
            whole.update(data)
            for number in range(first, stop):
                piece = data[starts[number] - starts[first] : starts[number + 1] - starts[first]]
                try:
                    rows = decode_slices(
                        piece,
                        number,
                        number + 1,
                        plan=self.plan,
                        hook=hook,
                        unit=unit,
                        crc=record.slice_crc32c,
                        lengths=record.slice_lengths,
                    )
                    # Raises for NaN: a shard with a true digest may still hold what must never be trained on.
                    square_norms(rows[0], self.plan.spec.dtype, unit=unit, hook=hook)
                except _WRONG as error:
                    damaged = True
                    yield problem("full", error, number)
        whole.update(self.store.get_suffix(record.key, INDEX_BYTES))
        # Only what no slice explains: the index, or bytes that crc32c cannot tell apart.
        if whole.hexdigest() != record.sha256 and not damaged:
            yield problem("full", f"sha256 is {whole.hexdigest()} instead of {record.sha256}")

    def tokens(self, unit: int) -> Sequence[Problem]:
        """Check every byte of one unit's tokens and labels."""
        store, plan, digests, labels = self.store, self.plan, self.digests, self.label_digests
        reads: dict[str, Callable[[], object]] = {}
        if digests is not None:
            reads[tokens_key(unit)] = lambda: read_tokens(store, plan, unit, digests)
        if labels is not None:
            for name, key in label_keys(plan, unit).items():
                reads[key] = lambda name=name: read_labels(store, plan, unit, [name], labels)
        found: list[Problem] = []
        for key, read in reads.items():
            if key in self.sizes:
                try:
                    read()
                except _WRONG as error:
                    found.append(Problem("full", key, _sentence(error), unit=unit, lost=True))
        return found


def _sentence(error: WinnowError) -> str:
    """Word an error without its advice, which is to run verify."""
    return str(WinnowError(error.what, expected=error.expected, got=error.got))


def damage(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems that are more than strays."""
    return [problem for problem in problems if not problem.stray]
