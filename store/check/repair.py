"""Repair: the only overwrite. One writer, off the hot path; killed at any point, it is run again.

::

    damaged                                   restored from
    zarr.json                                 the plan
    token_digests, label_digests              the chunks, checked against the plan
    a receipt                                 the manifest's copy of it
    a shard's index or stored checksums       the payload and the receipt
    a shard's payload, a missing shard        the subject (`winnow harvest CONFIG --repair`)
    a chunk of tokens or labels               the corpus  (`winnow harvest CONFIG --repair`)
    a part of the manifest, the manifest      the receipts
    plan.json                                 nothing: it is the identity
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.base import MAX_JSON_BYTES, sha256_hex
from winnow.schemas.errors import (
    IntegrityError,
    MissingObject,
    NonFiniteError,
    StoreError,
    UnsupportedVersion,
    WinnowError,
)
from winnow.schemas.harvest import SLICES, Attempt, HarvestManifest, HarvestPlan, ShardRecord, UnitReceipt
from winnow.store.check.verify import damage, verify
from winnow.store.format.labels import LABELS, label_digests, label_keys
from winnow.store.format.layout import (
    MANIFEST_DIR,
    manifest_key,
    receipt_key,
    shard_key,
    slice_starts,
    tokens_key,
)
from winnow.store.format.shards import (
    Stored,
    crc32c,
    decode_chunk,
    decode_slices,
    encode_chunk,
    relative_difference,
    shard_index,
)
from winnow.store.format.zarr_metadata import LABEL_DIGESTS_KEY, TOKEN_DIGESTS_KEY, same_array, zarr_objects
from winnow.store.objects import ObjectStore
from winnow.store.read.labels import MAX_LABEL_CHUNK_BYTES, load_label_digests
from winnow.store.read.reader import MAX_TOKEN_CHUNK_BYTES, load_plan, load_token_digests
from winnow.store.records.commit import commit_receipt, list_receipts, load_receipt, settle
from winnow.store.records.manifest import find_manifest, load_index
from winnow.store.records.parts import read_part
from winnow.store.write.writer import gather, make_shard, read_orphan, tokens_digest

Remake = Callable[[int], tuple[Mapping[str, Stored], Attempt]]
"""Unit -> (hook -> its rows [R, D] as stored, computed anew; the attempt that did it)."""

_MANIFEST_KEY = re.compile(r"manifest(?:\.r([1-9]\d*))?\.json")
_WRONG = (IntegrityError, MissingObject, UnsupportedVersion, NonFiniteError)


@dataclass
class RepairReport:
    """Result of a repair."""

    restored: list[str] = field(default_factory=list[str])
    """Objects that were overwritten."""
    revised: list[int] = field(default_factory=list[int])
    """Units with a receipt of a new revision."""
    removed: list[str] = field(default_factory=list[str])
    """Damaged objects that no receipt vouches for; the harvest computes them again."""
    manifest: HarvestManifest | None = None
    """The new manifest, if one was needed."""


def repair(store: ObjectStore, remake: Remake | None = None) -> RepairReport:
    """Restore what can be restored; `verify` then names what is left.

    Nobody else may write to the root meanwhile.

    Args:
        store: The dataset's root.
        remake: Computes a unit's rows again; without it, units whose payload is damaged stay so.

    Raises:
        ConfigError, IntegrityError: There is no dataset, or its plan cannot be read.
        IntegrityError: Recomputed rows differ from the intact part of the damaged shard.
        StoreError: Storage fails, or somebody else writes.
    """
    plan = load_plan(store)
    work = _Repair(store, plan, remake)
    # In the order of dependence: digests before units, whose check needs them; the manifest, made from the
    # receipts, last.
    work.metadata()
    work.token_digests()
    work.label_digests()
    for unit in sorted({p.unit for p in damage(verify(store, "full")) if p.unit is not None}):
        work.unit(unit)
    # Only if the harvest follows: without it, a damaged shard that is removed would not be replaced.
    if remake is not None:
        work.orphans()
    work.manifests()
    return work.report


class _Repair:
    """One repair."""

    def __init__(self, store: ObjectStore, plan: HarvestPlan, remake: Remake | None) -> None:
        self.store, self.plan, self.remake, self.report = store, plan, remake, RepairReport()
        self.copies = dict(self._copies())

    def _copies(self) -> Iterable[tuple[int, UnitReceipt]]:
        """Yield the receipts in the readable parts of a readable manifest."""
        try:
            manifest = find_manifest(self.store, self.plan)
        except _WRONG:
            return
        for part in manifest.parts if manifest else ():
            try:
                for receipt in read_part(self.store, self.plan, part):
                    yield receipt.unit, receipt
            except _WRONG:
                continue

    def put_back(self, key: str, body: bytes | memoryview, version: str | None) -> None:
        """Overwrite a damaged object with its promised bytes."""
        self.store.replace(key, body, version)
        self.report.restored.append(key)

    # What follows from the plan

    def metadata(self) -> None:
        for key, body in zarr_objects(self.plan).items():
            # Before the damage is examined, here and below: a change by another writer is then refused.
            version = self.store.version(key)
            try:
                found = self.store.get(key, MAX_JSON_BYTES)
            except _WRONG:
                found = b""
            if found != body and not same_array(found, body):
                self.put_back(key, body, version)

    def token_digests(self) -> None:
        version = self.store.version(TOKEN_DIGESTS_KEY)
        try:
            load_token_digests(self.store, self.plan)
            return
        except _WRONG:
            pass
        shape = (self.plan.spec.windows_per_unit, self.plan.spec.context_length)
        digests: list[bytes] = []
        try:
            for unit in range(self.plan.units):
                data = self.store.get(tokens_key(unit), MAX_TOKEN_CHUNK_BYTES)
                tokens = decode_chunk(data, "<u4", shape, what=f"tokens of unit {unit}")
                digests.append(bytes.fromhex(tokens_digest(tokens)))
        except _WRONG:
            return
        # Only as a whole: the plan has one digest of all digests, and a damaged chunk would change it.
        array = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
        if sha256_hex(array.tobytes()) == self.plan.tokens_sha256:
            self.put_back(TOKEN_DIGESTS_KEY, encode_chunk(array), version)

    def label_digests(self) -> None:
        if self.plan.labels is None:
            return
        version = self.store.version(LABEL_DIGESTS_KEY)
        try:
            load_label_digests(self.store, self.plan)
            return
        except _WRONG:
            pass
        shape = (self.plan.spec.windows_per_unit, self.plan.spec.context_length)
        made: list[NDArray[np.uint8]] = []
        try:
            for unit in range(self.plan.units):
                chunks = {
                    name: decode_chunk(
                        self.store.get(key, MAX_LABEL_CHUNK_BYTES), LABELS[name].str, shape, what=key
                    )
                    for name, key in label_keys(self.plan, unit).items()
                }
                made.append(label_digests(chunks))
        except _WRONG:
            return
        array = np.stack(made)
        if sha256_hex(array.tobytes()) == self.plan.labels.sha256:
            self.put_back(LABEL_DIGESTS_KEY, encode_chunk(array), version)

    # Units

    def unit(self, unit: int) -> None:
        """Restore one unit's receipt, and its shards to what the receipt says."""
        truth = self.receipt(unit)
        if truth is None or truth.void is not None:
            return
        # Hooks that are intact keep their bytes; only the others are replaced by recomputed rows.
        bad = [hook for hook, record in truth.shards.items() if not self.sound(hook, record)]
        if not bad or self.remake is None:
            return
        rows, attempt = self.remake(unit)
        shards = dict(truth.shards)
        for hook in bad:
            self.agrees(unit, hook, shards[hook], rows[hook])
            version = self.store.version(shards[hook].key)
            data, shards[hook] = make_shard(self.plan, unit, hook, rows[hook])
            self.put_back(shards[hook].key, data, version)
        # Byte for byte as promised: the receipt is true again and needs no revision.
        if shards == truth.shards:
            return
        # Other float noise: a new revision. Readers with the old receipt fail their checks, never misled.
        facts = {"shards": shards, "revision": truth.revision + 1, "attempt": attempt}
        revised = truth.model_copy(update=facts)
        if commit_receipt(self.store, self.plan, revised).content() != revised.content():
            raise IntegrityError(
                f"unit {unit} has a receipt of revision {revised.revision} already",
                fix="Repair when nobody else writes to this root",
            )
        self.report.revised.append(unit)

    def receipt(self, unit: int) -> UnitReceipt | None:
        """Find the unit's receipt of highest revision, restored from the manifest's copy if it is damaged."""
        revision = list_receipts(self.store, self.plan).get(unit)
        copy = self.copies.get(unit)
        # An older copy is no help: the receipt's newer revision describes other bytes.
        if copy is not None and copy.revision >= (revision or 0):
            key = receipt_key(unit, copy.revision)
            version = self.store.version(key)
            try:
                if load_receipt(self.store, self.plan, unit, copy.revision).content() == copy.content():
                    return copy
            except _WRONG:
                pass
            self.put_back(key, copy.to_json(), version)
            return copy
        if revision is None:
            return None
        try:
            return load_receipt(self.store, self.plan, unit, revision)
        except _WRONG:
            if self.remake is None:
                return None
        # Nothing says what the unit contains now. Without this receipt an earlier one counts again, or the
        # harvest computes the unit and adopts its shards if they are sound.
        self.remove(receipt_key(unit, revision))
        return self.receipt(unit)

    def sound(self, hook: str, record: ShardRecord) -> bool:
        """Return whether a shard is as promised, or was restored from its own payload."""
        version = self.store.version(record.key)
        try:
            data = self.store.get(record.key)
        except _WRONG:
            return False
        if sha256_hex(data) == record.sha256:
            return True
        if len(data) != record.bytes:
            return False
        # Stored checksums and index follow from receipt and payload. If the whole then has the receipt's
        # digest, the payload was intact.
        starts = slice_starts(self.plan, hook, record.slice_lengths)
        body = bytearray(data)
        for crc, end in zip(record.slice_crc32c, starts[1:].tolist(), strict=True):
            body[end - 4 : end] = crc.to_bytes(4, "little")
        body[starts[-1] :] = shard_index(starts)
        if sha256_hex(body) != record.sha256:
            return False
        self.put_back(record.key, memoryview(body), version)
        return True

    def agrees(self, unit: int, hook: str, record: ShardRecord, rows: Stored) -> None:
        """Compare recomputed rows with the slices that are intact; IntegrityError if they differ."""
        # Without it, a repair with another subject would mix two models' rows in one dataset.
        try:
            data = self.store.get(record.key)
        except _WRONG:
            return
        starts = slice_starts(self.plan, hook, record.slice_lengths).tolist()
        made = rows.reshape(SLICES, self.plan.rows_per_slice, -1)
        for number, crc in enumerate(record.slice_crc32c):
            payload = data[starts[number] : starts[number + 1] - 4]
            if crc32c(payload) != crc:
                continue
            try:
                kept = decode_slices(
                    payload + crc.to_bytes(4, "little"),  # whatever checksum is stored beside it
                    number,
                    number + 1,
                    plan=self.plan,
                    hook=hook,
                    unit=unit,
                    crc=record.slice_crc32c,
                    lengths=record.slice_lengths,
                )[0]
            except IntegrityError:  # the shard ends inside this slice
                continue
            apart = relative_difference(kept, made[number], self.plan.spec.dtype, unit=unit, hook=hook)
            if apart > self.plan.spec.adopt_tolerance:
                raise IntegrityError(
                    f"unit {unit}, hook {hook!r}: the recomputed rows are not those that were stored",
                    expected=f"a relative difference of at most {self.plan.spec.adopt_tolerance:g} "
                    f"from slice {number}, which is sound",
                    got=f"{apart:.3g}",
                    fix="Repair with the subject, device and code of the harvest",
                )

    def orphans(self) -> None:
        """Remove damaged shards of units that have no receipt, so that the harvest can compute them again."""
        standing = list_receipts(self.store, self.plan)
        stored = {key for key, _ in self.store.list("activations")}
        for unit in range(self.plan.units):
            for hook in self.plan.spec.hooks if unit not in standing else ():
                if shard_key(hook, unit) in stored:
                    try:
                        read_orphan(self.store, self.plan, unit, hook)
                    except _WRONG:
                        self.remove(shard_key(hook, unit))

    def remove(self, key: str) -> None:
        self.store.delete(key)
        self.report.removed.append(key)

    # Manifests

    def manifests(self) -> None:
        """Seal again if the manifest no longer agrees with the receipts."""
        present = [_MANIFEST_KEY.fullmatch(key) for key, _ in self.store.list()]
        revisions = sorted(int(match[1] or 0) for match in present if match)
        if not revisions and next(self.store.list(MANIFEST_DIR), None) is None:
            return  # not sealed: that is for the harvest
        try:
            fresh = gather(self.store, self.plan, repair=True)
        except WinnowError as error:
            if isinstance(error, StoreError) and not isinstance(error, MissingObject):
                raise  # storage failed: an outdated manifest must not pass for repaired
            return  # receipts are missing or damaged: `verify` names them
        try:
            standing = find_manifest(self.store, self.plan)
            if standing is not None:
                load_index(self.store, self.plan, standing)
                # These three are the manifest's own; all else follows from the receipts.
                told = {"revision": standing.revision, "parent": standing.parent, "created": standing.created}
                if standing == fresh.model_copy(update=told):
                    return
                if standing.parts == fresh.parts:
                    standing = None  # it contradicts its own receipts, so it is damaged itself
        except _WRONG:
            standing = None
        # Sound but outdated, as receipts were revised: a new revision, and nothing is overwritten.
        if standing is not None:
            data = self.store.get(manifest_key(standing.revision), MAX_JSON_BYTES)
            facts = {"revision": standing.revision + 1, "parent": sha256_hex(data)}
            self.report.manifest = fresh.model_copy(update=facts)
            key, body = manifest_key(standing.revision + 1), self.report.manifest.to_json()
            if settle(self.store, key, body) not in (None, body):
                raise IntegrityError(f"{self.store.uri}/{key} appeared during the repair")
            return
        parent: str | None = None
        # The chain is broken, and each link contains the digest of the one before: all are written again.
        for revision in range(max(revisions, default=0) + 1):
            manifest = fresh.model_copy(update={"revision": revision, "parent": parent})
            key, body = manifest_key(revision), manifest.to_json()
            self.put_back(key, body, self.store.version(key))
            self.report.manifest, parent = manifest, sha256_hex(body)
