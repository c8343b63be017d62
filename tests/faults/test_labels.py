"""Labels are read as they were planned, or an error names the chunk."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from tests.integration.test_planner import make_config, planned, tree, write_corpus
from winnow.harvester.plan.digests import PlanDigests
from winnow.harvester.plan.planner import find_plan, missing_tokens
from winnow.harvester.run.mend import _mend_tokens
from winnow.schemas.errors import ConfigError, IntegrityError, MissingObject
from winnow.store import ActivationStore
from winnow.store.check.repair import repair
from winnow.store.check.verify import verify
from winnow.store.format.labels import LABELS, label_key
from winnow.store.format.layout import tokens_key
from winnow.store.format.zarr_metadata import LABEL_DIGESTS_KEY
from winnow.store.objects import ObjectStore, open_store
from winnow.store.read.reader import load_token_digests
from winnow.store.testing import flip_bit, make_plan, synthetic_labels, write_dataset
from winnow.store.write.writer import create_dataset, put_labels
from winnow.subject.testing import byte_subject

PLAN = make_plan(units=3, labels=True)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    made = open_store(str(tmp_path / "root"))
    write_dataset(made, PLAN)
    return made


def test_labels_are_read_back_also_by_zarr(store: ObjectStore, tmp_path: Path) -> None:
    dataset = ActivationStore.over(store)
    group = zarr.open_group(tmp_path / "root", mode="r")
    for unit in range(PLAN.units):
        wanted = synthetic_labels(PLAN, unit)
        found = dataset.unit_labels(unit)
        assert list(found) == list(LABELS)
        for name, values in found.items():
            assert values.dtype == LABELS[name]
            assert np.array_equal(values, wanted[name])
            array = group[f"labels/{name}"]
            assert isinstance(array, zarr.Array)
            assert np.array_equal(array[64 * unit : 64 * unit + 64], values)
    assert list(dataset.unit_labels(0, ["turn"])) == ["turn"]
    with pytest.raises(ConfigError, match="expected one of role, turn"):
        dataset.unit_labels(0, ["colour"])


# Not `source`: of one source, every chunk of it is the same.
@pytest.mark.parametrize("name", [name for name in LABELS if name != "source"])
def test_a_damaged_chunk_is_never_read(store: ObjectStore, name: str) -> None:
    key = label_key(name, 1)
    sound = store.get(key)
    other = store.get(label_key(name, 2))
    store.put(key, other)
    with pytest.raises(IntegrityError, match=rf"label '{name}' of unit 1: expected sha256"):
        ActivationStore.over(store).unit_labels(1)
    store.put(key, sound[:-5])
    with pytest.raises(IntegrityError, match="wrong length"):
        ActivationStore.over(store).unit_labels(1)
    store.put(key, sound)
    flip_bit(store, key, 9)
    with pytest.raises(IntegrityError, match="crc32c"):
        ActivationStore.over(store).unit_labels(1)
    store.delete(key)
    with pytest.raises(MissingObject, match=f"label '{name}' of unit 1 is missing"):
        ActivationStore.over(store).unit_labels(1)


def test_damaged_digests_are_never_believed(store: ObjectStore) -> None:
    flip_bit(store, LABEL_DIGESTS_KEY, 40)
    with pytest.raises(IntegrityError, match="label digests"):
        ActivationStore.over(store).unit_labels(0)
    store.delete(LABEL_DIGESTS_KEY)
    with pytest.raises(MissingObject, match="lacks its label digests"):
        ActivationStore.over(store).unit_labels(0)


def test_stored_labels_are_not_overwritten(store: ObjectStore) -> None:
    before = store.get(label_key("role", 0))
    put_labels(store, PLAN, 0, synthetic_labels(PLAN, 0))
    with pytest.raises(IntegrityError, match=r"labels/role/c/0/0 differs from what the plan gives"):
        put_labels(store, PLAN, 0, synthetic_labels(PLAN, 1))
    assert store.get(label_key("role", 0)) == before
    with pytest.raises(IntegrityError, match="the label digests are not those of the plan"):
        create_dataset(store, PLAN, load_token_digests(store, PLAN))


def test_a_dataset_of_an_earlier_version_says_that_it_has_none(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    plan = make_plan()
    write_dataset(store, plan)
    assert "labels" not in plan.to_json().decode()
    with pytest.raises(ConfigError, match=r"has no labels.*new root"):
        ActivationStore.over(store).unit_labels(0)


def keys_found(store: ObjectStore, level: str) -> list[tuple[str, int | None, str]]:
    return [(problem.level, problem.unit, problem.key) for problem in verify(store, level)]


@pytest.mark.parametrize("name", ["role", "document"])
def test_verify_finds_damaged_labels(store: ObjectStore, name: str) -> None:
    assert not verify(store, "full")
    key = label_key(name, 2)
    sound = store.get(key)
    store.put(key, store.get(label_key(name, 1)))
    assert keys_found(store, "index") == []
    assert keys_found(store, "full") == [("full", 2, key)]
    store.put(key, sound[:-1])
    assert keys_found(store, "list") == []
    assert keys_found(store, "size") == [("size", 2, key)]
    store.delete(key)
    assert keys_found(store, "list") == [("list", 2, key)]
    assert verify(store)[0].lost


def test_repair_restores_the_label_digests(store: ObjectStore) -> None:
    sound = store.get(LABEL_DIGESTS_KEY)
    flip_bit(store, LABEL_DIGESTS_KEY, 40)
    assert keys_found(store, "list") == [("list", None, LABEL_DIGESTS_KEY)]
    assert repair(store).restored == [LABEL_DIGESTS_KEY]
    assert store.get(LABEL_DIGESTS_KEY) == sound
    store.delete("labels/role/zarr.json")
    assert repair(store).restored == ["labels/role/zarr.json"]
    assert not verify(store, "full")


def test_repair_recomputes_labels_from_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path)
    config = make_config(tmp_path)
    plan, root, _ = planned(config)
    before = tree(tmp_path / "root")
    monkeypatch.setattr("winnow.harvester.plan.planner._outline", lambda _: byte_subject())
    damaged = [label_key("role", 0), label_key("offset", 1), LABEL_DIGESTS_KEY]
    flip_bit(root, damaged[0], 3)
    root.delete(damaged[1])
    root.delete(damaged[2])
    assert sorted(_mend_tokens(config, root, plan)) == sorted(damaged)
    assert tree(tmp_path / "root") == before
    assert _mend_tokens(config, root, plan) == []
    assert not verify(root, "full")


def test_a_plan_that_was_killed_has_the_same_labels_when_it_goes_on(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    config = make_config(tmp_path)
    plan, root, _ = planned(config)
    before = tree(tmp_path / "root")
    # What a planner leaves that is killed between the chunks of a unit.
    for name in ("flags", "source", "document", "offset"):
        root.delete(label_key(name, 1))
    root.delete(tokens_key(1))
    root.delete(label_key("role", 2))
    assert missing_tokens(plan, root) == [1, 2]
    assert find_plan(config, root) is None
    assert planned(config)[0] == plan
    assert tree(tmp_path / "root") == before


def test_a_plan_of_an_earlier_version_goes_on_without_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path)
    config = make_config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(PlanDigests, "planned_labels", lambda _: None)
        plan, root, _ = planned(config)
    assert plan.labels is None
    before = tree(tmp_path / "root")
    assert not [name for name in before if "label" in name]
    root.delete(tokens_key(1))
    assert planned(config)[0] == plan
    assert tree(tmp_path / "root") == before
    assert not verify(root, "full")
    monkeypatch.setattr("winnow.harvester.plan.planner._outline", lambda _: byte_subject())
    flip_bit(root, tokens_key(0), 40)
    assert _mend_tokens(config, root, plan) == [tokens_key(0)]
    assert tree(tmp_path / "root") == before
