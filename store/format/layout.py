"""Keys of objects, the grid of shards, and which token each stored row is. Pure, no I/O.

Letters: W windows in a unit, T context length, R rows in a unit, D d_model.
A row's life: (window, position) -> planned row in its unit -> stored row (permuted) -> slice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.harvest import SLICES, HarvestPlan, row_bytes

PLAN_KEY = "plan.json"
MANIFEST_DIR = "manifest"
RECEIPTS_DIR = "receipts"
FOLLOWERS_DIR = "followers"
RING_DIR = "ring"
BATCHES_DIR = "batches"
READINGS_DIR = "readings"
TOKENS_ARRAY = "tokens"
TOKEN_DIGESTS_ARRAY = "token_digests"
LABELS_GROUP = "labels"
LABEL_DIGESTS_ARRAY = "label_digests"
_ACTIVATIONS_GROUP = "activations"
# Fill values are NaN, so that a missing shard shows in any zarr reader, which takes it for no error.
BFLOAT16_NAN = 0x7FC0
"""fill_value of bfloat16 arrays, which are stored as uint16."""
# Four bytes of -1 as a row's float32 scale are NaN, and so is every value of the row.
INT8_NAN = -1
"""fill_value of int8 arrays."""

STORED_DTYPES: dict[str, np.dtype[np.generic]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "int8": np.dtype("i1"),
}
"""Logical dtype of a plan -> little-endian dtype on disk."""


def manifest_key(revision: int = 0) -> str:
    """Key of the manifest: `manifest.json`, or `manifest.r1.json` after a repair."""
    return f"manifest.r{revision}.json" if revision else "manifest.json"


def receipt_key(unit: int, revision: int = 0) -> str:
    """Key of a unit's receipt: the unit's number in eight digits, with `.rN` after a repair."""
    # Eight digits, so that listings, which are sorted as text, come in unit order.
    return f"{RECEIPTS_DIR}/{unit:08d}{f'.r{revision}' if revision else ''}.json"


def ring_key(unit: int) -> str:
    """Key of the record that a unit's shards were deleted on purpose."""
    return f"{RING_DIR}/{unit:08d}.json"


def batch_key(kind: str, windows: int | None = None) -> str:
    """Key of the batch size of a kind of device, or of the record that memory left it only `windows`."""
    return f"{BATCHES_DIR}/{kind}.json" if windows is None else f"{batches_prefix(kind)}/{windows}.json"


def batches_prefix(kind: str) -> str:
    """Prefix of the records that a kind of device ran out of memory."""
    return f"{BATCHES_DIR}/{kind}"


def array_key(hook: str) -> str:
    """Key of the zarr array of a hook's rows."""
    return f"{_ACTIVATIONS_GROUP}/{hook}"


def shard_key(hook: str, unit: int) -> str:
    """Key of one unit's shard of one hook."""
    return f"{array_key(hook)}/c/{unit}/0"


def tokens_key(unit: int) -> str:
    """Key of one unit's chunk of the token array."""
    return f"{TOKENS_ARRAY}/c/{unit}/0"


def philox_key(*parts: object) -> int:
    """Hash a 128-bit Philox key from its parts."""
    # Hashed and never added: sums such as seed + epoch let two uses share a stream. The separator keeps
    # ("a", "bc") and ("ab", "c") apart.
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def keyed_permutation(length: int, *key: object) -> NDArray[np.int64]:
    """Permute `range(length)` by `key`, with Philox's raw stream; golden vectors in the tests pin it."""
    return keyed_permutations(length, [key])[0]


def keyed_permutations(length: int, keys: Sequence[tuple[object, ...]]) -> NDArray[np.int64]:
    """[keys, length] `keyed_permutation` of each key."""
    raw = np.empty((len(keys), length), np.uint64)
    bits = np.random.Philox(key=0)
    # One generator, set for each key: a new one asks the system for entropy first, which takes 35 us.
    start = bits.state
    for row, key in zip(raw, keys, strict=True):
        number = philox_key(*key)
        start["state"]["key"][:] = number & 2**64 - 1, number >> 64
        bits.state = start
        # The raw stream is part of Philox's definition; NumPy's shuffles and distributions may change.
        row[:] = bits.random_raw(length)
    # Sorting numbers is several times faster than argsort, so each number carries its index in its low bits.
    # They matter only if the high bits of two are equal: then, which is very rare, argsort decides.
    low = np.uint64((1 << max(length - 1, 1).bit_length()) - 1)
    packed = raw & ~low
    packed |= np.arange(length, dtype=np.uint64)
    packed.sort(axis=1)
    if np.any(packed[:, 1:] ^ packed[:, :-1] <= low):
        return np.argsort(raw, axis=1, kind="stable").astype(np.int64, copy=False)
    packed &= low
    return packed.view(np.int64)


def row_permutation(plan: HarvestPlan, unit: int) -> NDArray[np.int64]:
    """[R] planned row of each stored row of `unit`; the same for every hook."""
    return keyed_permutation(plan.rows_per_unit, "winnow.rows.v1", plan.spec.seed, unit)


def locate(plan: HarvestPlan, rows: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find which token each stored row is.

    Args:
        plan: The dataset's plan.
        rows: Global row numbers, `unit * rows_per_unit + stored row`, any shape.

    Returns:
        (window over the dataset, position in the window), each of `rows`'s shape.

    Raises:
        IndexError: A row outside the dataset.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if rows.size and (rows.min() < 0 or rows.max() >= plan.rows):
        raise IndexError(f"rows must lie in [0, {plan.rows}), got {rows.min()} to {rows.max()}")
    units, stored = np.divmod(rows, plan.rows_per_unit)
    # A permutation is made once per unit, however many of the rows are in it.
    planned = np.empty_like(stored)
    for unit in np.unique(units):
        chosen = units == unit
        planned[chosen] = row_permutation(plan, int(unit))[stored[chosen]]
    window, position = np.divmod(planned, plan.rows_per_window)
    return units * plan.spec.windows_per_unit + window, position + plan.spec.drop_leading


def slice_bytes(plan: HarvestPlan, hook: str) -> int:
    """Bytes of one uncompressed slice with its crc32c, in a shard of `hook`."""
    return plan.rows_per_slice * row_bytes(plan.spec.dtype, plan.d_model(hook)) + 4


def slice_starts(plan: HarvestPlan, hook: str, lengths: Sequence[int] = ()) -> NDArray[np.int64]:
    """[65] offset of each slice of a shard, and the last one's end, in bytes.

    Args:
        plan: The dataset's plan.
        hook: The shard's hook.
        lengths: The receipt's `slice_lengths`: bytes of compressed slices, without their crc32c.
    """
    # `len`, since an array has no truth value.
    if not len(lengths):
        return np.arange(SLICES + 1, dtype=np.int64) * slice_bytes(plan, hook)
    starts = np.zeros(SLICES + 1, np.int64)
    np.cumsum(np.asarray(lengths, np.int64) + 4, out=starts[1:])
    return starts


def slice_range(plan: HarvestPlan, hook: str, first: int, stop: int) -> tuple[int, int]:
    """Byte range [start, end) of slices `first` to `stop - 1` in an uncompressed shard of `hook`."""
    if not 0 <= first < stop <= SLICES:
        raise IndexError(f"slices must satisfy 0 <= first < stop <= {SLICES}, got {first}, {stop}")
    size = slice_bytes(plan, hook)
    return first * size, stop * size
