"""`--repair` puts right what is damaged, is safe to kill anywhere, and misleads no reader meanwhile."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.support.pipeline import pipeline_config
from winnow.cli.main import app
from winnow.schemas.base import sha256_hex
from winnow.schemas.errors import IntegrityError, MissingObject, StoreError, WinnowError
from winnow.schemas.harvest import HarvestPlan
from winnow.store import ActivationStore
from winnow.store.check.repair import Remake, repair
from winnow.store.check.verify import damage, verify
from winnow.store.format.layout import manifest_key, receipt_key, shard_key, slice_bytes, tokens_key
from winnow.store.format.zarr_metadata import TOKEN_DIGESTS_KEY
from winnow.store.objects import ObjectStore, open_store
from winnow.store.records.commit import list_receipts
from winnow.store.records.manifest import find_manifest
from winnow.store.testing import (
    Crash,
    FaultyStore,
    flip_bit,
    make_attempt,
    make_plan,
    stored_rows,
    synthetic_rows,
    write_dataset,
    write_unit,
)

HOOK, OTHER = "resid_post.1", "mlp_out.0"
PLAN = make_plan(units=3, hooks={HOOK: 4, OTHER: 2})
SHARD = shard_key(HOOK, 1)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_dataset(open_store(str(folder)), PLAN)
    return folder


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> ObjectStore:
    return open_store(str(shutil.copytree(sound, tmp_path / "root")))


def remake(scale: float = 1.0) -> Remake:
    """Rows made again, with float noise where `scale` is not 1."""

    def rows(plan: HarvestPlan, unit: int, hook: str) -> np.ndarray:
        return synthetic_rows(plan, unit, hook) * np.float32(scale)

    return lambda unit: (stored_rows(PLAN, unit, rows), make_attempt())


def objects(store: ObjectStore) -> dict[str, str]:
    return {key: sha256_hex(store.get(key)) for key, _ in store.list()}


def torn(store: ObjectStore, key: str) -> None:
    store.put(key, store.get(key)[:-7])


def edited(store: ObjectStore, key: str) -> None:
    text = store.get(key).replace(b'"sum_squares": ', b'"sum_squares": 1')
    store.put(key, text)


def replaced(store: ObjectStore, key: str) -> None:
    store.put(key, b"{}")


BY_ITSELF = {
    "zarr.json gone": lambda s: s.delete(f"activations/{HOOK}/zarr.json"),
    "zarr.json rotten": lambda s: s.put("zarr.json", b"{"),
    "token digests flipped": lambda s: flip_bit(s, TOKEN_DIGESTS_KEY, 3),
    "token digests gone": lambda s: s.delete(TOKEN_DIGESTS_KEY),
    "receipt gone": lambda s: s.delete(receipt_key(1)),
    "receipt torn": lambda s: torn(s, receipt_key(1)),
    "receipt changed": lambda s: edited(s, receipt_key(1)),
    "index flipped": lambda s: flip_bit(s, SHARD, -9),
    "stored checksum flipped": lambda s: flip_bit(s, SHARD, 5 * slice_bytes(PLAN, HOOK) - 2),
    "part flipped": lambda s: flip_bit(s, next(s.list("manifest"))[0], 300),
    "part gone": lambda s: s.delete(next(s.list("manifest"))[0]),
    "manifest empty": lambda s: replaced(s, manifest_key()),
    "manifest torn": lambda s: torn(s, manifest_key()),
}


@pytest.mark.parametrize("damaged", BY_ITSELF)
def test_what_the_rest_tells_is_put_back(store: ObjectStore, damaged: str) -> None:
    before = find_manifest(store, PLAN)
    assert before is not None
    BY_ITSELF[damaged](store)
    assert damage(verify(store, "full"))
    report = repair(store)
    assert report.restored or report.manifest or "part" in damaged
    assert verify(store, "full") == []
    after = find_manifest(store, PLAN)
    assert after is not None
    assert after.dataset_sha256 == before.dataset_sha256
    assert repair(store).restored == []


SHARDS = {
    "payload flipped": lambda s: flip_bit(s, SHARD, 7 * slice_bytes(PLAN, HOOK) + 3),
    "truncated": lambda s: torn(s, SHARD),
    "zero length": lambda s: s.put(SHARD, b""),
    "lengthened": lambda s: s.put(SHARD, s.get(SHARD) + b"x"),
    "gone": lambda s: s.delete(SHARD),
}


@pytest.mark.parametrize("damaged", SHARDS)
def test_equal_rows_restore_the_very_object(store: ObjectStore, damaged: str) -> None:
    before = objects(store)
    SHARDS[damaged](store)
    assert repair(store).restored == []
    assert damage(verify(store, "full"))
    report = repair(store, remake())
    assert (report.restored, report.revised, report.manifest) == ([SHARD], [], None)
    assert objects(store) == before


@pytest.mark.parametrize("damaged", SHARDS)
def test_float_noise_gives_a_new_receipt_and_a_manifest_with_its_parent(
    store: ObjectStore, damaged: str
) -> None:
    before = objects(store)
    SHARDS[damaged](store)
    report = repair(store, remake(1.01))
    assert report.revised == [1]
    assert report.manifest is not None
    assert report.manifest.revision == 1
    assert report.manifest.parent == before[manifest_key()]
    after = objects(store)
    changed = {key for key in after if before.get(key) != after[key]}
    assert {SHARD, receipt_key(1, 1), manifest_key(1)} < changed
    assert len(changed) == 4
    assert verify(store, "full") == []
    data = ActivationStore.over(store)
    assert data.manifest.revision == 1
    rows = data.plan.rows_per_unit
    np.testing.assert_allclose(
        data.read_rows(HOOK, rows, 2 * rows), synthetic_rows(PLAN, 1, HOOK) * 1.01, rtol=2**-7
    )
    flip_bit(store, shard_key(OTHER, 1), 3)
    assert repair(store, remake(0.99)).revised == [1]
    assert ActivationStore.over(store).manifest.revision == 2
    assert verify(store, "full") == []


def test_a_reader_in_between_is_refused_and_never_misled(store: ObjectStore) -> None:
    SHARDS["gone"](store)
    shutil.copytree(store.uri, f"{store.uri}-count")
    counted = FaultyStore(open_store(f"{store.uri}-count"))
    repair(counted, remake(1.01))
    writes = [n for n, (name, _) in enumerate(counted.calls, 1) if name.startswith("put")]
    assert len(writes) == 4
    for number in writes:
        for fault in ("crash_before", "crash_after", "error_after"):
            place = f"{store.uri}-{number}-{fault}"
            root = open_store(str(shutil.copytree(store.uri, place)))
            with suppress(Crash, WinnowError):
                repair(FaultyStore(root, {number: fault}), remake(1.01))
            data = ActivationStore.over(root)
            rows = PLAN.rows_per_unit
            with suppress(IntegrityError, MissingObject):
                found = data.read_rows(HOOK, rows, 2 * rows)
                assert data.manifest.revision == 1
                np.testing.assert_allclose(found, synthetic_rows(PLAN, 1, HOOK) * 1.01, rtol=2**-7)
            np.testing.assert_array_equal(data.read_rows(HOOK, 0, rows), synthetic_rows(PLAN, 0, HOOK))
            repair(root, remake(1.01))
            assert verify(root, "full") == [], (number, fault)
            assert ActivationStore.over(root).manifest.revision <= 1


@pytest.mark.parametrize("fault", ["error_before", "error_after", "lost_reply"])
def test_a_lost_reply_for_the_new_manifest_is_no_conflict(store: ObjectStore, fault: str) -> None:
    SHARDS["gone"](store)
    counted = FaultyStore(open_store(str(shutil.copytree(store.uri, f"{store.uri}-count"))))
    repair(counted, remake(1.01))
    number = counted.calls.index(("put_new", manifest_key(1))) + 1
    assert repair(FaultyStore(store, {number: fault}), remake(1.01)).revised == [1]
    assert ActivationStore.over(store).manifest.revision == 1
    assert verify(store, "full") == []


def test_another_subject_does_not_slip_in(store: ObjectStore) -> None:
    SHARDS["payload flipped"](store)
    before = objects(store)
    with pytest.raises(IntegrityError, match=r"unit 1, hook 'resid_post.1': the recomputed rows are not"):
        repair(store, remake(-1))
    assert objects(store) == before


def test_an_orphan_that_is_torn_is_removed_and_made_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_dataset(store, PLAN, units=[0, 2])
    with pytest.raises(Crash):
        write_unit(FaultyStore(store, {1: "truncate", 2: "crash_before"}), PLAN, 1)
    store.put(receipt_key(2), b"rotten")
    assert repair(store).removed == []
    assert repair(store, remake()).removed == [receipt_key(2), SHARD]
    assert sorted(list_receipts(store, PLAN)) == [0]
    assert write_dataset(store, PLAN) is not None
    assert verify(store, "full") == []


def test_a_manifest_whose_parent_is_lost(store: ObjectStore) -> None:
    SHARDS["gone"](store)
    repair(store, remake(1.01))
    torn(store, manifest_key())
    with pytest.raises(IntegrityError):
        ActivationStore.over(store)
    repair(store)
    assert ActivationStore.over(store).manifest.revision == 1
    assert verify(store, "full") == []


def test_on_s3_an_object_that_changed_meanwhile_is_not_overwritten(s3_uri: str) -> None:
    store = open_store(s3_uri)
    write_dataset(store, PLAN)
    SHARDS["payload flipped"](store)
    version = store.version(SHARD)
    assert version
    store.put(SHARD, b"somebody else's")
    with pytest.raises(StoreError, match="changed while it was repaired"):
        store.replace(SHARD, b"ours", version)
    assert store.get(SHARD) == b"somebody else's"
    assert repair(store, remake()).restored == [SHARD]
    assert verify(store, "full") == []


# The commands


def winnow(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def test_commands(tmp_path: Path) -> None:
    config = pipeline_config(tmp_path, units=3)
    code, out, err = winnow("harvest", config, "--single-writer", "--json")
    assert code == 0, err
    store = open_store(str(tmp_path / "data"))
    before = objects(store)
    flip_bit(store, shard_key(HOOK, 2), 900)
    store.delete(shard_key(OTHER, 1))
    flip_bit(store, tokens_key(3), 40)
    store.delete(tokens_key(1))
    flip_bit(store, TOKEN_DIGESTS_KEY, 3)
    store.put("zarr.json", b"")
    code, shown, err = winnow("verify", store.uri, "--repair", "--json")
    assert code == 1
    assert "zarr.json was written anew" in err
    assert {p["key"] for p in json.loads(shown)["problems"]} >= {shard_key(OTHER, 1), tokens_key(1)}
    code, again, err = winnow("harvest", config, "--repair", "--json")
    assert code == 0, err
    assert json.loads(again)["dataset_sha256"] == json.loads(out)["dataset_sha256"]
    assert objects(store) == before
    assert winnow("verify", store.uri, "--level", "full")[0] == 0
    code, _, err = winnow("harvest", config, "--repair", "--set", "plan.seed=5")
    assert code == 2
    assert "seed" in err
