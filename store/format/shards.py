"""One shard, one unit of one hook: encode, decode, check, describe. No I/O.

Letters: R rows in a unit, D d_model, S slices (64), P rows in a slice (R / 64).
A shard is zarr v3's `sharding_indexed` layout: S inner chunks one after another, each the slice's payload
(its little-endian values in C order, or those as one zstd frame) and the payload's crc32c; then the index,
(offset, length) as two u64 a slice, and its crc32c.
Spec: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numcodecs import zstd  # pyright: ignore
from numpy.typing import NDArray

from winnow.schemas.errors import IntegrityError, NonFiniteError
from winnow.schemas.harvest import SCALE_BYTES, SLICES, Compress, HarvestPlan, Moments
from winnow.store.format.checksum import crc32c as crc32c
from winnow.store.format.layout import STORED_DTYPES, slice_bytes, slice_starts
from winnow.store.objects import Data, Pieces, joined

Stored = NDArray[np.generic]
"""Rows in the dtype on disk: uint16 (logical bfloat16), float16 or float32, [..., D]; or int8 [..., D + 4],
each row's D values and then its scale, float32 little-endian: a value is `int8 * scale`."""
INDEX_BYTES = SLICES * 16 + 4
"""Length of a shard's index with its crc32c."""
# 256 KiB as float32: what is converted stays in the cache.
_CHUNK_VALUES = 1 << 16
"""Values converted at a time."""
# Never to be changed: another number moves the last bits of moments, and so the digests of receipts.
_BLOCK_VALUES = 1 << 17
"""Values squared and summed at a time: 512 KiB."""
_TINY = np.finfo(np.float32).tiny
# Higher levels gain next to nothing on activations.
ZSTD_LEVEL = 1
"""Level of compressed slices."""


# Values


def to_stored(rows: NDArray[np.float32], dtype: str) -> Stored:
    """Convert float32 values to the stored dtype: round-to-nearest-even, NaN stays NaN, overflow is infinity.

    Args:
        rows: float32, any shape; [..., D] for int8, which has a scale per row.
        dtype: `bfloat16`, `float16`, `float32` or `int8`.

    Returns:
        A new array in the dtype on disk, see `Stored`. The error of an int8 value is at most half of its
        row's scale; NaN or infinity in a row makes its scale so.
    """
    source = np.ascontiguousarray(rows, dtype=np.float32)
    if dtype == "int8":
        return _to_int8(source)
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return source.astype(STORED_DTYPES[dtype])
    stored = np.empty(source.shape, np.uint16)
    bits, flat = source.reshape(-1).view(np.uint32), stored.reshape(-1)
    for start in range(0, bits.size, _CHUNK_VALUES):
        part = bits[start : start + _CHUNK_VALUES]
        # To nearest even: 0x7FFF and the lowest kept bit carry above a tie, and at a tie if that bit is 1.
        rounded = part >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += part
        rounded >>= np.uint32(16)
        # That sum makes another number of a NaN, or wraps: 0x40 keeps it one, its low payload being cut off.
        nan = (part & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        if nan.any():
            rounded[nan] = (part[nan] >> np.uint32(16)) | np.uint32(0x40)
        flat[start : start + _CHUNK_VALUES] = rounded
    return stored


def _to_int8(rows: NDArray[np.float32]) -> Stored:
    stored = np.empty((*rows.shape[:-1], rows.shape[-1] + SCALE_BYTES), np.int8)
    source, flat = rows.reshape(-1, rows.shape[-1]), stored.reshape(-1, stored.shape[-1])
    step = max(1, _CHUNK_VALUES // rows.shape[-1])
    with np.errstate(invalid="ignore"):
        for start in range(0, len(source), step):
            part = source[start : start + step]
            # Never 0, so that a row of zeros can be divided; NaN stays NaN, and is refused later.
            scale = np.maximum(np.abs(part).max(axis=1, keepdims=True) / np.float32(127), _TINY)
            scaled = part / scale
            flat[start : start + step, :-SCALE_BYTES] = np.rint(scaled, out=scaled)
            flat[start : start + step, -SCALE_BYTES:] = scale.astype("<f4").view(np.int8)
    return stored


def to_float32(stored: Stored, dtype: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Convert stored values to float32, exactly.

    Args:
        stored: Values in the dtype on disk, see `Stored`.
        dtype: The plan's logical dtype.
        out: Array of the rows' shape to write to; None makes a new one.
    """
    if out is None:
        out = np.empty((*stored.shape[:-1], _width(stored, dtype)), np.float32)
    if dtype == "int8":
        scale = np.ascontiguousarray(stored[..., -SCALE_BYTES:]).view("<f4")
        with np.errstate(invalid="ignore"):  # the scale may be infinite, or NaN from a missing shard
            return np.multiply(cast(Any, stored)[..., :-SCALE_BYTES], scale, out=out)
    if dtype != "bfloat16":
        np.copyto(out, stored, casting="unsafe")
        return out
    bits = out.view(np.uint32)
    if stored.size <= _CHUNK_VALUES or not (bits.flags.c_contiguous and stored.flags.c_contiguous):
        np.copyto(bits, stored, casting="unsafe")
        np.left_shift(bits, 16, out=bits)
        return out
    flat, source = bits.reshape(-1), stored.reshape(-1)
    for start in range(0, flat.size, _CHUNK_VALUES):  # a chunk is shifted while it is in the cache
        part = flat[start : start + _CHUNK_VALUES]
        np.copyto(part, source[start : start + _CHUNK_VALUES], casting="unsafe")
        np.left_shift(part, 16, out=part)
    return out


def _width(rows: Stored, dtype: str) -> int:
    """D of stored rows."""
    return rows.shape[-1] - (SCALE_BYTES if dtype == "int8" else 0)


def _blocks(rows: Stored, dtype: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield `rows` [R, D] as float32 blocks of whole rows with their first row; the block is reused."""
    width = _width(rows, dtype)
    step = max(1, _BLOCK_VALUES // width)
    space = np.empty((step, width), np.float32)
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        yield start, to_float32(part, dtype, space[: part.shape[0]])


# Statistics


@dataclass(frozen=True)
class Statistics:
    """A `ShardRecord`'s facts about its rows; fields as there."""

    sum_squares: float
    largest_norm: float
    median_norm: float
    sinks: tuple[int, ...]
    moments: Moments | None


def square_norms(rows: Stored, dtype: str, *, unit: int, hook: str) -> NDArray[np.float64]:
    """[R] squared norm of each row of [R, D].

    Squares and their pairwise sums over a row are float32 (relative error about 1e-7), or float64 if that
    overflows.

    Raises:
        NonFiniteError: A NaN or infinity; names unit, hook and the first bad row.
    """
    # NumPy's summation order is fixed, so equal bytes give equal numbers: receipts' digests depend on it.
    squares = np.empty(rows.shape[0], np.float64)
    step = max(1, _BLOCK_VALUES // rows.shape[1])
    space = np.empty((min(step, len(rows)), _width(rows, dtype)), np.float32)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            values = to_float32(block, dtype, space[: len(block)])
            part = squares[start : start + len(block)]
            part[:] = np.add.reduce(np.multiply(values, values, out=values), axis=1)
            # The sum is the look for NaN as well: a pass of its own over the values took 80 ms of CPU per GB.
            bad = np.flatnonzero(~np.isfinite(part))
            if bad.size:
                # Finite values above 1.8e19 have squares beyond float32.
                part[bad] = np.add.reduce(np.square(to_float32(block[bad], dtype).astype(np.float64)), axis=1)
                bad = bad[~np.isfinite(part[bad])]
            if bad.size:
                raise NonFiniteError(
                    f"unit {unit}, hook {hook!r}, stored row {start + int(bad[0])} holds NaN or infinity",
                    expected="finite activations",
                    got=f"{bad.size} bad rows among {len(block)} looked at",
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
    """Compute norms, sinks and, if asked for, moments of one shard's rows [R, D].

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
    sums, squares = np.zeros((2, _width(rows, dtype)))
    for start, piece in _blocks(rows, dtype):
        part = kept[start : start + piece.shape[0]]
        # Most blocks have no sink: those are not copied.
        chosen = (piece if part.all() else piece[part]).astype(np.float64)
        sums += chosen.sum(axis=0)
        squares += np.square(chosen, out=chosen).sum(axis=0)
    return Moments(rows=int(kept.sum()), sums=tuple(sums.tolist()), squares=tuple(squares.tolist()))


def relative_difference(found: Stored, ours: Stored, dtype: str, *, unit: int, hook: str) -> float:
    """||found - ours|| / ||ours|| in Frobenius norm: the larger of all rows' and that without sinks."""
    base = square_norms(ours, dtype, unit=unit, hook=hook)
    apart = np.empty_like(base)
    step = max(1, _CHUNK_VALUES // ours.shape[1])
    for start in range(0, ours.shape[0], step):
        theirs = to_float32(found[start : start + step], dtype).astype(np.float64)
        theirs -= to_float32(ours[start : start + step], dtype)
        apart[start : start + step] = np.square(theirs).sum(axis=1)
    # A few sinks have most of the norm (position 0 of SmolLM2's layer 15: 99.7 % of the variance) and would
    # hide that all other rows differ. Ten times the median norm, as `sink_multiple`, squared.
    usual = base <= 100 * np.median(base)
    shares = [(apart.sum(), base.sum()), (apart[usual].sum(), base[usual].sum())]
    return max(float(np.sqrt(a / b)) if b else float("inf") if a else 0.0 for a, b in shares)


# Encoding


@dataclass(frozen=True)
class EncodedShard:
    """A shard ready to be put."""

    pieces: Pieces
    """The object's bytes in order: views of the rows (or compressed slices), checksums and the index."""
    slice_crc32c: tuple[int, ...]
    """crc32c of each slice's payload."""
    slice_lengths: tuple[int, ...]
    """Bytes of each slice's payload if it is compressed; otherwise empty."""

    @property
    def size(self) -> int:
        """Bytes of the object."""
        return sum(len(piece) for piece in self.pieces)

    @property
    def data(self) -> memoryview:
        """The whole object in one buffer: a copy."""
        return memoryview(joined(self.pieces))

    def sha256(self) -> str:
        """Digest of the object."""
        return digest_of(self.pieces)


def encode_shard(
    rows: Stored, compress: Compress = "none", took: Callable[[Data], object] | None = None
) -> EncodedShard:
    """Encode a unit's rows, without a copy unless they are compressed: they must not change while it is used.

    Args:
        rows: [R, D] (see `Stored`) in stored order; R a multiple of 64.
        compress: The plan's codec.
        took: Called with each piece as soon as it is known, in order, so that a digest can begin at once.
    """
    source = np.ascontiguousarray(rows)
    if source.ndim != 2 or source.shape[0] % SLICES or not source.size:
        raise ValueError(f"rows must be [R, D] with R a multiple of {SLICES}, got shape {rows.shape}")
    pieces, crcs, lengths = list[Data](), list[int](), list[int]()

    def add(piece: Data) -> None:
        pieces.append(piece)
        if took:
            took(piece)

    for raw in source.view(np.uint8).reshape(SLICES, -1):
        payload: Data = raw.data if compress == "none" else pack(raw)
        lengths.append(len(payload))
        add(payload)
        crcs.append(crc32c(payload))
        add(crcs[-1].to_bytes(4, "little"))
    add(shard_index(np.cumsum([0, *(length + 4 for length in lengths)])))
    return EncodedShard(tuple(pieces), tuple(crcs), tuple(lengths) if compress == "zstd" else ())


def digest_of(pieces: Iterable[Data]) -> str:
    """Compute the SHA-256 of pieces, in hex."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def pack(payload: NDArray[np.uint8]) -> bytes:
    """Compress a slice's values to one zstd frame."""
    return cast(bytes, zstd.compress(payload, ZSTD_LEVEL))  # pyright: ignore[reportUnknownMemberType]


def packed_bound(size: int) -> int:
    """Bound the bytes that zstd makes of `size` (`ZSTD_compressBound`, and a little more)."""
    # Lengths in receipts and indices are checked against it before anything of that length is allocated.
    return size + (size >> 8) + (1 << 7)


def unpack(frame: NDArray[np.uint8], out: NDArray[np.uint8], *, unit: int, hook: str, number: int) -> None:
    """Decompress a slice's zstd frame, whose crc32c was checked before.

    Args:
        frame: [bytes] The payload as stored.
        out: [bytes] Receives the values, of exactly their length.
        unit: For messages.
        hook: For messages.
        number: The slice, for messages.

    Raises:
        IntegrityError: Not a frame of that many bytes.
    """
    try:
        # A frame of fewer bytes with a true checksum would leave the rest of `out` as it was: wrong rows.
        if _frame_content(frame[:18].tobytes()) != out.size:
            raise ValueError("a frame of another size")
        zstd.decompress(frame, out)  # pyright: ignore[reportUnknownMemberType]
    except (RuntimeError, ValueError) as error:
        raise IntegrityError(
            f"unit {unit}, hook {hook!r}, slice {number}: cannot be decompressed",
            expected=f"a zstd frame of {out.size} bytes",
            got=str(error)[:200],
            fix=_REPAIR,
        ) from error


def _frame_content(header: bytes) -> int | None:
    """Read the content size of a zstd frame's header (RFC 8878, 3.1.1.1); None if it has none."""
    if len(header) < 6 or header[:4] != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = header[4]
    single = descriptor >> 5 & 1
    length = (single, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    value = int.from_bytes(header[start : start + length], "little")
    # Two bytes hold the size less 256, since smaller sizes fit in one.
    return None if not length else value + 256 if length == 2 else value


def shard_index(starts: NDArray[np.int64]) -> bytes:
    """Make the index of a shard, with its crc32c; `starts` as from `layout.slice_starts`."""
    index = np.empty((SLICES, 2), "<u8")
    index[:, 0] = starts[:-1]
    index[:, 1] = np.diff(starts)
    body = index.tobytes()
    return body + crc32c(body).to_bytes(4, "little")


def read_shard_index(footer: Data, plan: HarvestPlan, hook: str, unit: int) -> NDArray[np.int64]:
    """[65] Read `slice_starts` from a shard's last `INDEX_BYTES` bytes, if no receipt has them.

    Raises:
        IntegrityError: The index is damaged, has gaps, or slices of an impossible length.
    """
    index = np.frombuffer(footer, "<u8", SLICES * 2) if len(footer) == INDEX_BYTES else np.zeros(0, "<u8")
    index = index.reshape(-1, 2)
    most = packed_bound(slice_bytes(plan, hook) - 4) + 4
    if index.size and index[:, 1].min() > 4 and index[:, 1].max() <= most:
        starts = np.zeros(SLICES + 1, np.int64)
        np.cumsum(index[:, 1], out=starts[1:])
        # Offsets and checksum are compared by making the one index that these lengths allow.
        if bytes(footer) == shard_index(starts):
            return starts
    raise IntegrityError(
        f"unit {unit}, hook {hook!r}: the shard's index is wrong",
        expected=f"{SLICES} slices one after another, and their crc32c",
        fix=_REPAIR,
    )


def check_index(footer: Data, plan: HarvestPlan, hook: str, unit: int, lengths: Sequence[int] = ()) -> None:
    """Check a shard's last `INDEX_BYTES` bytes; IntegrityError names unit and hook.

    Args:
        footer: Those bytes.
        plan: The dataset's plan.
        hook: The shard's hook.
        unit: The shard's unit.
        lengths: The receipt's `slice_lengths`.
    """
    # Compared whole: plan and receipt determine every byte of it. What follows only words the message.
    if bytes(footer) != shard_index(slice_starts(plan, hook, lengths)):
        whole = len(footer) == INDEX_BYTES
        sound = whole and crc32c(bytes(footer[:-4])) == int.from_bytes(footer[-4:], "little")
        sizes = "their lengths" if len(lengths) else f"{slice_bytes(plan, hook)} bytes"
        raise IntegrityError(
            f"unit {unit}, hook {hook!r}: the shard's index is wrong",
            expected=f"{SLICES} slices of {sizes} and their crc32c",
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
    lengths: Sequence[int] = (),
) -> NDArray[Any]:
    """Check slices `first` to `stop - 1` and return their rows.

    Args:
        data: The shard's bytes from slice `first` on, up to the end of slice `stop - 1` or further.
        first: First slice.
        stop: One past the last slice.
        plan: The dataset's plan.
        hook: The shard's hook.
        unit: The shard's unit.
        crc: The receipt's `slice_crc32c`, all 64 of them.
        lengths: The receipt's `slice_lengths`.

    Returns:
        [stop - first, P, D] (see `Stored`). Without compression it is a read-only view of `data`, whose
        slices are 4 bytes apart; `.reshape(-1, D)` makes rows with one copy.

    Raises:
        IntegrityError: Too few bytes or a wrong crc32c; names unit, hook and slice.
    """
    size, dtype, width = slice_bytes(plan, hook), STORED_DTYPES[plan.spec.dtype], plan.stored_width(hook)
    starts = slice_starts(plan, hook, lengths)[first : stop + 1]
    starts = starts - starts[0]
    raw = np.frombuffer(data, np.uint8)
    if raw.size < starts[-1]:
        # The first slice that is not whole, for the message.
        cut = first + int(np.searchsorted(starts, raw.size, side="right")) - 1
        raise IntegrityError(
            f"unit {unit}, hook {hook!r}, slice {cut}: the shard ends too early",
            expected=f"{starts[-1]} bytes",
            got=f"{raw.size} bytes",
            fix=_REPAIR,
        )
    shape = (stop - first, plan.rows_per_slice, width)
    unpacked = np.empty((stop - first, size - 4), np.uint8) if len(lengths) else None
    for place, (start, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        number, payload = first + place, raw[start : end - 4]
        stored = int.from_bytes(raw[end - 4 : end].tobytes(), "little")
        check_slice(payload, stored, crc[number], unit=unit, hook=hook, number=number)
        if unpacked is not None:
            unpack(payload, unpacked[place], unit=unit, hook=hook, number=number)
    if unpacked is not None:
        return unpacked.view(dtype).reshape(shape)
    # Strides of `size` skip the crc32c between slices, so that nothing is copied.
    strides = (size, width * dtype.itemsize, dtype.itemsize)
    rows: NDArray[Any] = np.ndarray(shape, dtype, buffer=cast(Any, raw), strides=strides)
    rows.flags.writeable = False
    return rows


def check_slice(
    payload: NDArray[np.uint8], stored: int, crc: int, *, unit: int, hook: str, number: int
) -> None:
    """Check a slice's bytes against the crc32c beside it and the receipt's; IntegrityError names it."""
    # Both: the receipt's alone would pass a shard that other zarr readers refuse, the stored one alone a
    # slice of another unit.
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
    """Encode values as a zarr chunk with the codecs bytes (little-endian) and crc32c."""
    body = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    return b"".join((body, crc32c(body).to_bytes(4, "little")))


def decode_chunk(data: Data, dtype: str, shape: tuple[int, ...], *, what: str) -> NDArray[Any]:
    """Check and decode a chunk made by `encode_chunk`.

    Args:
        data: The chunk object's bytes.
        dtype: NumPy dtype on disk, such as `<u4`.
        shape: The chunk's shape.
        what: Name for messages, such as `tokens of unit 3`.

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
