"""Encoding against zarr itself, conversions against torch, statistics against a plain float64 sum."""

from __future__ import annotations

import asyncio

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import MemoryStore

from winnow.harvester.run.worker import to_int8 as int8_by_torch
from winnow.schemas.base import sha256_hex
from winnow.schemas.errors import IntegrityError, NonFiniteError
from winnow.schemas.harvest import SLICES, Compress
from winnow.store.format import shards
from winnow.store.format.layout import STORED_DTYPES, shard_key, slice_bytes, slice_range, slice_starts
from winnow.store.format.shards import (
    INDEX_BYTES,
    EncodedShard,
    check_index,
    crc32c,
    decode_chunk,
    decode_slices,
    describe_rows,
    encode_chunk,
    encode_shard,
    pack,
    read_shard_index,
    relative_difference,
    shard_index,
    square_norms,
    to_float32,
    to_stored,
    unpack,
)
from winnow.store.format.zarr_metadata import zarr_objects
from winnow.store.objects import Data
from winnow.store.read.torch_stream import widen
from winnow.store.testing import make_plan, stored_rows, synthetic_rows

HOOK = "resid_post.1"
DTYPES = ["bfloat16", "float16", "float32"]


# Conversions


def torch_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200))
def test_bfloat16_rounds_as_torch_does(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    ours, theirs = to_stored(values, "bfloat16"), torch_bfloat16(values)
    nan = np.isnan(values)
    assert np.array_equal(ours[~nan], theirs[~nan])
    assert np.isnan(to_float32(ours[nan], "bfloat16")).all()


def test_bfloat16_ties_and_edges() -> None:
    bits = np.array(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0xFF800000, 0x80000000, 0x00008000, 0x7F800001],
        np.uint32,
    )
    ours = to_stored(bits.view(np.float32), "bfloat16")
    assert ours[:-1].tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0xFF80, 0x8000, 0x0000]
    assert np.isnan(to_float32(ours, "bfloat16")[-1])


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=200))
def test_bfloat16_comes_back_bit_for_bit(bits: list[int]) -> None:
    stored = np.array(bits, np.uint16)
    back = to_float32(stored, "bfloat16")
    assert np.array_equal(back.view(np.uint32) >> 16, stored)
    again, nan = to_stored(back, "bfloat16"), np.isnan(back)
    assert np.array_equal(again[~nan], stored[~nan])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(dtype: str) -> None:
    values = np.array([[1.0, -2.5, 1e-7, 1e6]], np.float32)
    stored = to_stored(values, dtype)
    assert stored.dtype == STORED_DTYPES[dtype]
    assert np.array_equal(
        to_float32(stored, dtype), torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_float32_writes_where_told(dtype: str) -> None:
    values = np.linspace(-3, 3, 24, dtype=np.float32).reshape(4, 6)
    out = np.full((4, 6), 9, np.float32)
    assert to_float32(to_stored(values, dtype), dtype, out) is out
    assert np.allclose(out, values, rtol=2**-8)


int8_rows = st.integers(1, 9).flatmap(
    lambda width: st.lists(
        st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=width, max_size=width),
        min_size=1,
        max_size=20,
    )
)


@given(int8_rows)
def test_int8_is_off_by_half_a_scale_at_the_most(rows: list[list[float]]) -> None:
    values = np.array(rows, np.float32)
    stored = to_stored(values, "int8")
    assert (stored.dtype, stored.shape) == (np.int8, (len(values), values.shape[1] + 4))
    scale = np.ascontiguousarray(stored[:, -4:]).view("<f4").astype(np.float64)
    assert np.array_equal(stored, int8_by_torch(torch.from_numpy(values)[None]).numpy())
    back = to_float32(stored, "int8")
    assert (np.abs(back - values.astype(np.float64)) <= scale * 0.5 * (1 + 1e-5)).all()
    assert not back[~values.any(axis=1)].any()
    wide = np.empty_like(back)
    widen(stored, wide)
    assert np.array_equal(wide, back)


def test_a_sink_beside_it_costs_an_int8_row_nothing() -> None:
    values = np.random.default_rng(0).standard_normal((64, 32), dtype=np.float32)
    alone = to_stored(values, "int8")
    values[7] *= 1e6
    beside = to_stored(values, "int8")
    assert np.array_equal(np.delete(beside, 7, 0), np.delete(alone, 7, 0))
    facts = describe_rows(beside, "int8", 10.0, True, unit=0, hook=HOOK)
    assert facts.sinks == (7,)
    assert facts.moments is not None
    assert len(facts.moments.sums) == 32
    assert facts.largest_norm == pytest.approx(np.linalg.norm(values[7]), rel=1e-2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_int8_rows_that_are_not_finite_are_refused(bad: float) -> None:
    values = np.ones((64, 5), np.float32)
    values[9, 2] = bad
    with pytest.raises(NonFiniteError, match="stored row 9"):
        square_norms(to_stored(values, "int8"), "int8", unit=0, hook=HOOK)


def test_windows_without_their_first_rows_are_int8_as_their_rows_alone() -> None:
    """A harvest converts a view of the pass's rows; these are larger than the blocks scaled at once."""
    values = torch.randn(3, 150, 1000, generator=torch.Generator().manual_seed(0))
    kept = values[:, 1:]
    assert np.array_equal(int8_by_torch(kept).numpy(), to_stored(kept.reshape(-1, 1000).numpy(), "int8"))


def test_int8_rows_are_converted_in_pieces() -> None:
    values = np.random.default_rng(0).standard_normal((70, 1 << 10), dtype=np.float32)
    whole = to_stored(values, "int8")
    assert len(values) > shards._CHUNK_VALUES // values.shape[1]
    assert np.array_equal(
        whole, np.concatenate([to_stored(values[:9], "int8"), to_stored(values[9:], "int8")])
    )


def test_large_arrays_are_converted_in_pieces() -> None:
    values = np.random.default_rng(0).standard_normal((3, shards._CHUNK_VALUES), dtype=np.float32)
    values[1, 5] = np.nan
    ours, theirs = to_stored(values, "bfloat16"), torch_bfloat16(values)
    assert np.array_equal(np.delete(ours, 5, 1), np.delete(theirs, 5, 1))


# Encoding


@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 8])
def test_zarr_writes_the_same_bytes(dtype: str, width: int, compress: Compress) -> None:
    plan = make_plan(units=2, hooks={HOOK: width}, dtype=dtype, compress=compress)
    rows = stored_rows(plan, 0)[HOOK]
    objects: dict[str, cpu.Buffer] = {
        key: cpu.Buffer.from_bytes(body) for key, body in zarr_objects(plan).items()
    }
    array = zarr.open_group(MemoryStore(objects), mode="r+")[f"activations/{HOOK}"]
    assert isinstance(array, zarr.Array)
    array[: rows.shape[0]] = rows
    theirs = asyncio.run(MemoryStore(objects).get(shard_key(HOOK, 0), default_buffer_prototype()))
    assert theirs is not None
    told: list[Data] = []
    shard = encode_shard(rows, compress, told.append)
    ours = bytes(shard.data)
    assert ours == theirs.to_bytes() == b"".join(told)
    assert len(ours) == shard.size
    assert shard.sha256() == sha256_hex(ours)
    if compress == "none":
        assert shard.size == plan.shard_bytes(HOOK)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(0, 63), st.integers(1, 64)).filter(lambda pair: pair[0] < pair[1]),
    st.integers(0, 2**32),
    st.sampled_from(["none", "zstd"]),
)
def test_slices_come_back(
    per_slice: int, width: int, dtype: str, span: tuple[int, int], seed: int, compress: Compress
) -> None:
    plan = make_plan(
        context_length=8 + per_slice, drop_leading=8, hooks={HOOK: width}, dtype=dtype, compress=compress
    )
    noise = np.random.default_rng(seed).standard_normal((plan.rows_per_unit, width), dtype=np.float32)
    rows = to_stored(noise, dtype)
    shard = encode_shard(rows, compress)
    first, stop = span
    starts = slice_starts(plan, HOOK, shard.slice_lengths)
    if compress == "none":
        assert slice_range(plan, HOOK, first, stop) == (starts[first], starts[stop])
    data, crc, lengths = bytes(shard.data[starts[first] : starts[stop]]), *shard_facts(shard)
    found = decode_slices(data, first, stop, plan=plan, hook=HOOK, unit=0, crc=crc, lengths=lengths)
    assert found.shape == (stop - first, plan.rows_per_slice, width)
    expected = rows.reshape(SLICES, plan.rows_per_slice, width)[first:stop]
    assert np.array_equal(found, expected)
    check_index(shard.data[-INDEX_BYTES:], plan, HOOK, 0, lengths)
    assert np.array_equal(read_shard_index(bytes(shard.data[-INDEX_BYTES:]), plan, HOOK, 0), starts)


def shard_facts(shard: EncodedShard) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return shard.slice_crc32c, shard.slice_lengths


def test_decoding_does_not_copy() -> None:
    plan = make_plan()
    shard = encode_shard(stored_rows(plan, 0)[HOOK])
    data = bytes(shard.data)
    found = decode_slices(data, 0, SLICES, plan=plan, hook=HOOK, unit=0, crc=shard.slice_crc32c)
    assert np.shares_memory(found, np.frombuffer(data, np.uint8))
    assert not found.flags.writeable


@settings(deadline=None)
@given(st.data())
def test_any_flipped_bit_is_found_and_named(data: st.DataObject) -> None:
    plan = make_plan()
    shard = encode_shard(stored_rows(plan, 0)[HOOK])
    body = bytearray(shard.data)
    byte = data.draw(st.integers(0, len(body) - 1))
    body[byte] ^= 1 << data.draw(st.integers(0, 7))
    number = byte // slice_bytes(plan, HOOK)
    if number < SLICES:
        with pytest.raises(
            IntegrityError, match=rf"unit 3, hook 'resid_post.1', slice {number}: wrong bytes"
        ):
            decode_slices(bytes(body), 0, SLICES, plan=plan, hook=HOOK, unit=3, crc=shard.slice_crc32c)
    else:
        with pytest.raises(IntegrityError, match=r"unit 3, hook 'resid_post.1': the shard's index"):
            check_index(bytes(body[-INDEX_BYTES:]), plan, HOOK, 3)


def test_a_slice_in_the_wrong_place_is_found() -> None:
    plan = make_plan()
    shard = encode_shard(stored_rows(plan, 0)[HOOK])
    size = slice_bytes(plan, HOOK)
    with pytest.raises(IntegrityError, match="slice 5"):
        decode_slices(
            bytes(shard.data[6 * size : 7 * size]), 5, 6, plan=plan, hook=HOOK, unit=0, crc=shard.slice_crc32c
        )


@pytest.mark.parametrize("size", [1, 200, 255, 256, 300, 65536, 70000])
def test_frames_unpack_to_exactly_their_bytes(size: int) -> None:
    values = np.arange(size, dtype=np.uint64).astype(np.uint8)
    frame, out = np.frombuffer(pack(values), np.uint8), np.zeros(size, np.uint8)
    unpack(frame, out, unit=0, hook=HOOK, number=5)
    assert np.array_equal(out, values)
    for wrong, room in ((frame, size + 1), (frame, size - 1), (frame[:-1], size), (frame[4:], size)):
        with pytest.raises(IntegrityError, match=r"'resid_post.1', slice 5: cannot be decompressed"):
            unpack(wrong, np.zeros(room, np.uint8), unit=0, hook=HOOK, number=5)


def test_an_index_that_no_receipt_vouches_for_is_bounded() -> None:
    plan = make_plan(compress="zstd")
    sizes = np.full(SLICES, 40)
    for place, size in ((3, 10**6), (3, 4), (0, 0)):
        sizes[place] = size
        with pytest.raises(IntegrityError, match="index is wrong"):
            read_shard_index(shard_index(np.cumsum([0, *sizes])), plan, HOOK, 0)
    for footer in (b"", bytes(INDEX_BYTES)):
        with pytest.raises(IntegrityError, match="index is wrong"):
            read_shard_index(footer, plan, HOOK, 0)


def test_too_few_bytes() -> None:
    plan = make_plan()
    shard = encode_shard(stored_rows(plan, 0)[HOOK])
    cut = bytes(shard.data[: 3 * slice_bytes(plan, HOOK) + 1])
    with pytest.raises(IntegrityError, match="slice 3: the shard ends too early"):
        decode_slices(cut, 0, 8, plan=plan, hook=HOOK, unit=0, crc=shard.slice_crc32c)


def test_index_of_another_layout() -> None:
    plan = make_plan()
    with pytest.raises(IntegrityError, match="another layout"):
        check_index(shard_index(np.arange(65) * 999), plan, HOOK, 0)


@pytest.mark.parametrize("shape", [(63, 4), (64,), (0, 4)])
def test_encode_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        encode_shard(np.zeros(shape, np.uint16))


@pytest.mark.parametrize("data", [b"123456789", bytearray(b"123456789"), memoryview(b"123456789")])
def test_crc32c_check_value(data) -> None:
    assert crc32c(data) == 0xE3069283  # RFC 3720, B.4


def test_chunks() -> None:
    values = np.arange(12, dtype=np.uint32).reshape(3, 4)
    body = encode_chunk(values)
    assert np.array_equal(decode_chunk(body, "<u4", (3, 4), what="x"), values)
    with pytest.raises(IntegrityError, match="x: wrong length"):
        decode_chunk(body[:-1], "<u4", (3, 4), what="x")
    with pytest.raises(IntegrityError, match="x: wrong bytes"):
        decode_chunk(body[:-1] + bytes([body[-1] ^ 1]), "<u4", (3, 4), what="x")


# Statistics


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_CHUNK_VALUES", 100)
    rows = np.random.default_rng(1).standard_normal((256, 12), dtype=np.float32)
    rows[[3, 200]] *= 500
    stored = to_stored(rows, dtype)
    exact = to_float32(stored, dtype).astype(np.float64)
    norms = np.sqrt((exact**2).sum(axis=1))
    found = describe_rows(stored, dtype, 10.0, True, unit=0, hook=HOOK)
    assert found.sinks == (3, 200)
    assert found.sum_squares == pytest.approx((exact**2).sum(), rel=1e-6)
    assert found.largest_norm == pytest.approx(norms.max(), rel=1e-6)
    assert found.median_norm == pytest.approx(np.median(norms), rel=1e-6)
    kept = np.delete(exact, [3, 200], axis=0)
    assert found.moments is not None
    assert found.moments.rows == 254
    assert np.allclose(found.moments.sums, kept.sum(axis=0))
    assert np.allclose(found.moments.squares, (kept**2).sum(axis=0))
    assert describe_rows(stored, dtype, 10.0, False, unit=0, hook=HOOK).moments is None


def test_statistics_of_values_whose_squares_overflow_float32() -> None:
    stored = to_stored(np.full((64, 4), 1e30, np.float32), "bfloat16")
    found = describe_rows(stored, "bfloat16", 10.0, True, unit=0, hook=HOOK)
    assert found.median_norm == pytest.approx(2e30, rel=0.01)
    assert found.sinks == ()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_rows_are_named(bad: float, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_CHUNK_VALUES", 64)
    rows = np.ones((128, 4), np.float32)
    rows[77, 2] = bad
    rows[99, 0] = bad
    with pytest.raises(NonFiniteError, match=r"unit 5, hook 'resid_post.1', stored row 77"):
        square_norms(to_stored(rows, dtype), dtype, unit=5, hook=HOOK)


def test_float16_overflow_is_non_finite() -> None:
    stored = to_stored(np.full((64, 4), 70_000, np.float32), "float16")
    with pytest.raises(NonFiniteError, match="bfloat16"):
        describe_rows(stored, "float16", 10.0, False, unit=0, hook=HOOK)


def test_relative_difference() -> None:
    plan = make_plan()
    rows = synthetic_rows(plan, 0, HOOK)

    def apart(other: np.ndarray, own: np.ndarray = rows) -> float:
        return relative_difference(
            to_stored(other, "float32"), to_stored(own, "float32"), "float32", unit=0, hook=HOOK
        )

    assert apart(rows) == 0
    assert apart(rows * np.float32(1.01)) == pytest.approx(0.01, rel=1e-3)
    assert apart(-rows) == pytest.approx(2)
    # one sink holds nearly all of the norm, and does not hide that every other row differs
    heavy, other = rows.copy(), -rows
    heavy[0] *= 1e5
    other[0] = heavy[0]
    assert apart(other, heavy) == pytest.approx(2, rel=1e-3)
    assert apart(np.zeros_like(rows), np.zeros_like(rows)) == 0
    assert apart(rows, np.zeros_like(rows)) == float("inf")
