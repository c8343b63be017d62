"""The state machine of `tests.support.machine` finds nothing wrong with the store, but with every mutant.

A mutant is the store with one promise broken: what the machine would miss, no green run says anything about.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import get_state_machine_test

from tests.support.machine import Harvest, OneThread, same_metadata
from winnow.schemas.errors import MissingObject, StoreError, WinnowError
from winnow.store.check import repair, verify
from winnow.store.read import fetch
from winnow.store.records import commit
from winnow.store.testing import make_attempt, synthetic
from winnow.store.write import writer

MACHINE = settings(
    max_examples=20, stateful_step_count=14, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module in (repair, verify, writer):
        monkeypatch.setattr(module, "zarr_objects", same_metadata)
    for module in (verify, writer):
        monkeypatch.setattr(module, "ThreadPoolExecutor", OneThread)


TestHarvest = Harvest.TestCase
TestHarvest.settings = MACHINE


def settle_as(outcome):
    """`settle`, with `outcome` deciding what the reply to a put means: None for ours."""

    def settle(root, key, body):
        try:
            reply = root.put_new(key, body)
        except StoreError as error:
            reply = error
        return outcome(root, key, reply)

    return {(commit, "settle"): settle, (writer, "settle"): settle}


def an_unreadable_outcome_is_ours():
    real = commit.settle

    def settle(root, key, body):
        try:
            return real(root, key, body)
        except commit.CommitUnknown:
            return None

    return {(commit, "settle"): settle, (writer, "settle"): settle}


def an_error_means_stored():
    return settle_as(lambda root, key, reply: root.get(key) if reply is False else None)


def what_exists_is_ours():
    def outcome(root, key, reply):
        if isinstance(reply, StoreError):
            raise reply

    return settle_as(outcome)


def receipts_are_overwritten():
    return {(commit, "settle"): lambda root, key, body: root.put(key, body)}


def the_receipt_comes_before_the_shards():
    real, make = writer._store_shard, writer.make_shard

    def early(root, plan, unit, hook, rows):
        if hook == plan.spec.hooks[0]:
            receipt = writer.UnitReceipt(
                plan_fingerprint=plan.fingerprint,
                unit=unit,
                tokens_sha256=writer.tokens_digest(synthetic.synthetic_tokens(plan, unit)),
                shards={name: make(plan, unit, name, everything[name])[1] for name in plan.spec.hooks},
                attempt=make_attempt(),
            )
            writer.commit_receipt(root, plan, receipt)
        return real(root, plan, unit, hook, rows)

    everything = {}
    commit = writer.commit_unit

    def commit_unit(root, plan, unit, rows, **facts):
        everything.update(rows)
        return commit(root, plan, unit, rows, **facts)

    return {(writer, "_store_shard"): early, (synthetic, "commit_unit"): commit_unit}


def an_adopted_shard_is_described_by_our_rows():
    make = writer.make_shard
    return {(writer, "_adopt"): lambda _, plan, unit, hook, rows: make(plan, unit, hook, rows)[1]}


def a_seal_skips_a_unit():
    real = writer.encode_part
    return {(writer, "encode_part"): lambda receipts: real(receipts[:-1])}


def a_seal_does_not_wait():
    real = writer.load_receipt

    def load(root, plan, unit, revision):
        try:
            return real(root, plan, unit, revision)
        except MissingObject:
            return writer.UnitReceipt(
                plan_fingerprint=plan.fingerprint,
                unit=unit,
                tokens_sha256=writer.tokens_digest(synthetic.synthetic_tokens(plan, unit)),
                shards={},
                void="not there yet",
                attempt=make_attempt(),
            )

    standing = writer.list_receipts
    return {
        (writer, "load_receipt"): load,
        (writer, "list_receipts"): lambda root, plan: (
            dict.fromkeys(range(plan.units), 0) | standing(root, plan)
        ),
    }


def a_repair_overwrites_sound_shards():
    return {(repair._Repair, "sound"): lambda *_: False}


def a_repair_removes_sound_orphans():
    def torn(*_):
        raise MissingObject("torn")

    return {(repair, "read_orphan"): torn}


def a_repair_forgets_the_manifest():
    return {(repair._Repair, "manifests"): lambda _: None}


def a_repair_puts_the_receipt_over_the_old_one():
    def commit(root, plan, revised):
        first = revised.model_copy(update={"revision": 0})
        root.put(repair.receipt_key(first.unit), first.to_json())
        return revised

    return {(repair, "commit_receipt"): commit}


def any_checksum_will_do():
    return {(fetch, "check_slice"): lambda *_, **__: None}


def verify_looks_at_no_byte():
    return {(verify._Check, "shard"): lambda *_: iter(())}


MUTANTS = [
    an_unreadable_outcome_is_ours,
    an_error_means_stored,
    what_exists_is_ours,
    receipts_are_overwritten,
    the_receipt_comes_before_the_shards,
    an_adopted_shard_is_described_by_our_rows,
    a_seal_skips_a_unit,
    a_seal_does_not_wait,
    a_repair_overwrites_sound_shards,
    a_repair_removes_sound_orphans,
    a_repair_forgets_the_manifest,
    a_repair_puts_the_receipt_over_the_old_one,
    any_checksum_will_do,
    verify_looks_at_no_byte,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_each_mutant_is_caught(mutant, monkeypatch):
    for (owner, name), broken in mutant().items():
        monkeypatch.setattr(owner, name, broken)
    generated = settings(MACHINE, max_examples=100, database=None, phases=[Phase.generate])
    histories = seed(1)(get_state_machine_test(Harvest, settings=generated))
    with pytest.raises((AssertionError, WinnowError)):
        histories()
