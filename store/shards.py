"""One shard, one unit of one hook: encode, decode, check, describe. No I/O.

Letters: R rows in a unit, D d_model, S slices (64), P rows in a slice (R / 64).
A shard is zarr v3's `sharding_indexed` layout: S inner chunks, each the slice's little-endian values
in C order and their crc32c; then the index, (offset, length) as two u64 a slice, and its crc32c.
Spec: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from schemas.errors import IntegrityError, NonFiniteError
from schemas.harvest import SLICES, HarvestPlan, Moments
from store.layout import STORED_DTYPES, slice_bytes
from store.objects import Data

Stored = NDArray[np.generic]
"""Rows in the dtype on disk: uint16 (logical bfloat16), float16 or float32."""
INDEX_BYTES = SLICES * 16 + 4
"""Length of a shard's index with its crc32c."""
_EXPONENTS = {
    "bfloat16": np.uint16(0x7F80),
    "float16": np.uint16(0x7C00),
    "float32": np.uint32(0x7F800000),
}
"""The exponent's bits, all of them set in NaN and infinity only."""
_CHUNK_VALUES = 1 << 17
"""Values handled at a time by conversions and statistics: 512 KiB as float32, inside the cache."""


def crc32c(data: Data | NDArray[np.uint8]) -> int:
    """crc32c (Castagnoli) of contiguous bytes, without a copy."""
    # The C function refuses writable buffers, and takes a NumPy view of any buffer.
    value = cast(Callable[..., int], google_crc32c.value)  # pyright: ignore[reportUnknownMemberType]
    return value(np.frombuffer(data, np.uint8))


# Values


def to_stored(rows: NDArray[np.float32], dtype: str) -> Stored:
    """float32 values as they are stored: round-to-nearest-even, NaN stays NaN, overflow is infinity.

    Args:
        rows: float32, any shape.
        dtype: `bfloat16`, `float16` or `float32`.

    Returns:
        A new array of `rows`'s shape in the dtype on disk.
    """
    source = np.ascontiguousarray(rows, dtype=np.float32)
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return source.astype(STORED_DTYPES[dtype])
    stored = np.empty(source.shape, np.uint16)
    bits, flat = source.reshape(-1).view(np.uint32), stored.reshape(-1)
    for start in range(0, bits.size, _CHUNK_VALUES):
        part = bits[start : start + _CHUNK_VALUES]
        rounded = part >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += part
        rounded >>= np.uint32(16)
        nan = (part & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        if nan.any():
            rounded[nan] = (part[nan] >> np.uint32(16)) | np.uint32(0x40)
        flat[start : start + _CHUNK_VALUES] = rounded
    return stored


def to_float32(stored: Stored, dtype: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Stored values as float32, exactly.

    Args:
        stored: Values in the dtype on disk, any shape.
        dtype: The plan's logical dtype.
        out: Where to write, of `stored`'s shape; a new array where None.
    """
    if out is None:
        out = np.empty(stored.shape, np.float32)
    if dtype == "bfloat16":
        np.left_shift(stored, 16, out=out.view(np.uint32), casting="unsafe", dtype=np.uint32)
    else:
        np.copyto(out, stored, casting="unsafe")
    return out


def _pieces(rows: Stored, dtype: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """`rows` [R, D] as float32 blocks of whole rows with their first row; the block is reused."""
    step = max(1, _CHUNK_VALUES // rows.shape[1])
    space = np.empty((step, rows.shape[1]), np.float32)
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        yield start, to_float32(part, dtype, space[: part.shape[0]])


# Statistics


@dataclass(frozen=True)
class Statistics:
    """What a `ShardRecord` says about its rows; fields as there."""

    sum_squares: float
    largest_norm: float
    median_norm: float
    sinks: tuple[int, ...]
    moments: Moments | None


def check_finite(rows: Stored, dtype: str, *, unit: int, hook: str) -> None:
    """Refuse rows [R, D] that hold a NaN or infinity, at the cost of one look at the exponents.

    Raises:
        NonFiniteError: As from `square_norms`.
    """
    exponent = _EXPONENTS[dtype]
    flat = np.ascontiguousarray(rows).reshape(-1).view(exponent.dtype)
    for start in range(0, flat.size, _CHUNK_VALUES):
        if (flat[start : start + _CHUNK_VALUES] & exponent).max() == exponent:
            square_norms(rows, dtype, unit=unit, hook=hook)
            return


def square_norms(rows: Stored, dtype: str, *, unit: int, hook: str) -> NDArray[np.float64]:
    """[R] squared norm of each row of [R, D].

    Squares and their pairwise sums over a row are float32 (relative error about 1e-7), float64 where
    that overflows: NumPy's summation order is fixed, so equal bytes give equal numbers.

    Raises:
        NonFiniteError: A NaN or infinity; names unit, hook and the first bad row.
    """
    squares = np.empty(rows.shape[0], np.float64)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for start, piece in _pieces(rows, dtype):
            part = squares[start : start + piece.shape[0]]
            part[:] = np.add.reduce(np.multiply(piece, piece), axis=1)
            bad = np.flatnonzero(~np.isfinite(part))
            if bad.size:
                part[bad] = np.add.reduce(np.square(piece[bad].astype(np.float64)), axis=1)
                bad = bad[~np.isfinite(part[bad])]
            if bad.size:
                raise NonFiniteError(
                    f"unit {unit}, hook {hook!r}, stored row {start + int(bad[0])} holds NaN or infinity",
                    expected="finite activations",
                    got=f"{bad.size} bad rows among {piece.shape[0]} looked at",
                    fix="Compute the subject in float32, or store as bfloat16 if float16 overflows",
                )
    return squares


def describe_rows(
    rows: Stored,
    dtype: str,
    sink_multiple: float,
    with_moments: bool,
    *,
    unit: int,
    hook: str,
) -> Statistics:
    """Norms, sinks and (asked for) moments of one shard's rows [R, D].

    Raises:
        NonFiniteError: A NaN or infinity; names unit, hook and the first bad row.
    """
    squares = square_norms(rows, dtype, unit=unit, hook=hook)
    norms = np.sqrt(squares)
    median = float(np.median(norms))
    sinks = norms > sink_multiple * median
    return Statistics(
        sum_squares=float(squares.sum()),
        largest_norm=float(norms.max()),
        median_norm=median,
        sinks=tuple(np.flatnonzero(sinks).tolist()),
        moments=_moments(rows, dtype, ~sinks) if with_moments else None,
    )


def _moments(rows: Stored, dtype: str, kept: NDArray[np.bool_]) -> Moments:
    sums, squares = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    for start, piece in _pieces(rows, dtype):
        chosen = piece[kept[start : start + piece.shape[0]]].astype(np.float64)
        sums += chosen.sum(axis=0)
        squares += np.square(chosen).sum(axis=0)
    return Moments(rows=int(kept.sum()), sums=tuple(sums.tolist()), squares=tuple(squares.tolist()))


def relative_difference(found: Stored, ours: Stored, dtype: str, *, unit: int, hook: str) -> float:
    """||found - ours|| / ||ours|| in Frobenius norm; the worse of all rows and the rows without sinks.

    A few sink rows hold most of the norm; on their own they would hide that all others differ.
    """
    base = square_norms(ours, dtype, unit=unit, hook=hook)
    apart = np.empty_like(base)
    step = max(1, _CHUNK_VALUES // ours.shape[1])
    for start in range(0, ours.shape[0], step):
        theirs = to_float32(found[start : start + step], dtype).astype(np.float64)
        theirs -= to_float32(ours[start : start + step], dtype)
        apart[start : start + step] = np.square(theirs).sum(axis=1)
    usual = base <= 100 * np.median(base)
    shares = [(apart.sum(), base.sum()), (apart[usual].sum(), base[usual].sum())]
    return max(float(np.sqrt(a / b)) if b else float("inf") if a else 0.0 for a, b in shares)


# Encoding


@dataclass(frozen=True)
class EncodedShard:
    """A shard ready to be put."""

    data: memoryview
    """The whole object."""
    slice_crc32c: tuple[int, ...]
    """crc32c of each slice's payload."""


def encode_shard(rows: Stored) -> EncodedShard:
    """Encode a unit's rows.

    Args:
        rows: [R, D] in the dtype on disk and in stored order; R a multiple of 64.
    """
    source = np.ascontiguousarray(rows)
    if source.ndim != 2 or source.shape[0] % SLICES or not source.size:
        raise ValueError(f"rows must be [R, D] with R a multiple of {SLICES}, got shape {rows.shape}")
    raw = source.view(np.uint8).reshape(SLICES, -1)
    size = raw.shape[1] + 4
    data = np.empty(SLICES * size + INDEX_BYTES, np.uint8)
    chunks = data[: SLICES * size].reshape(SLICES, size)
    crcs = np.empty(SLICES, "<u4")
    for number in range(SLICES):
        chunks[number, :-4] = raw[number]
        crcs[number] = crc32c(raw[number])
    chunks[:, -4:] = crcs.view(np.uint8).reshape(SLICES, 4)
    data[SLICES * size :] = np.frombuffer(shard_index(size), np.uint8)
    return EncodedShard(data.data, tuple(crcs.tolist()))


def shard_index(size: int) -> bytes:
    """The index of a shard whose slices take `size` bytes each, crc32c included."""
    index = np.empty((SLICES, 2), "<u8")
    index[:, 0] = np.arange(SLICES, dtype=np.uint64) * np.uint64(size)
    index[:, 1] = size
    body = index.tobytes()
    return body + crc32c(body).to_bytes(4, "little")


# Decoding


def check_index(footer: Data, plan: HarvestPlan, hook: str, unit: int) -> None:
    """Check a shard's last `INDEX_BYTES` bytes; IntegrityError names unit and hook."""
    if bytes(footer) != shard_index(slice_bytes(plan, hook)):
        whole = len(footer) == INDEX_BYTES
        sound = whole and crc32c(bytes(footer[:-4])) == int.from_bytes(footer[-4:], "little")
        raise IntegrityError(
            f"unit {unit}, hook {hook!r}: the shard's index is wrong",
            expected=f"{SLICES} slices of {slice_bytes(plan, hook)} bytes and their crc32c",
            got="another layout" if sound else "bytes that fail their crc32c",
            fix=_REPAIR,
        )


def decode_slices(
    data: Data,
    first: int,
    stop: int,
    *,
    plan: HarvestPlan,
    hook: str,
    unit: int,
    crc: Sequence[int],
) -> NDArray[Any]:
    """Check slices `first` to `stop - 1` and view them as rows.

    Args:
        data: The bytes of `layout.slice_range(plan, hook, first, stop)`; a whole shard will do too
            where `first` is 0.
        first: First slice.
        stop: One past the last slice.
        plan: The dataset's plan.
        hook: Which hook.
        unit: Which unit.
        crc: The receipt's `slice_crc32c`, all 64 of them.

    Returns:
        [stop - first, P, D] in the dtype on disk: a read-only view of `data`, no copy. Slices are 4
        bytes apart; `.reshape(-1, D)` gives rows with one copy.

    Raises:
        IntegrityError: Too few bytes or a wrong crc32c; names unit, hook and slice.
    """
    size, dtype, width = slice_bytes(plan, hook), STORED_DTYPES[plan.spec.dtype], plan.d_model(hook)
    count = stop - first
    raw = np.frombuffer(data, np.uint8)
    if raw.size < count * size:
        raise IntegrityError(
            f"unit {unit}, hook {hook!r}, slice {first + raw.size // size}: the shard ends too early",
            expected=f"{count * size} bytes",
            got=f"{raw.size} bytes",
            fix=_REPAIR,
        )
    chunks = raw[: count * size].reshape(count, size)
    stored = np.ascontiguousarray(chunks[:, -4:]).view("<u4").reshape(count)
    for number in range(count):
        check_slice(
            chunks[number, :-4],
            int(stored[number]),
            crc[first + number],
            unit=unit,
            hook=hook,
            number=first + number,
        )
    shape = (count, plan.rows_per_slice, width)
    strides = (size, width * dtype.itemsize, dtype.itemsize)
    rows: NDArray[Any] = np.ndarray(shape, dtype, buffer=cast(Any, chunks), strides=strides)
    rows.flags.writeable = False
    return rows


def check_slice(
    payload: NDArray[np.uint8], stored: int, crc: int, *, unit: int, hook: str, number: int
) -> None:
    """Check a slice's bytes against the crc32c beside it and the receipt's; IntegrityError names it."""
    found = crc32c(payload)
    if found != crc or found != stored:
        raise IntegrityError(
            f"unit {unit}, hook {hook!r}, slice {number}: wrong bytes",
            expected=f"crc32c {crc:08x}",
            got=f"{found:08x} over the payload, {stored:08x} stored beside it",
            fix=_REPAIR,
        )


_REPAIR = "Run `winnow verify ROOT --level full` to see everything that is damaged"


# Plain chunks (tokens, token digests): values and their crc32c


def encode_chunk(values: NDArray[Any]) -> bytes:
    """A zarr chunk with codecs bytes (little) and crc32c."""
    body = np.ascontiguousarray(values).tobytes()
    return body + crc32c(body).to_bytes(4, "little")


def decode_chunk(data: Data, dtype: str, shape: tuple[int, ...], *, what: str) -> NDArray[Any]:
    """The inverse of `encode_chunk`.

    Args:
        data: The chunk object's bytes.
        dtype: NumPy dtype on disk, such as `<u4`.
        shape: The chunk's shape.
        what: Named in errors, such as `tokens of unit 3`.

    Returns:
        A read-only array of `shape`, a view of `data`.

    Raises:
        IntegrityError: Wrong length or crc32c.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if len(data) != size + 4:
        raise IntegrityError(f"{what}: wrong length", expected=f"{size + 4} bytes", got=f"{len(data)} bytes")
    raw = np.frombuffer(data, np.uint8)
    promised = int.from_bytes(raw[size:].tobytes(), "little")
    found = crc32c(raw[:size])
    if found != promised:
        raise IntegrityError(
            f"{what}: wrong bytes", expected=f"crc32c {promised:08x}", got=f"{found:08x}", fix=_REPAIR
        )
    values: NDArray[Any] = raw[:size].view(dtype).reshape(shape)
    values.flags.writeable = False
    return values
