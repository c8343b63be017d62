"""A state machine commits, crashes, retries, damages, repairs and seals; P1 and P2 hold at every step."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress

import hypothesis.strategies as st
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from schemas.errors import ConfigError, IntegrityError, MissingObject, WinnowError
from schemas.harvest import HarvestPlan, UnitReceipt
from store import ActivationStore
from store.commit import load_receipt, standing_receipts
from store.layout import receipt_key, shard_key
from store.manifest import find_manifest
from store.objects import ObjectStore, open_store
from store.repair import repair
from store.shards import Stored, to_stored
from store.testing import (
    Crash,
    FaultyStore,
    flip_bit,
    make_attempt,
    make_plan,
    stored_rows,
    synthetic_rows,
    synthetic_tokens,
    write_plan,
    write_unit,
)
from store.verify import damage, verify
from store.writer import commit_void, seal, tokens_digest

HOOK = "resid_post.1"
PLAN = make_plan(units=3, hooks={HOOK: 2})
ROWS = PLAN.rows_per_unit
UNITS = st.integers(0, PLAN.units - 1)
NOISE = st.sampled_from((1.0, 1.0, 1.004, 0.99))


def faults(calls: int) -> st.SearchStrategy[dict[int, str]]:
    """One or two faults among the first `calls` calls to storage."""
    kinds = ("crash_before", "crash_after", "error_before", "error_after", "lost_reply")
    return st.dictionaries(st.integers(1, calls), st.sampled_from(kinds), min_size=1, max_size=2)


def noisy(scale: float):
    def rows(plan: HarvestPlan, unit: int, hook: str) -> np.ndarray:
        return synthetic_rows(plan, unit, hook) * np.float32(scale)

    return rows


class Harvest(RuleBasedStateMachine):
    """One root, many hands."""

    store: ObjectStore

    @initialize(done=st.integers(0, PLAN.units), sealed=st.booleans())
    def start(self, done: int, sealed: bool) -> None:
        self.folder = tempfile.mkdtemp(prefix="winnow-machine-")
        self.store = open_store(self.folder)
        write_plan(self.store, PLAN)
        self.contents: dict[tuple[int, int], bytes] = {}
        self.damaged: set[int] = set()
        for unit in range(done):
            write_unit(self.store, PLAN, unit)
        if done == PLAN.units and sealed:
            seal(self.store, PLAN)

    def teardown(self) -> None:
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)

    def hand(self, faults: dict[int, str]) -> FaultyStore:
        return FaultyStore(self.store, faults)

    @rule(unit=UNITS, scale=NOISE, faults=faults(3))
    def commit(self, unit: int, scale: float, faults: dict[int, str]) -> None:
        if unit in standing_receipts(self.store, PLAN):
            return  # the work list is the plan minus the receipts
        with suppress(Crash, WinnowError):
            write_unit(self.hand(faults), PLAN, unit, noisy(scale))
            assert unit in standing_receipts(self.store, PLAN)

    @rule(unit=UNITS, scale=NOISE)
    def a_late_worker_commits(self, unit: int, scale: float) -> None:
        """One that was stopped for an hour, say: its receipt is not the first."""
        if unit in self.damaged:
            return
        before = standing_receipts(self.store, PLAN).get(unit)
        receipt = write_unit(self.store, PLAN, unit, noisy(scale)) if before in (None, 0) else None
        if before == 0 and receipt is not None:
            assert receipt.content() == self.contents[unit, 0]

    @rule(unit=UNITS, faults=faults(3))
    def give_up(self, unit: int, faults: dict[int, str]) -> None:
        if unit in standing_receipts(self.store, PLAN):
            return
        tokens = tokens_digest(synthetic_tokens(PLAN, unit))
        with suppress(Crash, WinnowError):
            commit_void(
                self.hand(faults), PLAN, unit, "gave up", tokens_sha256=tokens, attempt=make_attempt()
            )

    @rule(faults=faults(14))
    def seal(self, faults: dict[int, str]) -> None:
        with suppress(Crash, WinnowError):
            seal(self.hand(faults), PLAN)

    @precondition(lambda self: not self.damaged)
    @rule(unit=UNITS, byte=st.integers(0, PLAN.shard_bytes(HOOK) - 1))
    def rot(self, unit: int, byte: int) -> None:
        if self.store.size(shard_key(HOOK, unit)) and self.receipt(unit).shards:
            flip_bit(self.store, shard_key(HOOK, unit), byte)
            self.damaged.add(unit)

    @precondition(lambda self: not self.damaged)
    @rule(unit=UNITS)
    def lose(self, unit: int) -> None:
        if self.receipt(unit).shards:
            self.store.delete(shard_key(HOOK, unit))
            self.damaged.add(unit)

    @rule(scale=NOISE, faults=faults(90))
    def repair(self, scale: float, faults: dict[int, str]) -> None:
        def remake(unit: int) -> tuple[dict[str, Stored], object]:
            return stored_rows(PLAN, unit, noisy(scale)), make_attempt()

        with suppress(Crash, WinnowError):
            repair(self.hand(faults), remake)  # pyright: ignore[reportArgumentType]
            self.damaged.clear()

    def receipt(self, unit: int) -> UnitReceipt:
        standing = standing_receipts(self.store, PLAN)
        nothing = UnitReceipt.model_construct(shards={}, revision=-1)
        return load_receipt(self.store, PLAN, unit, standing[unit]) if unit in standing else nothing

    @invariant()
    def a_receipt_never_changes(self) -> None:
        for unit, newest in standing_receipts(self.store, PLAN).items():
            for revision in range(newest + 1):
                content = load_receipt(self.store, PLAN, unit, revision).content()
                assert self.contents.setdefault((unit, revision), content) == content
        for unit, revision in self.contents:
            assert self.store.size(receipt_key(unit, revision)), "a commit was lost"

    @invariant()
    def only_what_was_damaged_is_damaged(self) -> None:
        found = {problem.unit for problem in damage(verify(self.store, "full"))}
        manifest = find_manifest(self.store, PLAN)
        between = {unit for unit, newest in standing_receipts(self.store, PLAN).items() if newest}
        # A repair that was killed leaves its unit to the next one.
        assert found <= self.damaged | (between if manifest is not None else set())
        assert found >= {unit for unit in self.damaged if self.unsound(unit)}

    def unsound(self, unit: int) -> bool:
        from schemas.base import sha256_hex

        record = self.receipt(unit).shards[HOOK]
        return not self.store.size(record.key) or sha256_hex(self.store.get(record.key)) != record.sha256

    @invariant()
    def no_wrong_row_is_read(self) -> None:
        try:
            data = ActivationStore.over(self.store)
        except ConfigError:
            return  # not sealed
        for unit in range(PLAN.units):
            try:
                rows = data.read_rows(HOOK, unit * ROWS, (unit + 1) * ROWS)
            except (IntegrityError, MissingObject):
                assert unit in self.damaged or data.index.revision[unit] < self.receipt(unit).revision
                continue
            if data.index.void[unit]:
                assert not data.weights([HOOK], unit * ROWS, (unit + 1) * ROWS).any()
                continue
            choices = [to_stored(noisy(s)(PLAN, unit, HOOK), "bfloat16") for s in (1.0, 1.004, 0.99)]
            found = to_stored(rows, "bfloat16")
            sinks = np.concatenate([found == choice for choice in choices]).reshape(3, *found.shape)
            assert sinks.any(axis=0).all()


TestHarvest = Harvest.TestCase
TestHarvest.settings = settings(
    max_examples=20, stateful_step_count=14, deadline=None, suppress_health_check=list(HealthCheck)
)
