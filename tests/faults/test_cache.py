"""The disk cache: everything it gives is checked, nothing it does stops a reader."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import IntegrityError
from winnow.store import ActivationStore
from winnow.store.format import order as order_module
from winnow.store.format.layout import shard_key, slice_bytes
from winnow.store.objects import open_store
from winnow.store.read import cache as cache_module
from winnow.store.read.cache import SliceCache
from winnow.store.testing import FaultyStore, flip_bit, make_plan, synthetic_rows, write_dataset

HOOK = "resid_post.1"
PLAN = make_plan(units=4, hooks={HOOK: 8})
SIZE = slice_bytes(PLAN, HOOK)
ALL = 4 * 64
EXPECTED = np.concatenate([synthetic_rows(PLAN, unit, HOOK) for unit in range(4)])


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    root = str(tmp_path_factory.mktemp("cached"))
    write_dataset(open_store(root), PLAN)
    return root


def reader(root: str, folder: Path, most: int = 1 << 30) -> tuple[ActivationStore, FaultyStore]:
    counting = FaultyStore(open_store(root))
    opened = ActivationStore.over(counting)
    opened.cache = SliceCache(folder, most, PLAN)
    counting.calls.clear()
    return opened, counting


def check(opened: ActivationStore) -> None:
    assert np.array_equal(opened.read_rows(HOOK, 0, PLAN.rows), EXPECTED)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*") if path.is_file())


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_a_second_reader_asks_storage_for_nothing(tmp_path, monkeypatch, compress):
    monkeypatch.setattr(order_module, "LARGEST_DESIGN_EFFECT", float("inf"))
    plan = make_plan(units=4, hooks={HOOK: 8}, compress=compress)
    write_dataset(open_store(str(tmp_path / "root")), plan)
    read = []
    for _ in range(2):
        opened = ActivationStore.over(open_store(str(tmp_path / "root")))
        opened.cache = SliceCache(tmp_path / "cache", 1 << 30, plan)
        with opened.stream(HOOK, batch_rows=64, seed=1, group_units=1, epochs=2) as stream:
            for batch in stream:
                rows = stream.order.rows_at(batch.step)
                assert np.array_equal(batch.rows[HOOK].numpy(), EXPECTED[rows])
            read.append(stream.bytes_read)
    assert read[0] > 0
    assert read[1] == 0
    assert opened.cache.hits == 2 * 3 * 64


@pytest.mark.parametrize("damage", ["bit", "checksum", "short", "long", "empty", "another"])
def test_a_poisoned_file_is_removed_and_read_again(root, tmp_path, damage):
    opened, _ = reader(root, tmp_path)
    check(opened)
    one, two = files(tmp_path)[:2]
    true = one.read_bytes()
    assert len(true) == SIZE
    poison = {
        "bit": bytes([true[0] ^ 1]) + true[1:],
        "checksum": true[:-1] + bytes([true[-1] ^ 1]),
        "short": true[:-1],
        "long": true + b"x",
        "empty": b"",
        "another": two.read_bytes(),
    }[damage]
    one.write_bytes(poison)
    opened, counting = reader(root, tmp_path)
    check(opened)
    assert opened.cache is not None
    assert (opened.cache.hits >= ALL - 1, opened.cache.poisoned) == (True, 1)
    assert len(counting.calls) == 1
    assert one.read_bytes() == true


def test_rot_in_storage_is_never_kept(tmp_path):
    root = str(tmp_path / "root")
    write_dataset(open_store(root), PLAN)
    flip_bit(open_store(root), shard_key(HOOK, 1), 3 * SIZE + 1)
    opened, _ = reader(root, tmp_path / "cache")
    with pytest.raises(IntegrityError, match=r"unit 1, .*slice 3"):
        opened.read_rows(HOOK, 0, PLAN.rows)
    assert len(files(tmp_path / "cache")) == 64 + 3


def test_a_full_disk_is_said_once_and_bypassed(root, tmp_path, monkeypatch, caplog):
    real, left = os.writev, [5]

    def full(handle, views):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(handle, views)

    monkeypatch.setattr(cache_module.os, "writev", full)
    opened, _ = reader(root, tmp_path)
    with caplog.at_level(logging.WARNING):
        check(opened)
        check(opened)
    assert len(files(tmp_path)) == 5
    assert len(caplog.records) == 1
    assert "takes no more slices (No space left on device): they are read" in caplog.text
    assert opened.cache is not None
    assert opened.cache.hits == 5


def test_a_folder_that_cannot_be_made_is_bypassed(root, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    opened, _ = reader(root, tmp_path / "file")
    check(opened)
    check(opened)
    assert len(caplog.records) == 1


def test_the_cap_holds_and_other_datasets_make_room(root, tmp_path):
    old = tmp_path / "another-dataset"
    old.mkdir()
    for number in range(3):
        (old / f"{number}").write_bytes(bytes(10 * SIZE))
        os.utime(old / f"{number}", (number, number))
    opened, _ = reader(root, tmp_path, 40 * SIZE)
    check(opened)
    assert sum(path.stat().st_size for path in files(tmp_path)) == 40 * SIZE
    assert not list(old.iterdir())
    kept = files(tmp_path)
    opened, _ = reader(root, tmp_path, 40 * SIZE)
    check(opened)
    assert files(tmp_path) == kept  # its own slices stay: dropping the oldest would help nobody
    opened, _ = reader(root, tmp_path, 50 * SIZE)
    opened.read_rows(HOOK, 0, 8)
    assert opened.cache is not None
    assert opened.cache.hits == 1


def test_the_config_turns_it_on_for_remote_roots_only(root, tmp_path, s3_uri):
    storage = StorageSpec(cache_folder=str(tmp_path / "cache"), cache_bytes=1 << 20)
    assert ActivationStore.open(root, storage).cache is None
    write_dataset(open_store(s3_uri), PLAN)
    for _ in range(2):
        opened = ActivationStore.open(s3_uri, storage)
        check(opened)
    assert opened.cache is not None
    assert opened.cache.hits == ALL
