"""`winnow derive`: killed and resumed it gives the same dataset; damage in the parent ends it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.struck import killed
from winnow.harvester.derive.derive import derive
from winnow.schemas.derived import DeriveRule
from winnow.schemas.errors import IntegrityError, MissingObject
from winnow.schemas.readings import RowsSpec
from winnow.store import ActivationStore
from winnow.store.check.verify import verify
from winnow.store.format.labels import label_key
from winnow.store.format.layout import receipt_key, shard_key, tokens_key
from winnow.store.objects import open_store
from winnow.store.testing import make_plan, write_dataset

HOOKS = {"resid_post.1": 8, "mlp_out.2": 4}
ROWS = RowsSpec(special=False)
RULES = {"regrouped": ["--rows", "{special: false}"], "kept": ["--dtype", "float32"]}


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> str:
    root = str(tmp_path_factory.mktemp("parent"))
    plan = make_plan(units=48, windows_per_unit=64, hooks=HOOKS, labels=True, validation_units=6)
    write_dataset(open_store(root), plan)
    return root


def words(parent: str, out: Path, rule: str) -> list[str]:
    return ["winnow", "derive", parent, str(out), *RULES[rule], "--json"]


def finish(parent: str, out: Path, rule: str) -> dict:
    command = [sys.executable, "-m", *words(parent, out, rule)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def attempts(root: Path) -> dict[str, str]:
    return {path.name: json.loads(path.read_text())["attempt"]["id"] for path in root.glob("receipts/*.json")}


# Of the object whose bytes were written just before, and which is not there.
MOMENTS = {
    "while the tokens are written": "tokens/c/1/0",
    "while a shard is written": "activations/.*/c/4/0",
    "in the middle": "receipts/0*9[.]json",
}


@pytest.mark.parametrize("rule", RULES)
def test_killed_at_one_moment_after_another_it_gives_the_same_dataset(parent, tmp_path, rule):
    whole, out = tmp_path / "whole", tmp_path / "out"
    expected = finish(parent, whole, rule)
    units, kept = expected["units"], dict[str, str]()
    for moment in MOMENTS.values():
        killed(f"{out}/{moment}", words(parent, out, rule))
        before, kept = kept, attempts(out)
        assert before.items() <= kept.items(), "a unit that had a receipt was made again"
        assert len(kept) < units, "killed too late to show anything"
    found = finish(parent, out, rule)
    assert found["dataset_sha256"] == expected["dataset_sha256"]
    assert kept.items() <= attempts(out).items(), "a unit that had a receipt was made again"
    assert not verify(open_store(str(out)), level="full")


@pytest.fixture
def own(tmp_path) -> tuple[str, int]:
    """A parent of its own, and the unit that will be damaged."""
    root = str(tmp_path / "parent")
    write_dataset(open_store(root), make_plan(units=12, hooks=HOOKS, labels=True, validation_units=4))
    return root, 9


@pytest.mark.parametrize("damage", ["cut", "flipped", "swapped", "absent"])
def test_a_damaged_shard_of_the_parent_ends_it_and_commits_nothing_wrong(own, tmp_path, damage):
    root, unit = own
    dataset, path = ActivationStore.open(root), Path(root, shard_key("mlp_out.2", unit))
    body, other = path.read_bytes(), Path(root, shard_key("mlp_out.2", unit - 1)).read_bytes()
    damaged = {"cut": body[: len(body) // 2], "flipped": b"?" + body[1:], "swapped": other, "absent": None}
    for name, rule in {"regrouped": DeriveRule(rows=ROWS), "kept": DeriveRule()}.items():
        out, root_out = open_store(str(tmp_path / name)), Path(tmp_path, name)
        path.unlink()
        if damaged[damage] is not None:
            path.write_bytes(damaged[damage])
        with pytest.raises((IntegrityError, MissingObject), match=f"unit {unit}"):
            derive(dataset, out, rule, dtype="float32")
        committed = len(attempts(root_out))
        assert not (root_out / "manifest.json").exists()
        path.write_bytes(body)
        plan, _ = derive(dataset, out, rule, dtype="float32")
        assert 0 < committed < plan.units
        assert not verify(out, level="full")


@pytest.mark.parametrize("key", [tokens_key(9), label_key("flags", 9)])
def test_tokens_or_labels_that_changed_places_end_it_before_anything_is_written(own, tmp_path, key):
    root, unit = own
    Path(root, key).write_bytes(Path(root, key.replace(f"/{unit}/", f"/{unit - 1}/")).read_bytes())
    with pytest.raises(IntegrityError, match=f"unit {unit}"):
        derive(ActivationStore.open(root), open_store(str(tmp_path / "out")), DeriveRule(rows=ROWS))
    assert not (tmp_path / "out").exists()


def told(*arguments: str) -> str:
    """What a command that fails says."""
    command = [sys.executable, "-m", "winnow", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 1
    return result.stderr


def test_lost_objects_are_copied_from_another_root_as_verify_says(parent, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    for root in (out, again):
        finish(parent, root, "regrouped")
    store, other = open_store(str(out)), open_store(str(again))
    lost = (shard_key("mlp_out.2", 1), label_key("role", 2), tokens_key(0))
    for key in lost:
        store.delete(key)
    said = told("verify", str(out))
    made = ActivationStore.open(parent).dataset_sha256
    assert made is not None
    assert (
        f"(from dataset {made[:12]}: special=false, stored as bfloat16): copy from there what is damaged"
        in said
    )
    assert "harvest" not in said
    for key in lost:
        store.put(key, other.get(key))
    assert not verify(store, level="full")


def test_an_incomplete_shard_is_deleted_and_made_again_as_the_error_says(parent, tmp_path):
    out = tmp_path / "out"
    finish(parent, out, "kept")
    store = open_store(str(out))
    key = shard_key("resid_post.1", 1)
    whole = store.get(key)
    store.put(key, whole[:-1])
    for told_of in (receipt_key(1), "manifest.json"):
        store.delete(told_of)
    said = told(*words(parent, out, "kept")[1:])
    assert "is incomplete" in said
    assert "Delete it while nothing else writes to this root" in said
    store.delete(key)
    finish(parent, out, "kept")
    assert store.get(key) == whole
    assert not verify(store, level="full")
