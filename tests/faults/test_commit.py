"""Exactly once: whatever call fails, and however, running again gives the one same dataset (P1, P3)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from winnow.schemas.errors import (
    CommitUnknown,
    IntegrityError,
    NonFiniteError,
    PlanMismatch,
    StoreError,
    WinnowError,
)
from winnow.schemas.harvest import HarvestPlan, UnitReceipt
from winnow.store.check.verify import verify
from winnow.store.format.layout import manifest_key, receipt_key, shard_key, tokens_key
from winnow.store.format.shards import to_stored
from winnow.store.objects import ObjectStore, open_store
from winnow.store.records import parts
from winnow.store.records.commit import list_receipts, load_receipt
from winnow.store.testing import (
    Crash,
    FaultyStore,
    make_attempt,
    make_plan,
    stored_rows,
    synthetic_digests,
    synthetic_rows,
    synthetic_tokens,
    write_dataset,
    write_plan,
    write_unit,
)
from winnow.store.write import writer
from winnow.store.write.writer import (
    commit_unit,
    commit_void,
    create_dataset,
    put_tokens,
    seal,
    tokens_digest,
)

HOOK = "resid_post.1"
PLAN = make_plan(units=2, hooks={HOOK: 4, "mlp_out.0": 2})
PUT_FAULTS = ("crash_before", "crash_after", "error_before", "error_after", "lost_reply")


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "root"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The dataset digest of an undisturbed run."""
    return digest_of(open_store(str(tmp_path_factory.mktemp("reference"))))


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Every storage call of an undisturbed run."""
    faulty = FaultyStore(open_store(str(tmp_path_factory.mktemp("calls"))))
    digest_of(faulty)
    return faulty.calls


def digest_of(store: ObjectStore, plan: HarvestPlan = PLAN) -> str:
    manifest = write_dataset(store, plan)
    assert manifest is not None
    return manifest.dataset_sha256


def attempt(store: ObjectStore, faults: dict[int, str]) -> None:
    """One run that may die."""
    with suppress(Crash, WinnowError):
        write_dataset(FaultyStore(store, faults), PLAN)


@pytest.mark.parametrize("fault", PUT_FAULTS)
def test_every_crash_point(fault: str, tmp_path: Path, calls: list[tuple[str, str]], reference: str) -> None:
    assert sum(name == "put_new" for name, _ in calls) == 18
    for number in range(1, len(calls) + 1):
        store = open_store(str(tmp_path / f"{number}"))
        attempt(store, {number: fault})
        assert digest_of(store) == reference, calls[number - 1]
        assert verify(store, "full") == [], calls[number - 1]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.integers(1, 45), st.sampled_from(PUT_FAULTS), max_size=4), max_size=4))
def test_any_history_of_faults(
    tmp_path_factory: pytest.TempPathFactory, reference: str, history: list[dict[int, str]]
) -> None:
    store = open_store(str(tmp_path_factory.mktemp("history")))
    for faults in history:
        attempt(store, faults)
    assert digest_of(store) == reference
    assert verify(store, "full") == []


# The receipt's classifier


def receipt_call(store: ObjectStore) -> int:
    """Number of the call that puts the receipt of unit 0, in `write_unit` on a clean store."""
    counting = FaultyStore(store)
    write_unit(counting, PLAN, 0)
    number = counting.calls.index(("put_new", receipt_key(0))) + 1
    for key, _ in list(store.list()):
        store.delete(key)
    return number


@pytest.mark.parametrize("fault", ["error_after", "lost_reply"])
def test_our_own_receipt_is_recognised(store: ObjectStore, fault: str) -> None:
    number = receipt_call(store)
    receipt = write_unit(FaultyStore(store, {number: fault}), PLAN, 0)
    assert receipt == load_receipt(store, PLAN, 0)
    assert receipt.attempt.adopted == ()


def test_an_absent_receipt_is_put_again(store: ObjectStore) -> None:
    number = receipt_call(store)
    faulty = FaultyStore(store, {number: "error_before"})
    receipt = write_unit(faulty, PLAN, 0)
    assert receipt == load_receipt(store, PLAN, 0)
    assert [name for name, key in faulty.calls if key == receipt_key(0)] == ["put_new", "get", "put_new"]


def test_puts_are_bounded(store: ObjectStore) -> None:
    number = receipt_call(store)
    faults = {number + 2 * retry: "error_before" for retry in range(9)}
    faulty = FaultyStore(store, faults)
    with pytest.raises(StoreError, match="injected before put_new"):
        write_unit(faulty, PLAN, 0)
    assert list_receipts(store, PLAN) == {}
    assert sum(key == receipt_key(0) for _, key in faulty.calls) == 6


def test_an_unreadable_outcome_is_unknown_and_resolved_later(store: ObjectStore) -> None:
    number = receipt_call(store)
    with pytest.raises(CommitUnknown, match=r"unknown.*Run the same command again") as caught:
        write_unit(FaultyStore(store, {number: "error_after", number + 1: "error_before"}), PLAN, 0)
    assert caught.value.exit_code == 1
    before = load_receipt(store, PLAN, 0)
    assert write_unit(store, PLAN, 0) == before


def test_an_earlier_receipt_wins(store: ObjectStore) -> None:
    first = write_unit(store, PLAN, 0)
    second = write_unit(store, PLAN, 0)
    assert second == first


def test_a_void_receipt_and_a_later_attempt(store: ObjectStore) -> None:
    tokens = tokens_digest(synthetic_tokens(PLAN, 0))
    void = commit_void(store, PLAN, 0, "three failures", tokens_sha256=tokens, attempt=make_attempt())
    assert write_unit(store, PLAN, 0) == void
    write_plan(store, PLAN)
    write_unit(store, PLAN, 1)
    manifest = seal(store, PLAN)
    assert manifest.void_units == (0,)


@pytest.mark.parametrize("damage", ["torn", "another plan", "another unit"])
def test_a_receipt_that_is_none_of_ours(store: ObjectStore, damage: str) -> None:
    if damage == "torn":
        store.put_new(receipt_key(0), b'{"kind": "winnow.rec')
    elif damage == "another plan":
        other = make_plan(units=2, hooks={HOOK: 4, "mlp_out.0": 2}, seed=1)
        store.put_new(receipt_key(0), write_unit(store.child("other"), other, 0).to_json())
    else:
        store.put_new(receipt_key(0), write_unit(store.child("other"), PLAN, 1).to_json())
    with pytest.raises(IntegrityError, match="receipt"):
        write_unit(store, PLAN, 0)


# Adoption of a shard whose attempt died


def die_before_receipt(store: ObjectStore, rows_fn=None) -> None:
    with pytest.raises(Crash):
        write_unit(FaultyStore(store, {3: "crash_before"}), PLAN, 0, rows_fn)
    assert [key for key, _ in store.list()] == sorted(shard_key(hook, 0) for hook in PLAN.spec.hooks)


def test_an_orphan_is_adopted_with_its_own_digests(store: ObjectStore) -> None:
    def noisy(plan: HarvestPlan, unit: int, hook: str) -> np.ndarray:
        return synthetic_rows(plan, unit, hook) * np.float32(1.01)

    die_before_receipt(store)
    receipt = write_unit(store, PLAN, 0, noisy)
    clean = write_unit(store.child("clean"), PLAN, 0)
    assert receipt.content() == clean.content()
    assert receipt.attempt.adopted == PLAN.spec.hooks
    assert clean.attempt.adopted == ()


def test_an_orphan_with_other_rows_is_refused(store: ObjectStore) -> None:
    die_before_receipt(store, lambda plan, unit, hook: -synthetic_rows(plan, unit, hook))
    with pytest.raises(IntegrityError, match=r"unit 0, hook 'resid_post.1'.*adopt_tolerance = 0.05.*got 2"):
        write_unit(store, PLAN, 0)
    assert list_receipts(store, PLAN) == {}


def test_an_orphan_that_is_torn_is_refused(store: ObjectStore) -> None:
    with pytest.raises(Crash):
        write_unit(FaultyStore(store, {1: "truncate", 2: "crash_before"}), PLAN, 0)
    with pytest.raises(IntegrityError, match=r"unit 0, hook 'resid_post.1'.*is incomplete"):
        write_unit(store, PLAN, 0)


@pytest.mark.parametrize("byte", [100, -50])
def test_an_orphan_with_a_flipped_bit_is_refused(store: ObjectStore, byte: int) -> None:
    die_before_receipt(store)
    body = bytearray(store.get(shard_key(HOOK, 0)))
    body[byte] ^= 0x40
    store.put(shard_key(HOOK, 0), body)
    with pytest.raises(IntegrityError, match=r"unit 0, hook 'resid_post.1'"):
        write_unit(store, PLAN, 0)


def test_a_put_that_stores_half_is_found(store: ObjectStore) -> None:
    write_plan(store, PLAN)
    write_unit(FaultyStore(store, {1: "truncate"}), PLAN, 0)
    found = verify(store, "size")
    assert [(p.level, p.unit, p.hook) for p in found] == [("size", 0, HOOK)]


# Bad rows and arguments


def test_a_nan_is_named_and_nothing_is_written(store: ObjectStore) -> None:
    def bad(plan: HarvestPlan, unit: int, hook: str) -> np.ndarray:
        rows = synthetic_rows(plan, unit, hook)
        rows[17, 1] = np.nan
        return rows

    with pytest.raises(NonFiniteError, match=r"unit 1, hook 'resid_post.1', stored row 17"):
        write_unit(store, PLAN, 1, bad)
    assert list(store.list()) == []


def test_arguments_are_checked(store: ObjectStore) -> None:
    rows, last = stored_rows(PLAN, 0), PLAN.spec.hooks[-1]
    assert last != HOOK, "a hook before it must not be written either"
    wrong = [
        ({HOOK: rows[HOOK]}, 0, "rows of hooks"),
        ({**rows, HOOK: rows[HOOK][:-1]}, 0, "must be uint16"),
        ({**rows, HOOK: to_stored(synthetic_rows(PLAN, 0, HOOK), "float32")}, 0, "must be uint16"),
        ({**rows, last: rows[last][:, :-1].copy()}, 0, f"rows of '{last}' must be uint16"),
        ({**rows, last: np.pad(rows[last], ((0, 0), (0, 1)))}, 0, f"rows of '{last}' must be uint16"),
        (rows, 2, "unit"),
        (rows, -1, "unit"),
    ]
    for given_rows, unit, said in wrong:
        with pytest.raises(ValueError, match=said):
            commit_unit(store, PLAN, unit, given_rows, tokens_sha256="0" * 64, attempt=make_attempt())
    with pytest.raises(ValueError, match="tokens of a unit"):
        put_tokens(store, PLAN, 0, synthetic_tokens(PLAN, 0)[1:])
    assert list(store.list()) == []


# Plans and tokens


def test_another_plan_is_refused_with_the_fields(store: ObjectStore) -> None:
    write_plan(store, PLAN)
    before = list(store.list())
    other = make_plan(units=2, hooks={HOOK: 4, "mlp_out.0": 2}, context_length=10, seed=3)
    with pytest.raises(PlanMismatch) as caught:
        create_dataset(store, other, synthetic_digests(other))
    for part in ("spec.seed: stored 0, asked for 3", "spec.context_length: stored 9, asked for 10"):
        assert part in str(caught.value)
    assert "execution" not in str(caught.value)
    assert list(store.list()) == before


def test_the_first_plan_s_batch_shape_holds(store: ObjectStore) -> None:
    create_dataset(store, PLAN, synthetic_digests(PLAN))
    later = PLAN.model_copy(update={"execution": PLAN.execution.model_copy(update={"batch_windows": 99})})
    assert create_dataset(store, later, synthetic_digests(PLAN)) == PLAN


def test_digests_must_be_the_plan_s(store: ObjectStore) -> None:
    digests = synthetic_digests(PLAN).copy()
    digests[0, 0] ^= 1
    with pytest.raises(IntegrityError, match="token digests"):
        create_dataset(store, PLAN, digests)
    assert list(store.list()) == []


def test_other_tokens_are_refused(store: ObjectStore) -> None:
    write_plan(store, PLAN)
    before = store.get(tokens_key(0))
    put_tokens(store, PLAN, 0, synthetic_tokens(PLAN, 0))
    with pytest.raises(IntegrityError, match=r"tokens/c/0/0 differs"):
        put_tokens(store, PLAN, 0, synthetic_tokens(PLAN, 1))
    assert store.get(tokens_key(0)) == before


# Many writers at once


def test_one_unit_on_eight_workers(store: ObjectStore) -> None:
    write_plan(store, PLAN)

    def noisy(number: int) -> UnitReceipt:
        scale = np.float32(1 + number / 1000)
        return write_unit(store, PLAN, 0, lambda plan, unit, hook: synthetic_rows(plan, unit, hook) * scale)

    with ThreadPoolExecutor(8) as pool:
        receipts = list(pool.map(noisy, range(8)))
    assert len({receipt.attempt.id for receipt in receipts}) == 1
    assert verify(store, "full") == []


def test_two_seals_at_once(store: ObjectStore) -> None:
    write_dataset(store, PLAN, units=[0, 1])
    with ThreadPoolExecutor(4) as pool:
        manifests = list(pool.map(lambda _: seal(store, PLAN), range(4)))
    assert len({manifest.to_json() for manifest in manifests}) == 1


# Seal


def test_seal_lists_missing_units(store: ObjectStore) -> None:
    plan = make_plan(units=5)
    write_dataset(store, plan, units=[1, 3])
    with pytest.raises(WinnowError, match=r"3 of 5 units have no receipt.*missing 0, 2, 4"):
        seal(store, plan)
    assert store.size(manifest_key()) is None


def test_seal_in_several_parts(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(units=7)
    monkeypatch.setattr(writer, "PART_UNITS", 3)
    manifest = write_dataset(store, plan)
    assert manifest is not None
    assert [(part.first_unit, part.units) for part in manifest.parts] == [(0, 3), (3, 3), (6, 1)]
    receipts = [receipt for part in manifest.parts for receipt in parts.read_part(store, plan, part)]
    assert [receipt.unit for receipt in receipts] == list(range(7))
    assert parts.dataset_digest(plan, receipts) == manifest.dataset_sha256
    assert verify(store, "full") == []


def test_seal_is_deterministic_and_idempotent(store: ObjectStore, tmp_path: Path) -> None:
    manifest = write_dataset(store, PLAN)
    assert seal(store, PLAN) == manifest
    assert digest_of(open_store(str(tmp_path / "again"))) == manifest.dataset_sha256
    loaded = [load_receipt(store, PLAN, unit) for unit in range(2)]
    assert parts.encode_part(loaded)[1] == manifest.parts[0]


def test_a_manifest_of_other_data_is_refused(store: ObjectStore) -> None:
    other = make_plan(units=2, hooks={HOOK: 4, "mlp_out.0": 2}, seed=1)
    write_dataset(store.child("other"), other)
    write_dataset(store, PLAN, units=[0, 1])
    store.put_new(manifest_key(), store.get(f"other/{manifest_key()}"))
    with pytest.raises(IntegrityError, match="plan_fingerprint"):
        seal(store, PLAN)


def test_on_s3(s3_uri: str, reference: str) -> None:
    store = open_store(s3_uri)
    for number in (9, 14, 18, 25):
        attempt(store, {number: "crash_after"})
    assert digest_of(store) == reference
    assert verify(store, "full") == []
