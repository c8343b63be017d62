"""P2: no wrong row is ever yielded. Damage of every kind is found, named, and never hangs a reader."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from winnow.schemas.errors import ConfigError, IntegrityError, MissingObject, StoreError, UnsupportedVersion
from winnow.schemas.harvest import SLICES
from winnow.store import ActivationStore
from winnow.store.check.verify import verify
from winnow.store.format import order as order_module
from winnow.store.format.layout import manifest_key, shard_key, slice_bytes, tokens_key
from winnow.store.format.shards import INDEX_BYTES, crc32c
from winnow.store.objects import open_store
from winnow.store.read.reader import read_receipt
from winnow.store.records import parts
from winnow.store.testing import FaultyStore, make_plan, write_dataset

HOOKS = {"resid_post.1": 8, "mlp_out.2": 4}
HOOK = "mlp_out.2"


@pytest.fixture(autouse=True)
def any_mixing(monkeypatch):
    monkeypatch.setattr(order_module, "LARGEST_DESIGN_EFFECT", float("inf"))


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def plan(request):
    return make_plan(units=5, hooks=HOOKS, dtype=request.param)


@pytest.fixture(scope="module")
def sound(plan, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_dataset(open_store(str(folder)), plan)
    return folder


@pytest.fixture
def root(sound, tmp_path) -> Path:
    """A dataset to damage."""
    return Path(shutil.copytree(sound, tmp_path / "root"))


def flip(path: Path, offset: int) -> None:
    body = bytearray(path.read_bytes())
    body[offset] ^= 0x10
    path.write_bytes(body)


def drain(root: Path, **options) -> None:
    store = ActivationStore.open(str(root))
    with store.stream(
        list(HOOKS), **{"batch_rows": 64, "seed": 0, "group_units": 2, "epochs": 1, **options}
    ) as stream:
        for _ in stream:
            pass


def read_all(root: Path) -> None:
    store = ActivationStore.open(str(root))
    for hook in HOOKS:
        store.read_rows(hook, 0, store.rows)


READERS = pytest.mark.parametrize("read", [drain, read_all])


# Shards


@READERS
@pytest.mark.parametrize("where", ["first", "middle", "checksum"])
def test_a_flipped_byte_names_unit_hook_and_slice(root, plan, read, where):
    size = slice_bytes(plan, HOOK)
    flip(root / shard_key(HOOK, 3), {"first": 0, "middle": 7 * size + 20, "checksum": 64 * size - 1}[where])
    number = {"first": 0, "middle": 7, "checksum": 63}[where]
    with pytest.raises(IntegrityError, match=rf"unit 3, hook '{HOOK}', slice {number}\b"):
        read(root)


@pytest.mark.parametrize("together", [1, 3, 64])
def test_slices_received_together_are_checked_one_by_one(root, plan, monkeypatch, together):
    size = slice_bytes(plan, HOOK)
    monkeypatch.setattr("winnow.store.read.fetch.PART_BYTES", together * (size - 4))
    drain(root)
    flip(root / shard_key(HOOK, 3), 7 * size + 20)
    with pytest.raises(IntegrityError, match=rf"unit 3, hook '{HOOK}', slice 7\b"):
        drain(root)


@READERS
@pytest.mark.parametrize("length", [0, 1, 1000])
def test_a_truncated_shard_is_named(root, read, length):
    path = root / shard_key(HOOK, 2)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(IntegrityError, match=rf"unit 2, hook '{HOOK}', slices 0-63.*got {length} bytes"):
        read(root)


@READERS
def test_a_lengthened_shard_reads_right_and_is_found_by_verify(root, read):
    path = root / shard_key(HOOK, 2)
    path.write_bytes(path.read_bytes() + b"more")
    read(root)  # every slice is where it was, and checked
    assert [(p.level, p.unit, p.hook) for p in verify(open_store(str(root)), "full")] == [("size", 2, HOOK)]


@READERS
def test_a_missing_slice_is_named(root, plan, read):
    """As zarr leaves out a chunk: no bytes, and an index, true to its crc32c, that says so."""
    path, size = root / shard_key(HOOK, 3), slice_bytes(plan, HOOK)
    body = path.read_bytes()
    index = np.frombuffer(body[-INDEX_BYTES:-4], "<u8").reshape(SLICES, 2).copy()
    index[8:, 0] -= np.uint64(size)
    index[7] = 2**64 - 1
    footer = index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little")
    path.write_bytes(body[: 7 * size] + body[8 * size : -INDEX_BYTES] + footer)
    with pytest.raises(IntegrityError, match=rf"unit 3, hook '{HOOK}', slices? (7\b|0-63)"):
        read(root)
    assert {(p.unit, p.hook) for p in verify(open_store(str(root)), "full")} == {(3, HOOK)}


@READERS
def test_a_missing_shard_is_named(root, read):
    (root / shard_key(HOOK, 4)).unlink()
    with pytest.raises(MissingObject, match=rf"unit 4, hook '{HOOK}', slices 0-63: the shard is missing"):
        read(root)


@READERS
def test_a_sound_shard_of_another_unit_is_refused(root, read):
    (root / shard_key(HOOK, 1)).write_bytes((root / shard_key(HOOK, 2)).read_bytes())
    with pytest.raises(IntegrityError, match=rf"unit 1, hook '{HOOK}', slice 0\b"):
        read(root)


def test_only_the_ranks_that_own_the_damage_see_it(root, plan):
    flip(root / shard_key(HOOK, 3), 40 * slice_bytes(plan, HOOK))
    for rank in (0, 1, 3):
        drain(root, rank=rank, world=4)
    with pytest.raises(IntegrityError, match="slice 40"):
        drain(root, rank=2, world=4)


def test_good_groups_before_the_damage_are_yielded_and_the_error_stays(root, plan):
    flip(root / shard_key(HOOK, 4), 0)
    store = ActivationStore.open(str(root))
    with store.stream(HOOK, batch_rows=64, seed=0, group_units=1) as stream:
        good = 0
        with pytest.raises(IntegrityError):
            for good, _ in enumerate(stream, 1):  # noqa: B007
                pass
        assert good == 3 * stream.order.steps_in(0)
        with pytest.raises(IntegrityError, match="unit 4"):
            next(stream)
        assert stream.state().step == good


# Reads that fail once


class Flips(FaultyStore):
    """Flips a byte of the first `times` range replies for one shard."""

    def __init__(self, inner, key: str, times: int) -> None:
        super().__init__(inner)
        self.key, self.times = key, times
        self.lock = threading.Lock()

    def get_range(self, key, start, end):
        data = super().get_range(key, start, end)
        with self.lock:
            if key != self.key or not self.times:
                return data
            self.times -= 1
        return bytes([data[0] ^ 1]) + bytes(data[1:])


@pytest.mark.parametrize("times", [1, 2])
def test_a_read_that_was_wrong_on_the_way_is_repeated(root, plan, times):
    store = ActivationStore.over(Flips(open_store(str(root)), shard_key(HOOK, 2), times))
    assert store.read_rows(HOOK, 0, store.rows).any()
    store = ActivationStore.over(Flips(open_store(str(root)), shard_key(HOOK, 2), times))
    with store.stream(HOOK, batch_rows=64, seed=0, epochs=1) as stream:
        assert sum(1 for _ in stream) == stream.order.steps_per_epoch
        assert stream.bytes_read == (4 * 64 + times) * slice_bytes(plan, HOOK)


def test_a_slice_wrong_three_times_is_rotten(root):
    store = ActivationStore.over(Flips(open_store(str(root)), shard_key(HOOK, 2), 3))
    with pytest.raises(IntegrityError, match=r"unit 2.*slice 0"):
        store.read_rows(HOOK, 0, store.rows)


class Failing(FaultyStore):
    """Every range read fails as an outage would."""

    def get_range(self, key, start, end):
        raise StoreError("the network is gone")


def test_an_outage_reaches_the_consumer_with_its_cause(root):
    store = ActivationStore.over(Failing(open_store(str(root))))
    with (
        store.stream(HOOK, batch_rows=64, seed=0) as stream,
        pytest.raises(StoreError, match="network is gone"),
    ):
        next(stream)


class Gated(FaultyStore):
    """Range reads wait until the gate opens."""

    def __init__(self, inner) -> None:
        super().__init__(inner)
        self.gate, self.asked = threading.Event(), threading.Event()

    def get_range(self, key, start, end):
        self.asked.set()
        assert self.gate.wait(30)
        return super().get_range(key, start, end)


def test_close_drops_what_has_not_begun(root):
    gated = Gated(open_store(str(root)))
    store = ActivationStore.over(gated)
    stream = store.stream(HOOK, batch_rows=64, seed=0, group_units=4, prefetch=1)
    assert gated.asked.wait(30)
    closer = threading.Thread(target=stream.close)
    closer.start()
    while not stream._rows._reader.pool._shutdown:
        closer.join(0.001)
    gated.gate.set()
    closer.join(30)
    assert not closer.is_alive()
    assert sum(1 for name, _ in gated.calls if name == "get_range") == 1


# Manifest, parts, receipts, plan, tokens


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_manifest_of_another_version_is_refused_in_words(root):
    edit(root / manifest_key(), '"version": "1.0"', '"version": "2.0"')
    with pytest.raises(UnsupportedVersion, match=r"expected 1\.x, got 2\.0.*upgrade"):
        ActivationStore.open(str(root))


def test_a_plan_of_another_version_is_refused_in_words(root):
    edit(root / "plan.json", '"version": "1.0"', '"version": "7.1"')
    with pytest.raises(UnsupportedVersion, match=r"plan\.json"):
        ActivationStore.open(str(root))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"revision": 0', '"revision": 1', "revision"),
        ('"units": 5', '"units": 6', "units"),
        ('"rows": ', '"rows": 1', "rows"),
        ('"first_unit": 0', '"first_unit": 1', "first units"),
        ('"manifest/units-', '"../units-', "key"),
        ('"manifest/units-', '"/etc/units-', "key"),
        ('"manifest/units-', '"s3://elsewhere/units-', "key"),
        ('"parent": null', '"surprise": null', "surprise"),
        ("{", "", "readable JSON"),
    ],
)
def test_a_manifest_that_lies_is_refused(root, old, new, named):
    edit(root / manifest_key(), old, new)
    with pytest.raises(IntegrityError, match=named):
        ActivationStore.open(str(root))


def test_a_manifest_of_another_plan_is_refused(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_dataset(open_store(str(other)), make_plan(units=5, hooks=HOOKS, seed=1))
    (root / manifest_key()).write_bytes((other / manifest_key()).read_bytes())
    with pytest.raises(IntegrityError, match="plan_fingerprint"):
        ActivationStore.open(str(root))


def test_a_changed_digest_of_the_dataset_is_refused(root):
    text = (root / manifest_key()).read_text()
    digest = ActivationStore.open(str(root)).manifest.dataset_sha256
    (root / manifest_key()).write_text(text.replace(digest, "0" * 64))
    with pytest.raises(IntegrityError, match="dataset_sha256"):
        ActivationStore.open(str(root))


def test_a_later_manifest_must_name_its_parent(root):
    text = (root / manifest_key()).read_text().replace('"revision": 0', '"revision": 1')
    (root / manifest_key(1)).write_text(text)
    with pytest.raises(IntegrityError, match="parent"):
        ActivationStore.open(str(root))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_part_is_refused_before_it_is_parsed(root, damage):
    (part,) = (root / "manifest").iterdir()
    if damage == "flip":
        flip(part, part.stat().st_size // 2)
    elif damage == "cut":
        part.write_bytes(part.read_bytes()[:-9])
    else:
        part.unlink()
    with pytest.raises(MissingObject if damage == "gone" else IntegrityError, match=r"units-.*parquet"):
        ActivationStore.open(str(root))


@pytest.mark.parametrize(
    ("cap", "value", "said"),
    [("PART_GROUP", 2, "too large a row group"), ("MAX_GROUP_BYTES", 100, "decompresses to too much")],
)
def test_a_part_that_unpacks_to_too_much_is_refused(root, monkeypatch, cap, value, said):
    monkeypatch.setattr(parts, cap, value)
    with pytest.raises(IntegrityError, match=said):
        ActivationStore.open(str(root))


def test_a_receipt_of_another_unit_or_plan_is_refused(root, plan, tmp_path_factory):
    store = open_store(str(root))
    (root / "receipts/00000001.json").write_bytes((root / "receipts/00000002.json").read_bytes())
    with pytest.raises(IntegrityError, match="unit"):
        read_receipt(store, plan, 1)
    other = tmp_path_factory.mktemp("other")
    write_dataset(open_store(str(other)), make_plan(units=5, hooks=HOOKS, seed=1))
    (root / "receipts/00000003.json").write_bytes((other / "receipts/00000003.json").read_bytes())
    with pytest.raises(IntegrityError, match="plan_fingerprint"):
        read_receipt(store, plan, 3)


def test_wrong_tokens_are_refused(root, plan):
    store = ActivationStore.open(str(root))
    chunk = root / tokens_key(1)
    chunk.write_bytes((root / tokens_key(2)).read_bytes())  # sound in itself
    with pytest.raises(IntegrityError, match="tokens of unit 1"):
        store.tokens(plan.spec.windows_per_unit)
    chunk.unlink()
    with pytest.raises(MissingObject, match="tokens of unit 1"):
        store.tokens(plan.spec.windows_per_unit)
    flip(root / "token_digests/c/0/0", 5)
    with pytest.raises(IntegrityError, match="token digests"):
        ActivationStore.open(str(root)).tokens(0)


def test_an_empty_root_is_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no dataset"):
        ActivationStore.open(str(tmp_path / "nothing"))
