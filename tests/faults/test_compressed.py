"""The store's guarantees hold for compressed shards: every slice is checked as stored, and repaired."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from winnow.schemas.errors import IntegrityError
from winnow.schemas.harvest import SLICES
from winnow.store import ActivationStore
from winnow.store.check.repair import repair
from winnow.store.check.verify import verify
from winnow.store.format import order as order_module
from winnow.store.format.layout import receipt_key, shard_key, slice_starts
from winnow.store.format.shards import INDEX_BYTES, crc32c, pack, shard_index
from winnow.store.objects import ObjectStore, open_store
from winnow.store.records.commit import load_receipt
from winnow.store.records.index import ReceiptIndex
from winnow.store.testing import flip_bit, make_attempt, make_plan, stored_rows, synthetic_rows, write_dataset
from winnow.store.write.writer import read_orphan

HOOK = "resid_post.1"
PLAN = make_plan(units=4, hooks={HOOK: 8, "mlp_out.0": 4}, compress="zstd")
SHARD = shard_key(HOOK, 2)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    made = open_store(str(tmp_path / "root"))
    write_dataset(made, PLAN)
    return made


def starts(store: ObjectStore) -> np.ndarray:
    return slice_starts(PLAN, HOOK, load_receipt(store, PLAN, 2).shards[HOOK].slice_lengths)


def test_the_order_is_that_of_plain_shards(store, monkeypatch):
    monkeypatch.setattr(order_module, "LARGEST_DESIGN_EFFECT", float("inf"))
    whole = np.concatenate([synthetic_rows(PLAN, unit, HOOK) for unit in range(4)])
    opened = ActivationStore.over(store)
    ranks = [
        opened.stream(HOOK, batch_rows=64, seed=1, group_units=2, epochs=2, rank=rank, world=2)
        for rank in range(2)
    ]
    for batches in zip(*ranks, strict=True):
        found = np.concatenate([batch.rows[HOOK].numpy() for batch in batches])
        assert np.array_equal(found, whole[ranks[0].order.rows_at(batches[0].step)])
    size = sum(int(opened.index.starts(HOOK, unit)[-1]) for unit in range(1, 4))
    assert sum(stream.bytes_read for stream in ranks) == 2 * size
    assert np.array_equal(opened.read_rows(HOOK, 5, 700), whole[5:700])


def test_a_flipped_bit_is_named_by_slice(store):
    flip_bit(store, SHARD, int(starts(store)[7]) + 9)
    problems = verify(store, "full")
    assert [(p.unit, p.hook, p.slice) for p in problems] == [(2, HOOK, 7)]
    assert str(problems[0]).count("unit 2") == str(problems[0]).count("slice 7") == 1
    with pytest.raises(IntegrityError, match=r"unit 2, hook 'resid_post.1', slice 7: wrong bytes"):
        ActivationStore.over(store).read_rows(HOOK, 0, PLAN.rows)


def test_a_lying_frame_with_a_true_checksum_is_refused(store):
    """A receipt that vouches for a frame of fewer bytes than a slice has must not uncover old memory."""
    receipt = load_receipt(store, PLAN, 2)
    record, body = receipt.shards[HOOK], bytearray(store.get(SHARD))
    where = starts(store)
    frame = pack(np.zeros(8, np.uint8))
    end = int(where[0]) + len(frame)
    body[:end] = frame
    body[end : end + 4] = crc32c(frame).to_bytes(4, "little")
    store.put(SHARD, bytes(body))
    facts = {
        "slice_crc32c": (crc32c(frame), *record.slice_crc32c[1:]),
        "slice_lengths": (len(frame), *record.slice_lengths[1:]),
    }
    facts["bytes"] = record.bytes - record.slice_lengths[0] + len(frame)
    shards = {**receipt.shards, HOOK: record.model_copy(update=facts)}
    opened = ActivationStore.over(store)
    opened.index = ReceiptIndex.of(PLAN, [receipt.model_copy(update={"shards": shards})])
    with pytest.raises(IntegrityError, match="slice 0: cannot be decompressed"):
        opened.read_rows(HOOK, 2 * PLAN.rows_per_unit, 2 * PLAN.rows_per_unit + 8)


@pytest.mark.parametrize("lengths", [(1,) * 64, (10**6,) * 64, ()])
def test_receipts_with_impossible_lengths_are_refused(store, lengths):
    receipt = load_receipt(store, PLAN, 2)
    record = receipt.shards[HOOK].model_copy(update={"slice_lengths": lengths})
    shards = {**receipt.shards, HOOK: record}
    with pytest.raises(IntegrityError, match=r"receipt of unit 2, hook resid_post.1: (slice_lengths|bytes)"):
        ReceiptIndex.of(PLAN, [receipt.model_copy(update={"shards": shards})])


def test_damage_outside_the_payload_is_put_back(store):
    before, where = store.get(SHARD), starts(store)
    for byte in (int(where[5]) - 2, int(where[-1]) + 3, -1):
        flip_bit(store, SHARD, byte)
        assert repair(store).restored == [SHARD]
        assert store.get(SHARD) == before
    assert verify(store, "full") == []


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_lost_rows_are_made_again(store, noise):
    before = store.get(SHARD)
    flip_bit(store, SHARD, int(starts(store)[3]) + 1)
    random = np.random.default_rng(0)

    def remake(unit):
        rows = {hook: values.copy() for hook, values in stored_rows(PLAN, unit).items()}
        if noise:
            chosen = random.random(rows[HOOK].shape) < 0.01
            rows[HOOK][chosen] ^= 1
        return rows, make_attempt()

    report = repair(store, remake)
    assert report.restored[0] == SHARD
    assert report.revised == ([2] if noise else [])
    assert (store.get(SHARD) == before) == (not noise)
    assert verify(store, "full") == []
    ActivationStore.over(store).read_rows(HOOK, 0, PLAN.rows)


def test_orphans_are_adopted_or_named(tmp_path):
    store = open_store(str(tmp_path / "root"))
    write_dataset(store, PLAN, units=[0, 1, 2])
    whole, record = store.get(SHARD), load_receipt(store, PLAN, 2).shards[HOOK]
    store.delete(receipt_key(2))
    assert read_orphan(store, PLAN, 2, HOOK)[1] == record
    last = int(slice_starts(PLAN, HOOK, record.slice_lengths)[-1])
    other = np.cumsum([0, *([50] * SLICES)])
    for torn in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"x", whole[:last] + shard_index(other)):
        store.put(SHARD, torn)
        with pytest.raises(IntegrityError):
            read_orphan(store, PLAN, 2, HOOK)
    store.put(SHARD, whole)
    manifest = write_dataset(store, PLAN)
    assert manifest is not None
    assert load_receipt(store, PLAN, 2).attempt.adopted == (HOOK, "mlp_out.0")
    assert verify(store, "full") == []
    assert manifest.bytes == sum(
        slice_starts(PLAN, hook, shard.slice_lengths)[-1] + INDEX_BYTES
        for unit in range(4)
        for hook, shard in load_receipt(store, PLAN, unit).shards.items()
    )
