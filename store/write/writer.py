"""Writing a dataset: plan, tokens, units, seal. Every put is create-only (`winnow.store.records.commit`).

Letters: W windows in a unit, T context length, R rows in a unit, D d_model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from queue import SimpleQueue
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from winnow.common.clock import now
from winnow.schemas.base import sha256_hex
from winnow.schemas.errors import (
    ConfigError,
    IntegrityError,
    MissingObject,
    PlanMismatch,
    StoreError,
    WinnowError,
)
from winnow.schemas.harvest import (
    MOMENT_UNITS,
    SLICES,
    Attempt,
    HarvestManifest,
    HarvestPlan,
    ManifestPart,
    ShardRecord,
    UnitReceipt,
)
from winnow.store.format.labels import LABELS, Labels, label_key, label_keys
from winnow.store.format.layout import (
    PLAN_KEY,
    STORED_DTYPES,
    manifest_key,
    shard_key,
    slice_starts,
    tokens_key,
)
from winnow.store.format.shards import (
    INDEX_BYTES,
    EncodedShard,
    Statistics,
    Stored,
    check_index,
    crc32c,
    decode_slices,
    describe_rows,
    digest_of,
    encode_chunk,
    encode_shard,
    read_shard_index,
    relative_difference,
)
from winnow.store.format.zarr_metadata import LABEL_DIGESTS_KEY, TOKEN_DIGESTS_KEY, same_array, zarr_objects
from winnow.store.objects import Data, ObjectStore
from winnow.store.records.commit import PUT_TRIES, commit_receipt, list_receipts, load_receipt, settle
from winnow.store.records.manifest import find_manifest, load_manifest
from winnow.store.records.parts import PART_UNITS, DatasetDigest, encode_part

# Receipts are small: reading them is waiting for replies, not work for the cores.
_RECEIPT_THREADS = 16
"""Receipts that `seal` reads at the same time."""

_CREATE_THREADS = 8
"""Objects that `create_dataset` puts at the same time."""

_OnProgress = Callable[[int, int], object]
"""Called with (done, total)."""


# Plan and tokens


def create_dataset(
    store: ObjectStore,
    plan: HarvestPlan,
    token_digests: NDArray[np.uint8],
    label_digests: NDArray[np.uint8] | None = None,
) -> HarvestPlan:
    """Put plan.json, then what follows from it: zarr metadata, and the digests of tokens and labels.

    Safe to repeat: stored objects are compared and kept.

    Args:
        store: The dataset's root.
        plan: The identity to establish.
        token_digests: uint8 [units, 32], SHA-256 of each unit's tokens (uint32 little-endian).
        label_digests: uint8 [units, labels, 32], of each unit's labels; None if the plan has none.

    Returns:
        The stored plan: `plan`, or an earlier one with the same fingerprint, whose batch shape and threads
        then apply.

    Raises:
        PlanMismatch: The root has another plan; the differing fields are named.
        IntegrityError: The digests are not those of the plan, or a stored object differs.
    """
    digests = {
        TOKEN_DIGESTS_KEY: _checked_digests("token", token_digests, (plan.units, 32), plan.tokens_sha256)
    }
    if plan.labels is not None:
        made = np.zeros((0,)) if label_digests is None else label_digests
        shape = (plan.units, len(LABELS), 32)
        digests[LABEL_DIGESTS_KEY] = _checked_digests("label", made, shape, plan.labels.sha256)
    _refuse_strangers(store, plan)
    # The plan first: it is the identity, and of two harvests on one root the later one is refused here.
    found = settle(store, PLAN_KEY, plan.to_json())
    if found is not None:
        plan = _same_plan(plan, HarvestPlan.from_json(found, origin=f"{store.uri}/{PLAN_KEY}"), store.uri)

    def put(key: str, body: bytes) -> None:
        found = settle(store, key, body)
        # Another zarr release words its metadata differently: no reason to refuse a root.
        if found is not None and found != body and not same_array(found, body):
            raise _differs(store, key)

    # At the same time: each waits for the disk or for a reply, and a plan of many hooks has as many.
    with ThreadPoolExecutor(_CREATE_THREADS, thread_name_prefix="winnow-create") as pool:
        puts = [pool.submit(put, key, body) for key, body in zarr_objects(plan).items()]
        puts += [pool.submit(_put_chunk, store, key, values) for key, values in digests.items()]
        for each in puts:
            each.result()
    return plan


def _refuse_strangers(store: ObjectStore, plan: HarvestPlan) -> None:
    """Raise PlanMismatch for a root whose plan.json was lost and whose receipts are another plan's."""
    if store.size(PLAN_KEY) is not None:
        return
    for unit, revision in list_receipts(store, plan).items():
        try:
            load_receipt(store, plan, unit, revision)
        except IntegrityError as error:
            raise PlanMismatch(
                f"{store.uri} has receipts of another plan, whose {PLAN_KEY} is missing",
                expected=error.expected,
                got=error.got,
                fix="Put back a copy of it, plan with the same config as then, or choose another root",
            ) from error
        return  # one tells


def _checked_digests(
    name: str, digests: NDArray[Any], shape: tuple[int, ...], sha256: str
) -> NDArray[np.uint8]:
    digests = np.ascontiguousarray(digests, dtype=np.uint8)
    if digests.shape != shape or sha256_hex(digests.tobytes()) != sha256:
        raise IntegrityError(
            f"the {name} digests are not those of the plan",
            expected=f"uint8 {list(shape)} with sha256 {sha256}",
            got=f"{digests.dtype} {list(digests.shape)} with sha256 {sha256_hex(digests.tobytes())}",
        )
    return digests


def _same_plan(wanted: HarvestPlan, found: HarvestPlan, where: str) -> HarvestPlan:
    """Return `found` if the fingerprints agree; otherwise PlanMismatch with the differing fields."""
    # The stored plan and not ours: all who harvest a root have the same plan, also outside the fingerprint.
    if found.fingerprint == wanted.fingerprint:
        return found
    fields = differing_fields(found.model_dump(mode="json"), wanted.model_dump(mode="json"))
    raise PlanMismatch(
        f"{where} already holds another plan",
        got=("; ".join(fields[:12]) + (f"; and {len(fields) - 12} more" if len(fields) > 12 else "")),
        fix="Choose another root, or set the named fields back to the stored values",
    )


def differing_fields(stored: Any, wanted: Any, path: str = "") -> list[str]:
    """List `path: stored X, asked for Y` of every leaf that differs, except those of `execution`."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        before, after = cast(dict[str, Any], stored), cast(dict[str, Any], wanted)
        keys = [key for key in {**before, **after} if path or key != "execution"]
        lines: list[str] = []
        for key in keys:
            lines += differing_fields(before.get(key), after.get(key), f"{path}.{key}".lstrip("."))
        return lines
    if stored == wanted:
        return []
    return [f"{path}: stored {stored!r:.120}, asked for {wanted!r:.120}"]


def tokens_digest(tokens: NDArray[np.uint32]) -> str:
    """Compute the SHA-256 of a unit's tokens [W, T] as uint32 little-endian."""
    return sha256_hex(np.ascontiguousarray(tokens, dtype="<u4").tobytes())


def put_tokens(store: ObjectStore, plan: HarvestPlan, unit: int, tokens: NDArray[np.uint32]) -> None:
    """Put one unit's tokens [W, T].

    Raises:
        IntegrityError: Other tokens are stored already.
    """
    _check_unit(plan, unit)
    shape = (plan.spec.windows_per_unit, plan.spec.context_length)
    if tokens.shape != shape:
        raise ValueError(f"tokens of a unit must be {list(shape)}, got {list(tokens.shape)}")
    _put_chunk(store, tokens_key(unit), np.ascontiguousarray(tokens, dtype="<u4"))


def put_labels(store: ObjectStore, plan: HarvestPlan, unit: int, labels: Labels) -> None:
    """Put one unit's labels, [W, T] each; nothing if the plan has none.

    Raises:
        IntegrityError: Other labels are stored already.
    """
    for name in label_keys(plan, unit):
        put_label(store, plan, unit, name, labels[name])


def put_label(
    store: ObjectStore, plan: HarvestPlan, unit: int, name: str, values: NDArray[np.generic]
) -> None:
    """Put one label [W, T] of a unit, of a plan that has labels.

    Raises:
        IntegrityError: Other values are stored already.
    """
    _check_unit(plan, unit)
    shape = (plan.spec.windows_per_unit, plan.spec.context_length)
    if values.shape != shape:
        raise ValueError(f"label {name!r} of a unit must be {list(shape)}, got {list(values.shape)}")
    _put_chunk(store, label_key(name, unit), np.ascontiguousarray(values, dtype=LABELS[name]))


def _put_chunk(store: ObjectStore, key: str, values: NDArray[Any]) -> None:
    body = encode_chunk(values)
    found = settle(store, key, body)
    if found is not None and found != body:
        raise _differs(store, key)


def _differs(store: ObjectStore, key: str) -> IntegrityError:
    return IntegrityError(
        f"{store.uri}/{key} differs from what the plan gives",
        expected="the same bytes as planned now",
        fix="Find out what wrote it; nothing was overwritten. A new root starts afresh",
    )


# Units


def commit_unit(
    store: ObjectStore,
    plan: HarvestPlan,
    unit: int,
    rows: Mapping[str, Stored],
    *,
    tokens_sha256: str,
    attempt: Attempt,
) -> UnitReceipt:
    """Store a unit's rows and commit them.

    Needs no memory beyond `rows`, which must not change meanwhile, unless shards are compressed, S3 is
    written without if-none-match, or a shard of an earlier attempt is adopted: then one shard more.

    Args:
        store: The dataset's root.
        plan: Its plan.
        unit: The unit's number.
        rows: Hook -> [R, D] in the dtype on disk and in stored order (`layout.row_permutation`).
        tokens_sha256: Digest of the tokens that the rows were computed from.
        attempt: The attempt that computed them; the time spent here is added to its seconds.

    Returns:
        The stored receipt, which an earlier attempt may have put.

    Raises:
        ValueError: Rows of another shape or dtype than the plan's; nothing was written.
        NonFiniteError: A NaN or infinity; nothing of that hook was written.
        IntegrityError: An earlier attempt stored rows that differ beyond `adopt_tolerance`.
        CommitUnknown: Whether the receipt was written could not be found out.
    """
    started = time.monotonic()
    _check_unit(plan, unit)
    if set(rows) != set(plan.spec.hooks):
        raise ValueError(f"rows of hooks {sorted(plan.spec.hooks)} are needed, got {sorted(rows)}")
    # All before the first is written: a shard that no receipt will ever name would have to be repaired.
    for hook in plan.spec.hooks:
        _check_rows(plan, hook, rows[hook])
    shards: dict[str, ShardRecord] = {}
    adopted: list[str] = []
    for hook in plan.spec.hooks:
        shards[hook], ours = _store_shard(store, plan, unit, hook, rows[hook])
        if not ours:
            adopted.append(hook)
    # The receipt last: until it is stored, nobody reads the unit, and a crash leaves shards to adopt.
    facts = {
        "adopted": tuple(adopted),
        "seconds": attempt.seconds + time.monotonic() - started,
        "finished": now(),
    }
    receipt = UnitReceipt(
        plan_fingerprint=plan.fingerprint,
        unit=unit,
        tokens_sha256=tokens_sha256,
        shards=shards,
        attempt=attempt.model_copy(update=facts),
    )
    return commit_receipt(store, plan, receipt)


def commit_void(
    store: ObjectStore,
    plan: HarvestPlan,
    unit: int,
    cause: str,
    *,
    tokens_sha256: str,
    attempt: Attempt,
) -> UnitReceipt:
    """Commit that `unit` has no data; its rows keep their places with weight 0."""
    # Their places, so that the order's arithmetic is that of a whole dataset, and the set can be sealed.
    _check_unit(plan, unit)
    receipt = UnitReceipt(
        plan_fingerprint=plan.fingerprint,
        unit=unit,
        tokens_sha256=tokens_sha256,
        shards={},
        void=cause,
        attempt=attempt.model_copy(update={"finished": now()}),
    )
    return commit_receipt(store, plan, receipt)


def _store_shard(
    store: ObjectStore, plan: HarvestPlan, unit: int, hook: str, rows: Stored
) -> tuple[ShardRecord, bool]:
    """Put one shard or adopt a stored one; returns its record, and whether this call created it."""
    key = shard_key(hook, unit)
    failure: StoreError | None = None
    # Statistics refuse NaN, so the put asks for them before the object is visible, while fsync waits: 0.86 of
    # the floor's rate in place of 0.79. Cached, since the record needs them again.
    facts = cache(lambda: _describe(plan, unit, hook, rows))
    with ThreadPoolExecutor(1, thread_name_prefix="winnow-digest") as beside:
        # The digest takes longest (85 ms of a shard of 150 MB), so it begins with the first slice.
        known = SimpleQueue[Data | None]()
        digest = beside.submit(digest_of, iter(known.get, None))
        try:
            shard = encode_shard(rows, plan.spec.compress, known.put)
        finally:
            known.put(None)  # also after an error: the digest's thread would wait for ever
        for _ in range(PUT_TRIES):
            try:
                if store.put_new(key, shard.pieces, facts, digest.result):
                    return _record(key, shard, digest.result(), facts()), True
                failure = None
            except StoreError as error:
                failure = error
            # A put that failed may have taken effect all the same. What is adopted is the stored object:
            # digests and statistics come from its bytes, not from `rows`.
            try:
                return _adopt(store, plan, unit, hook, rows), False
            except MissingObject:
                continue
    raise failure or StoreError(
        f"unit {unit}, hook {hook!r}: its shard can neither be created nor read at {store.uri}",
        got="'already exists' from the put, 'absent' from the read",
        fix="Use a store with read-after-write consistency",
    )


def make_shard(plan: HarvestPlan, unit: int, hook: str, rows: Stored) -> tuple[memoryview, ShardRecord]:
    """Encode a unit's rows of one hook as a shard; returns its bytes and the receipt's entry for them."""
    _check_rows(plan, hook, rows)
    facts = _describe(plan, unit, hook, rows)
    shard = encode_shard(rows, plan.spec.compress)
    return shard.data, _record(shard_key(hook, unit), shard, shard.sha256(), facts)


def _adopt(store: ObjectStore, plan: HarvestPlan, unit: int, hook: str, rows: Stored) -> ShardRecord:
    """Check the shard of an earlier attempt, compare it with `rows`, and describe the stored bytes."""
    # Not byte for byte: another batch shape or device has other float noise. Rows line up by construction.
    found, record = read_orphan(store, plan, unit, hook)
    apart = relative_difference(found, rows, plan.spec.dtype, unit=unit, hook=hook)
    if apart > plan.spec.adopt_tolerance:
        raise IntegrityError(
            f"unit {unit}, hook {hook!r}: the shard of an earlier attempt at {store.uri}/{record.key} "
            "contains other rows than were just computed",
            expected=f"a relative difference of at most adopt_tolerance = {plan.spec.adopt_tolerance:g}",
            got=f"{apart:.3g}",
            fix="Check that subject, device and code are those of the earlier attempt",
        )
    return record


def read_orphan(store: ObjectStore, plan: HarvestPlan, unit: int, hook: str) -> tuple[Stored, ShardRecord]:
    """Read a shard that no receipt vouches for: its rows [R, D] and a receipt's entry for it.

    Raises:
        IntegrityError, NonFiniteError: It is damaged.
    """
    key = shard_key(hook, unit)
    data = store.get(key)
    packed = plan.spec.compress != "none"
    starts = read_shard_index(data[-INDEX_BYTES:], plan, hook, unit) if packed else slice_starts(plan, hook)
    size = int(starts[-1]) + INDEX_BYTES
    if len(data) != size:
        raise IntegrityError(
            f"unit {unit}, hook {hook!r}: the shard of an earlier attempt at {store.uri}/{key} is incomplete",
            expected=f"{size} bytes",
            got=f"{len(data)} bytes",
            fix="Delete it while nothing else writes to this root, and run the same command again"
            if plan.derived is not None
            else "Run `winnow harvest CONFIG --repair` while no other harvest runs on this root",
        )
    lengths = tuple((np.diff(starts) - 4).tolist()) if packed else ()
    check_index(data[-INDEX_BYTES:], plan, hook, unit, lengths)
    # Computed from the payloads: `decode_slices` then compares them with those stored beside the slices.
    whole, ends = memoryview(data), starts.tolist()
    crcs = tuple(crc32c(whole[a : b - 4]) for a, b in pairwise(ends))
    shard = EncodedShard((data,), crcs, lengths)
    shape = (plan.rows_per_unit, plan.stored_width(hook))
    found = decode_slices(data, 0, SLICES, plan=plan, hook=hook, unit=unit, crc=crcs, lengths=lengths)
    found = found.reshape(shape)
    facts = _describe(plan, unit, hook, found)
    return found, _record(key, shard, shard.sha256(), facts)


def _describe(plan: HarvestPlan, unit: int, hook: str, rows: Stored) -> Statistics:
    spec = plan.spec
    return describe_rows(rows, spec.dtype, spec.sink_multiple, unit < MOMENT_UNITS, unit=unit, hook=hook)


def _record(key: str, shard: EncodedShard, sha256: str, facts: Statistics) -> ShardRecord:
    return ShardRecord(
        key=key,
        bytes=shard.size,
        sha256=sha256,
        slice_crc32c=shard.slice_crc32c,
        slice_lengths=shard.slice_lengths,
        sum_squares=facts.sum_squares,
        largest_norm=facts.largest_norm,
        median_norm=facts.median_norm,
        sinks=facts.sinks,
        moments=facts.moments,
    )


def _check_rows(plan: HarvestPlan, hook: str, rows: Stored) -> None:
    shape, dtype = (plan.rows_per_unit, plan.stored_width(hook)), STORED_DTYPES[plan.spec.dtype]
    if rows.shape != shape or rows.dtype != dtype:
        raise ValueError(
            f"rows of {hook!r} must be {dtype} {list(shape)}, got {rows.dtype} {list(rows.shape)}"
        )


def _check_unit(plan: HarvestPlan, unit: int) -> None:
    if not 0 <= unit < plan.units:
        raise ConfigError("unit", expected=f"0 to {plan.units - 1}", got=unit)


# Seal


def seal(store: ObjectStore, plan: HarvestPlan, progress: _OnProgress | None = None) -> HarvestManifest:
    """Gather every receipt and put manifest.json.

    Safe to repeat, and from several processes at once: the stored manifest is returned.

    Raises:
        WinnowError: Units have no receipt; they are listed.
        IntegrityError: A receipt does not fit the plan, or a manifest of other data is stored.
    """
    standing = find_manifest(store, plan)
    if standing is not None:
        return standing
    manifest = gather(store, plan, progress=progress)
    if settle(store, manifest_key(), manifest.to_json()) is not None:
        # By the dataset's digest: `created` differs between two that are equal.
        theirs = load_manifest(store, plan)
        if theirs.dataset_sha256 != manifest.dataset_sha256:
            raise _differs(store, manifest_key())
        return theirs
    return manifest


def gather(
    store: ObjectStore, plan: HarvestPlan, *, repair: bool = False, progress: _OnProgress | None = None
) -> HarvestManifest:
    """Put the parts, from every unit's receipt of highest revision; returns the manifest that names them.

    Args:
        store: The dataset's root.
        plan: Its plan.
        repair: Overwrite a stored part whose bytes do not have the digest of its name.
        progress: Called after each part.
    """
    receipts = list_receipts(store, plan)
    missing = [unit for unit in range(plan.units) if unit not in receipts]
    if missing:
        raise WinnowError(
            f"{store.uri} cannot be sealed: {len(missing)} of {plan.units} units have no receipt",
            got=f"missing {brief(missing)}",
            fix="Run the harvest again: it harvests the missing units only",
        )
    parts: list[ManifestPart] = []
    digest = DatasetDigest(plan)

    def load(unit: int) -> UnitReceipt:
        return load_receipt(store, plan, unit, receipts[unit])

    total_bytes, sinks, void = 0, dict.fromkeys(plan.spec.hooks, 0), list[int]()
    with ThreadPoolExecutor(_RECEIPT_THREADS, thread_name_prefix="winnow-seal") as pool:
        # A part at a time, and units in order, as the dataset's digest wants them.
        for first in range(0, plan.units, PART_UNITS):
            units = range(first, min(first + PART_UNITS, plan.units))
            batch = list(pool.map(load, units))
            for receipt in batch:
                digest.add(receipt)
                for hook, shard in receipt.shards.items():
                    total_bytes += shard.bytes
                    sinks[hook] += len(shard.sinks)
                if receipt.void is not None:
                    void.append(receipt.unit)
            body, part = encode_part(batch)
            if settle(store, part.key, body) not in (None, body):
                if not repair:
                    raise _differs(store, part.key)
                store.replace(part.key, body, store.version(part.key))
            parts.append(part)
            if progress:
                progress(units.stop, plan.units)
    return HarvestManifest(
        plan_fingerprint=plan.fingerprint,
        units=plan.units,
        rows=plan.rows,
        bytes=total_bytes,
        sinks=sinks,
        void_units=tuple(void),
        dataset_sha256=digest.hexdigest(),
        parts=tuple(parts),
        created=now(),
    )


def brief(units: list[int]) -> str:
    """Unit numbers for a message: the first ten, and how many more."""
    more = f" and {len(units) - 10} more" if len(units) > 10 else ""
    return ", ".join(str(unit) for unit in units[:10]) + more
