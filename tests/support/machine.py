"""A state machine commits, crashes, retries, damages, repairs and seals; P1 and P2 hold at every step."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import hypothesis.strategies as st
import numpy as np
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from winnow.schemas.base import sha256_hex
from winnow.schemas.errors import ConfigError, IntegrityError, MissingObject, WinnowError
from winnow.schemas.harvest import Attempt, HarvestPlan, UnitReceipt
from winnow.store import ActivationStore
from winnow.store.check.repair import repair
from winnow.store.check.verify import verify
from winnow.store.format.layout import receipt_key, shard_key
from winnow.store.format.shards import Stored, to_stored
from winnow.store.format.zarr_metadata import zarr_objects
from winnow.store.objects import ObjectStore, open_store
from winnow.store.records.commit import list_receipts, load_receipt
from winnow.store.records.manifest import find_manifest
from winnow.store.testing import (
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
from winnow.store.write.writer import commit_void, seal, tokens_digest

T = TypeVar("T")
HOOK = "resid_post.1"
HOOKS = {HOOK: 2, "mlp_out.0": 1}
PLAN = make_plan(units=3, hooks=HOOKS)
ROWS = PLAN.rows_per_unit
SCALES = (1.0, 1.004, 0.99)
NOISE = st.sampled_from((1.0, *SCALES))
KINDS = ("crash_before", "crash_after", "error_before", "error_after", "lost_reply")
SHM = Path("/dev/shm")
"""Where there is one, no step waits for a disk; the crashes here are of processes."""


def faults(calls: int) -> st.SearchStrategy[dict[int, str]]:
    """One or two faults among the first `calls` calls to storage; or one, and then an outage.

    An outage leaves the outcome of the call before it unknown.
    """
    numbers, kinds = st.integers(1, calls), st.sampled_from(KINDS)

    def outage(first: int, kind: str, calls: int) -> dict[int, str]:
        return {first: kind} | dict.fromkeys(range(first + 1, first + 1 + calls), "error_before")

    return st.dictionaries(numbers, kinds, min_size=1, max_size=2) | st.builds(
        outage, numbers, st.sampled_from(("error_before", "error_after", "lost_reply")), st.integers(1, 3)
    )


def noisy(scale: float):
    def rows(plan: HarvestPlan, unit: int, hook: str) -> np.ndarray:
        return synthetic_rows(plan, unit, hook) * np.float32(scale)

    return rows


@cache
def readings(unit: int, hook: str) -> np.ndarray:
    """[scales, R, D] what may stand there, in the dtype on disk."""
    return np.stack([to_stored(noisy(scale)(PLAN, unit, hook), PLAN.spec.dtype) for scale in SCALES])


def remake(scale: float) -> Callable[[int], tuple[dict[str, Stored], Attempt]]:
    return lambda unit: (stored_rows(PLAN, unit, noisy(scale)), make_attempt())


def unless_it_dies(act: Callable[[], T]) -> T | None:
    """What `act` returns; None where it crashed or failed."""
    try:
        return act()
    except (Crash, WinnowError):
        return None


class FromFirstWrite(FaultyStore):
    """Counts from the first call that changes something: what comes before it changes no dataset."""

    def _before(self, name: str, key: str) -> str | None:
        return super()._before(name, key) if self.calls or name in ("put_new", "put", "delete") else None


class Harvest(RuleBasedStateMachine):
    """One root, many hands.

    `contents` holds every receipt that was ever seen, `damaged` the units that were damaged since the last
    repair that ended well: nothing else may be wrong.
    """

    store: ObjectStore

    @initialize(sealed=st.sampled_from((False, False, True)))
    def start(self, sealed: bool) -> None:
        self.folder = tempfile.mkdtemp(prefix="winnow-machine-", dir=SHM if SHM.is_dir() else None)
        self.store = open_store(self.folder)
        write_plan(self.store, PLAN)
        self.contents: dict[tuple[int, int], bytes] = {}
        self.damaged: set[int] = set()
        for unit in range(PLAN.units) if sealed else ():
            write_unit(self.store, PLAN, unit)
        if sealed:
            seal(self.store, PLAN)

    def teardown(self) -> None:
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)

    def hand(self, faults: dict[int, str]) -> FaultyStore:
        return FaultyStore(self.store, faults)

    def stands(self, told: UnitReceipt | None) -> None:
        """Whoever is told that a receipt stands finds just that one."""
        assert told is None or load_receipt(self.store, PLAN, told.unit, told.revision) == told

    def units(self, has: Callable[[int | None], bool]) -> list[int]:
        """The units with such a revision of their receipt; None: with none."""
        standing = list_receipts(self.store, PLAN)
        return [unit for unit in range(PLAN.units) if has(standing.get(unit))]

    @property
    def missing(self) -> list[int]:
        """The work list."""
        return self.units(lambda revision: revision is None)

    @property
    def late(self) -> list[int]:
        """Units that somebody may still be about to commit."""
        return [unit for unit in self.units(lambda revision: revision == 0) if unit not in self.damaged]

    @property
    def held(self) -> list[int]:
        return [
            unit for unit in self.units(lambda revision: revision is not None) if self.receipt(unit).shards
        ]

    @precondition(lambda self: self.missing)
    @rule(data=st.data(), scale=NOISE, faults=faults(5))
    def commit(self, data: st.DataObject, scale: float, faults: dict[int, str]) -> None:
        unit = data.draw(st.sampled_from(self.missing), "unit")
        self.stands(unless_it_dies(lambda: write_unit(self.hand(faults), PLAN, unit, noisy(scale))))

    @precondition(lambda self: self.late)
    @rule(data=st.data(), scale=NOISE, faults=faults(5))
    def a_late_worker_commits(self, data: st.DataObject, scale: float, faults: dict[int, str]) -> None:
        """One that was stopped for an hour, say: its receipt is not the first."""
        unit = data.draw(st.sampled_from(self.late), "unit")
        told = unless_it_dies(lambda: write_unit(self.hand(faults), PLAN, unit, noisy(scale)))
        self.stands(told)
        assert told is None or told.content() == self.contents[unit, 0]

    @precondition(lambda self: self.missing)
    @rule(data=st.data(), faults=faults(3))
    def give_up(self, data: st.DataObject, faults: dict[int, str]) -> None:
        unit = data.draw(st.sampled_from(self.missing), "unit")
        tokens = tokens_digest(synthetic_tokens(PLAN, unit))
        facts = {"tokens_sha256": tokens, "attempt": make_attempt()}
        self.stands(unless_it_dies(lambda: commit_void(self.hand(faults), PLAN, unit, "gave up", **facts)))

    @rule(faults=faults(14))
    def seal(self, faults: dict[int, str]) -> None:
        told = unless_it_dies(lambda: seal(self.hand(faults), PLAN))
        assert told is None or find_manifest(self.store, PLAN) == told

    @precondition(lambda self: self.held and not self.damaged)
    @rule(data=st.data(), hook=st.sampled_from(PLAN.spec.hooks), lost=st.booleans())
    def rot(self, data: st.DataObject, hook: str, lost: bool) -> None:
        unit = data.draw(st.sampled_from(self.held), "unit")
        self.damaged.add(unit)
        if lost:
            self.store.delete(shard_key(hook, unit))
        else:
            byte = data.draw(st.integers(0, PLAN.shard_bytes(hook) - 1), "byte")
            flip_bit(self.store, shard_key(hook, unit), byte)

    @rule(scale=NOISE, faults=faults(20), late=st.booleans())
    def repair(self, scale: float, faults: dict[int, str], late: bool) -> None:
        self.repaired(FromFirstWrite(self.store, faults) if late else self.hand(faults), scale)

    def repaired(self, hand: ObjectStore, scale: float) -> bool:
        """Whether the repair came to its end; what was sound is as it was in any case."""
        kept = {key: self.store.get(key) for key in self.sound()}
        done = unless_it_dies(lambda: repair(hand, remake(scale))) is not None
        if done:
            self.damaged.clear()
        for key, body in kept.items():
            assert self.store.get(key) == body, "a sound shard was overwritten"
        return done

    @precondition(lambda self: len(self.missing) < 2)
    @rule(scale=NOISE)
    def run_again_undisturbed(self, scale: float) -> None:
        """Everything comes to its end (P3)."""
        assert self.repaired(self.store, scale)
        for unit in self.missing:
            write_unit(self.store, PLAN, unit, noisy(scale))
        seal(self.store, PLAN)
        assert verify(self.store, "full") == []

    def receipt(self, unit: int) -> UnitReceipt:
        standing = list_receipts(self.store, PLAN)
        nothing = UnitReceipt.model_construct(shards={}, revision=-1)
        return load_receipt(self.store, PLAN, unit, standing[unit]) if unit in standing else nothing

    def sound(self) -> list[str]:
        """Keys of the shards that are what their receipt says, or have none yet."""
        records = [record for unit in self.held for record in self.receipt(unit).shards.values()]
        orphans = [shard_key(hook, unit) for hook in HOOKS for unit in self.missing]
        keys = [record.key for record in records if self.digest(record.key) == record.sha256]
        return keys + [key for key in orphans if self.store.size(key)]

    def digest(self, key: str) -> str | None:
        return sha256_hex(self.store.get(key)) if self.store.size(key) else None

    @invariant()
    def a_receipt_never_changes(self) -> None:
        for unit, newest in list_receipts(self.store, PLAN).items():
            for revision in range(newest + 1):
                content = load_receipt(self.store, PLAN, unit, revision).content()
                assert self.contents.setdefault((unit, revision), content) == content
        for unit, revision in self.contents:
            assert self.store.size(receipt_key(unit, revision)), "a commit was lost"

    def changed(self) -> bool:
        """Whether storage is not as it was at the last call: most of a step is looking at all of it."""
        paths = [path for path in Path(self.folder).rglob("*") if path.is_file()]
        found = {(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in paths} | {
            frozenset(self.damaged)
        }
        before, self.seen = getattr(self, "seen", None), found
        return found != before

    @invariant()
    def only_what_was_damaged_is_damaged(self) -> None:
        if not self.changed():
            return
        self.no_wrong_row_is_read()
        unsound = {
            unit
            for unit in self.held
            for record in self.receipt(unit).shards.values()
            if self.digest(record.key) != record.sha256
        }
        level = "full" if unsound else "index"  # the digests have been looked at
        found = {problem.unit for problem in verify(self.store, level)}
        assert unsound <= found <= self.damaged | ({None} if self.damaged else set())

    def no_wrong_row_is_read(self) -> None:
        try:
            data = ActivationStore.over(self.store)
        except ConfigError:
            return  # not sealed
        for unit, hook in ((unit, hook) for unit in range(PLAN.units) for hook in HOOKS):
            place = (unit * ROWS, (unit + 1) * ROWS)
            try:
                rows = data.read_rows(hook, *place)
            except (IntegrityError, MissingObject):
                assert unit in self.damaged
                continue
            if data.index.void[unit]:
                assert not data.weights([hook], *place).any()
                continue
            found = to_stored(rows, PLAN.spec.dtype)
            assert (readings(unit, hook) == found).any(axis=0).all()


class Later(Future):
    """Does its work when it is asked for the outcome."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self._work = work

    def result(self, timeout: float | None = None) -> object:
        if not self.done():
            try:
                self.set_result(self._work())
            except BaseException as error:
                self.set_exception(error)
        return super().result(timeout)


class OneThread(Executor):
    """Does work in one thread and in order, so that the n-th call to storage is always the same one."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def submit(self, fn, /, *args, **kwargs):
        return Later(partial(fn, *args, **kwargs))


@cache
def _metadata() -> dict[str, bytes]:
    return zarr_objects(PLAN)


def same_metadata(plan: HarvestPlan) -> dict[str, bytes]:
    """As `zarr_objects`, which costs as much as all else that a step does."""
    assert plan.fingerprint == PLAN.fingerprint
    return _metadata()
