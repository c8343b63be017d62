"""`verify` names what is missing, torn or rotten, at the level that should find it, and nothing else."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from winnow.cli import store as cli
from winnow.schemas.errors import ConfigError, IntegrityError, StoreError
from winnow.schemas.harvest import SLICES
from winnow.store import ActivationStore
from winnow.store.check.info import dataset_info
from winnow.store.check.verify import LEVELS, Problem, damage, verify
from winnow.store.format.layout import manifest_key, receipt_key, shard_key, slice_bytes, tokens_key
from winnow.store.format.shards import encode_shard, to_stored
from winnow.store.format.zarr_metadata import TOKEN_DIGESTS_KEY
from winnow.store.objects import ObjectStore, open_store
from winnow.store.records import parts
from winnow.store.testing import (
    FaultyStore,
    flip_bit,
    make_plan,
    synthetic,
    synthetic_rows,
    write_dataset,
    write_plan,
    write_unit,
)
from winnow.store.write import writer
from winnow.store.write.writer import seal

HOOK = "resid_post.1"
PLAN = make_plan(units=3, hooks={HOOK: 4, "mlp_out.0": 2})
SHARD = shard_key(HOOK, 1)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    store = open_store(str(tmp_path / "root"))
    write_dataset(store, PLAN)
    return store


def found_at(store: ObjectStore) -> dict[str, list[Problem]]:
    """Level -> what it finds; each level must find what the ones before it do."""
    found = {level: verify(store, level) for level in LEVELS}
    for shallow, deep in pairwise(LEVELS):
        assert {p.key for p in found[shallow]} <= {p.key for p in found[deep]}
    return found


def first_level(found: dict[str, list[Problem]]) -> str:
    return next(level for level in LEVELS if found[level])


def test_a_sound_dataset(store: ObjectStore) -> None:
    assert found_at(store) == {level: [] for level in LEVELS}


def test_on_s3(s3_uri: str) -> None:
    store = open_store(s3_uri)
    write_dataset(store, PLAN)
    assert verify(store, "full") == []
    flip_bit(store, SHARD, 7 * slice_bytes(PLAN, HOOK) + 3)
    (problem,) = verify(store, "full")
    assert (problem.unit, problem.hook, problem.slice) == (1, HOOK, 7)


# Activations


@pytest.mark.parametrize("number", [0, 31, 63])
@pytest.mark.parametrize("offset", [0, -1, -4, -5])
def test_one_flipped_byte_is_named(store: ObjectStore, number: int, offset: int) -> None:
    size = slice_bytes(PLAN, HOOK)
    flip_bit(store, SHARD, number * size + offset % size)
    found = found_at(store)
    assert first_level(found) == "full"
    (problem,) = found["full"]
    assert (problem.unit, problem.hook, problem.slice, problem.key) == (1, HOOK, number, SHARD)
    assert str(problem).startswith(f"unit 1, hook {HOOK}, slice {number}: ")


@pytest.mark.parametrize("byte", [-1, -5, -SLICES * 16 - 4])
def test_a_flipped_byte_of_the_index(store: ObjectStore, byte: int) -> None:
    flip_bit(store, SHARD, byte)
    found = found_at(store)
    assert first_level(found) == "index"
    assert {(p.unit, p.hook) for p in found["index"]} == {(1, HOOK)}


def test_several_damaged_slices_are_all_named(store: ObjectStore) -> None:
    for number in (3, 40, 41):
        flip_bit(store, SHARD, number * slice_bytes(PLAN, HOOK))
    flip_bit(store, shard_key("mlp_out.0", 2), 0)
    found = [(p.unit, p.hook, p.slice) for p in verify(store, "full")]
    assert found == [(1, HOOK, 3), (1, HOOK, 40), (1, HOOK, 41), (2, "mlp_out.0", 0)]


@pytest.mark.parametrize("length", [0, 10, -1, 1])
def test_torn_shards(store: ObjectStore, length: int) -> None:
    body = store.get(SHARD)
    store.put(SHARD, body + b"x" if length == 1 else body[:length])
    found = found_at(store)
    assert first_level(found) == "size"
    assert [(p.unit, p.hook) for p in found["full"]] == [(1, HOOK)]


def test_a_missing_shard(store: ObjectStore) -> None:
    store.delete(SHARD)
    found = found_at(store)
    assert first_level(found) == "list"
    assert [(p.unit, p.hook, p.what) for p in found["full"]] == [(1, HOOK, "the object is missing")]


def test_a_sound_shard_that_is_not_the_one_committed(store: ObjectStore) -> None:
    other = to_stored(-synthetic_rows(PLAN, 1, HOOK), PLAN.spec.dtype)
    store.put(SHARD, encode_shard(other).data)
    found = found_at(store)
    assert first_level(found) == "full"
    assert [p.slice for p in found["full"]] == [*range(SLICES)]


# Tokens, metadata, receipts, manifest


def test_tokens(store: ObjectStore) -> None:
    flip_bit(store, tokens_key(2), 5)
    (problem,) = found_at(store)["full"]
    assert (problem.level, problem.unit, problem.key) == ("full", 2, tokens_key(2))
    store.delete(tokens_key(2))
    assert [p.level for p in verify(store)] == ["list"]


def test_token_digests(store: ObjectStore) -> None:
    flip_bit(store, TOKEN_DIGESTS_KEY, 40)
    (problem,) = verify(store, "full")
    assert (problem.level, problem.key) == ("list", TOKEN_DIGESTS_KEY)


def test_zarr_metadata(store: ObjectStore) -> None:
    key = f"activations/{HOOK}/zarr.json"
    raw = json.loads(store.get(key))
    store.put(key, json.dumps({**raw, "attributes": {}}).encode())
    assert verify(store, "full") == []
    store.put(key, json.dumps({**raw, "fill_value": 0}).encode())
    assert [(p.level, p.key) for p in verify(store, "full")] == [("index", key)]
    store.put(key, b"{")
    assert [(p.level, p.key) for p in verify(store, "full")] == [("index", key)]
    store.delete(key)
    assert [(p.level, p.key) for p in verify(store)] == [("list", key)]


def test_a_missing_receipt_of_a_sealed_dataset(store: ObjectStore) -> None:
    store.delete(receipt_key(1))
    assert [(p.level, p.unit) for p in verify(store)] == [("list", 1)]


def test_a_changed_receipt_of_a_sealed_dataset(store: ObjectStore) -> None:
    raw = json.loads(store.get(receipt_key(1)))
    raw["shards"][HOOK]["sum_squares"] += 1
    store.put(receipt_key(1), json.dumps(raw).encode())
    assert verify(store, "list") == []
    assert [(p.level, p.unit) for p in verify(store, "full")] == [("full", 1)]


@pytest.mark.parametrize("body", [b"", b"{}", b'{"kind": "winnow.receipt", "version": "9.0"}'])
def test_an_unreadable_receipt(tmp_path: Path, body: bytes) -> None:
    store = open_store(str(tmp_path))
    write_dataset(store, PLAN, units=[0, 1])
    store.put(receipt_key(1), body)
    assert [(p.level, p.unit, p.key) for p in verify(store)] == [("list", 1, receipt_key(1))]


def test_a_damaged_part(store: ObjectStore) -> None:
    (key,) = [key for key, _ in store.list("manifest")]
    flip_bit(store, key, 500)
    assert [(p.level, p.key) for p in verify(store, "full")] == [("list", key)]
    store.delete(key)
    assert [(p.level, p.key) for p in verify(store, "full")] == [("list", key)]


def test_a_manifest_that_lies(store: ObjectStore) -> None:
    raw = json.loads(store.get(manifest_key()))
    store.put(manifest_key(), json.dumps({**raw, "dataset_sha256": "0" * 64, "bytes": 1}).encode())
    assert [p.what.split(" is")[0] for p in verify(store)] == ["dataset_sha256", "bytes"]
    store.put(manifest_key(), json.dumps({**raw, "units": 2}).encode())
    assert [p.key for p in verify(store)] == [manifest_key()]
    store.put(manifest_key(), b"not json")
    assert [p.key for p in verify(store)] == [manifest_key()]


def test_a_plan_that_is_unreadable(store: ObjectStore) -> None:
    store.put("plan.json", b"{")
    assert [p.key for p in verify(store, "full")] == ["plan.json"]


def test_a_plan_that_claims_too_many_units(store: ObjectStore) -> None:
    raw = json.loads(store.get("plan.json"))
    store.put("plan.json", json.dumps({**raw, "units": 10**11}).encode())
    assert damage(verify(store, "full"))


def test_strays_are_named_and_no_damage(store: ObjectStore) -> None:
    store.put_new("activations/other.1/c/0/0", b"x")
    store.put_new(shard_key(HOOK, 99), b"x")
    store.put_new("notes.txt", b"x")
    store.put_new("ledger.json", b"{}")
    found = verify(store, "full")
    assert [p.key for p in found] == ["activations/other.1/c/0/0", shard_key(HOOK, 99), "notes.txt"]
    assert damage(found) == []


# Not sealed yet


def test_on_the_way(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(ConfigError, match="holds no dataset"):
        verify(store)
    write_plan(store, PLAN)
    assert verify(store, "full") == []
    assert dataset_info(store).state == "planned"
    store.delete(tokens_key(2))
    assert dataset_info(store).state == "planning"
    write_plan(store, PLAN)
    write_unit(store, PLAN, 1)
    assert verify(store, "full") == []
    info = dataset_info(store)
    assert (info.state, info.units_committed, info.units) == ("harvesting", 1, 3)
    flip_bit(store, SHARD, 0)
    assert [(p.unit, p.hook, p.slice) for p in verify(store, "full")] == [(1, HOOK, 0)]
    flip_bit(store, SHARD, 0)
    write_unit(store, PLAN, 0)
    write_unit(store, PLAN, 2)
    assert dataset_info(store).state == "harvested"
    manifest = seal(store, PLAN)
    info = dataset_info(store)
    assert (info.state, info.dataset_sha256) == ("sealed", manifest.dataset_sha256)
    assert info.sinks == {HOOK: 0, "mlp_out.0": 0}


def test_typed_columns_that_differ_from_the_receipts(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part whose digest is right and whose columns lie: only a comparison with the JSON tells."""
    for column, lie in (("sum_squares", [1.0, 1.0]), ("sinks", 9), ("sink_rows", [[], [5]])):
        store = open_store(str(tmp_path / column))
        with monkeypatch.context() as patched:
            patched.setitem(parts._VALUES, column, lambda _, lie=lie: lie)
            write_dataset(store, PLAN)
        (problem,) = verify(store, "list")
        assert problem.key.endswith(".parquet")
        assert f"column {column} of unit 0 differs from the unit's receipt" in problem.what


def test_planned_tokens_are_compared_when_a_dataset_is_opened(tmp_path, monkeypatch) -> None:
    store = open_store(str(tmp_path))
    real = writer.commit_unit

    def other_tokens(*args, **facts):
        return real(*args, **facts | {"tokens_sha256": "ab" * 32})

    monkeypatch.setattr(synthetic, "commit_unit", other_tokens)
    write_dataset(store, PLAN)
    with pytest.raises(IntegrityError, match=r"the receipt of unit 0 is for other tokens than were planned"):
        ActivationStore.over(store)


def test_unreachable_storage_is_no_damage(store: ObjectStore) -> None:
    with pytest.raises(StoreError):
        verify(FaultyStore(store, {2: "error_before"}), "full")


def test_an_unknown_level(store: ObjectStore) -> None:
    with pytest.raises(ConfigError, match="list or size or index or full"):
        verify(store, "deep")


def test_progress(store: ObjectStore) -> None:
    seen: list[tuple[int, int]] = []
    verify(store, "full", lambda done, total: seen.append((done, total)), threads=2)
    assert seen == [(number, 6) for number in range(1, 7)]


# The command


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    cli.register(app)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout


def test_verify_command(store: ObjectStore) -> None:
    for level in LEVELS:
        assert run("verify", store.uri, "--level", level)[0] == 0
    flip_bit(store, SHARD, 3 * slice_bytes(PLAN, HOOK))
    code, out = run("verify", store.uri, "--level", "full")
    assert code == 1
    assert f"unit 1, hook {HOOK}, slice 3" in out
    code, out = run("verify", store.uri, "--level", "full", "--json")
    value = json.loads(out)
    assert (code, value["ok"], value["state"]) == (1, False, "sealed")
    (problem,) = value["problems"]
    assert (problem["unit"], problem["hook"], problem["slice"]) == (1, HOOK, 3)


def told(*arguments: str) -> str:
    app = typer.Typer()
    cli.register(app)
    return CliRunner().invoke(app, list(arguments)).stderr


def test_the_cheapest_repair_is_named_first_and_it_mends(store: ObjectStore) -> None:
    cheap, dear = "--repair` puts right", "`winnow harvest CONFIG --repair` makes again"
    flip_bit(store, SHARD, -1)  # of the index
    out = told("verify", store.uri, "--level", "index")
    assert cheap in out
    assert dear + " what is damaged after that" in out
    assert run("verify", store.uri, "--repair")[0] == 0
    store.delete(SHARD)
    out = told("verify", store.uri)
    assert cheap not in out
    assert dear + " what is damaged, from" in out
    store.put("zarr.json", b"")
    store.delete(receipt_key(0))
    out = told("verify", store.uri)
    assert cheap in out
    out = told("verify", store.uri, "--repair")
    assert cheap not in out
    store.put("plan.json", b"{}")
    out = told("verify", store.uri)
    assert "--repair" not in out
    assert "nothing else says what plan.json held" in out


def test_strays_do_not_fail_the_command(store: ObjectStore) -> None:
    store.put_new("notes.txt", b"x")
    code, out = run("verify", store.uri, "--json")
    assert (code, json.loads(out)["strays"]) == (0, ["notes.txt"])


def test_info_command(store: ObjectStore) -> None:
    code, out = run("info", store.uri)
    assert code == 0
    for part in ("sealed", "synthetic", HOOK, PLAN.fingerprint[:16]):
        assert part in out
    code, out = run("info", store.uri, "--json")
    value = json.loads(out)
    assert (value["state"], value["rows"], value["hooks"]) == ("sealed", PLAN.rows, {HOOK: 4, "mlp_out.0": 2})


def test_commands_on_nothing(tmp_path: Path) -> None:
    for command in ("info", "verify"):
        assert run(command, str(tmp_path / "nothing"))[0] == 2
        assert run(command, "gs://bucket/x")[0] == 2


def test_sinks_are_told(tmp_path: Path) -> None:
    def with_sinks(plan, unit, hook):
        rows = synthetic_rows(plan, unit, hook)
        rows[5] *= np.float32(1000)
        return rows

    store = open_store(str(tmp_path))
    manifest = write_dataset(store, PLAN, with_sinks)
    assert manifest is not None
    assert manifest.sinks == {HOOK: 3, "mlp_out.0": 3}
    assert f"{HOOK}: 3" in run("info", store.uri)[1]
