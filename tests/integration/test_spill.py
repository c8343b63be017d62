"""The external sort: the keyed order whatever the buckets, and nothing left behind."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.harvester.plan.packing import in_keyed_order, order_key
from winnow.harvester.plan.spill import WindowSpill, bucket_count, check_space
from winnow.schemas.errors import StoreError


def spilled(
    windows: np.ndarray, *, folder: Path, buckets: int, keep: int | None, buffer: int, step: int
) -> tuple[np.ndarray, int]:
    options = {"folder": str(folder), "buckets": buckets, "keep": keep, "buffer_bytes": buffer}
    window = np.dtype((windows.dtype, windows.shape[1:]))
    with WindowSpill(window, order_key(3), **options) as spill:
        for at in range(0, len(windows), step):
            spill.add(windows[at : at + step])
        assert spill.windows == len(windows)
        blocks = list(spill.ordered())
        again = list(spill.ordered())
        empty = np.empty((0, windows.shape[1]), windows.dtype)
        assert np.array_equal(np.concatenate([empty, *blocks]), np.concatenate([empty, *again]))
        return np.concatenate([empty, *blocks]), spill.bytes


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(0, 700),
    bits=st.integers(0, 8),
    keep=st.none() | st.integers(0, 800),
    step=st.integers(1, 300),
    dtype=st.sampled_from([np.uint16, np.uint32]),
)
def test_spill_is_the_keyed_order(tmp_path_factory, count, bits, keep, step, dtype):
    windows = np.arange(count * 5).astype(dtype).reshape(count, 5)
    folder = tmp_path_factory.mktemp("spill")
    got, _ = spilled(windows, folder=folder, buckets=2**bits, keep=keep, buffer=1, step=step)
    assert np.array_equal(got, in_keyed_order(windows, order_key(3))[:keep])
    assert not list(folder.iterdir())


def test_spill_skips_what_can_no_longer_be_kept(tmp_path):
    windows = np.arange(20_000 * 64, dtype=np.uint32).reshape(-1, 64)
    options = {"folder": tmp_path, "buckets": 32, "buffer": 1, "step": 500}
    everything, all_bytes = spilled(windows, keep=None, **options)
    some, some_bytes = spilled(windows, keep=1000, **options)
    assert np.array_equal(some, everything[:1000])
    assert some_bytes < all_bytes / 3


def test_bucket_count():
    assert [bucket_count(size) for size in (0, 1, 2**24, 2**30, 2**60)] == [1, 1, 2, 128, 4096]
    assert bucket_count(None) == 1024


def test_check_space(tmp_path):
    check_space(str(tmp_path), 0, "nothing")
    with pytest.raises(StoreError, match="disk too small for everything"):
        check_space(str(tmp_path), 2**62, "everything")
