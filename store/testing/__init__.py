"""For tests of Winnow and of storage backends: synthetic datasets, a faulty store, a conformance suite.

A backend is supported when a subclass of `StoreConformance` that makes it passes.
Letters: W windows in a unit, T context length, R rows in a unit, D d_model.
"""

from __future__ import annotations

import pickle
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from winnow.common.clock import now
from winnow.schemas.base import sha256_hex
from winnow.schemas.corpus import CorpusSpec, SourceSpec
from winnow.schemas.errors import IntegrityError, MissingObject, StoreError
from winnow.schemas.harvest import (
    Attempt,
    Compress,
    CorpusFacts,
    Dtype,
    Execution,
    HarvestManifest,
    HarvestPlan,
    PlanSpec,
    UnitReceipt,
)
from winnow.schemas.subject import HookSite, SubjectIdentity
from winnow.store.check.verify import verify
from winnow.store.format.layout import philox_key, row_permutation
from winnow.store.format.shards import Stored, to_stored
from winnow.store.objects import MAX_GET_BYTES, Data, Digest, ObjectStore, Pieces, Ready, joined
from winnow.store.objects.probe import RACERS, race
from winnow.store.write.writer import commit_unit, create_dataset, put_tokens, seal, tokens_digest

T = TypeVar("T")
RowsFn = Callable[[HarvestPlan, int, str], NDArray[np.float32]]
"""(plan, unit, hook) -> float32 [R, D] in stored order."""
RACES, RACE_BYTES = 5, 1 << 20
"""A server that looks first and writes later lets two win in 19 races of 20 with bodies of a MiB."""
VOCABULARY = 500
"""Token ids of synthetic data lie below this."""


# Synthetic datasets


def make_plan(
    units: int = 3,
    windows_per_unit: int = 64,
    context_length: int = 9,
    hooks: Mapping[str, int] | None = None,
    *,
    drop_leading: int = 1,
    validation_units: int = 1,
    dtype: Dtype = "bfloat16",
    compress: Compress = "none",
    seed: int = 0,
    sink_multiple: float = 10.0,
    adopt_tolerance: float = 0.05,
) -> HarvestPlan:
    """A valid plan over synthetic tokens (`synthetic_tokens`).

    Args:
        units: All units, validation included.
        windows_per_unit: W, a multiple of 64.
        context_length: T; rows per window are T - drop_leading.
        hooks: Hook -> D; `{"resid_post.1": 8}` where None.
        drop_leading: As in PlanSpec.
        validation_units: As in PlanSpec.
        dtype: As in PlanSpec.
        compress: As in PlanSpec.
        seed: As in PlanSpec; also of the synthetic tokens and rows.
        sink_multiple: As in PlanSpec.
        adopt_tolerance: As in PlanSpec.
    """
    hooks = hooks or {"resid_post.1": 8}
    digests = _digests(units, windows_per_unit, context_length, seed)
    return HarvestPlan(
        subject=SubjectIdentity(
            model="synthetic",
            architecture="llama",
            weights_sha256=sha256_hex(b"weights"),
            tokenizer_sha256=sha256_hex(b"tokenizer"),
            dtype="float32",
            attention="sdpa",
            layers=4,
            vocabulary=VOCABULARY,
            context_limit=None,
            eos_token_id=0,
        ),
        corpus=CorpusSpec(sources=(SourceSpec(uri="synthetic.txt"),)),
        corpus_facts=CorpusFacts(
            sha256=sha256_hex(b"corpus"), documents=1, tokens=units * windows_per_unit * context_length
        ),
        spec=PlanSpec(
            hooks=tuple(hooks),
            context_length=context_length,
            drop_leading=drop_leading,
            windows_per_unit=windows_per_unit,
            validation_units=validation_units,
            dtype=dtype,
            compress=compress,
            seed=seed,
            sink_multiple=sink_multiple,
            adopt_tolerance=adopt_tolerance,
        ),
        sites=tuple(HookSite(name=name, d_model=width) for name, width in hooks.items()),
        units=units,
        tokens_sha256=sha256_hex(digests.tobytes()),
        execution=Execution(
            batch_windows=8, threads_per_actor=1, code_version="0", created="2025-01-01T00:00:00+00:00"
        ),
    )


def synthetic_tokens(plan: HarvestPlan, unit: int) -> NDArray[np.uint32]:
    """[W, T] tokens of one unit of a `make_plan` plan."""
    return _tokens(unit, plan.spec.windows_per_unit, plan.spec.context_length, plan.spec.seed)


def synthetic_digests(plan: HarvestPlan) -> NDArray[np.uint8]:
    """[units, 32] token digests of a `make_plan` plan."""
    spec = plan.spec
    return _digests(plan.units, spec.windows_per_unit, spec.context_length, spec.seed)


def _tokens(unit: int, windows: int, length: int, seed: int) -> NDArray[np.uint32]:
    raw = np.random.Philox(key=philox_key("synthetic.tokens", seed, unit)).random_raw(windows * length)
    return (raw % VOCABULARY).astype(np.uint32).reshape(windows, length)


def _digests(units: int, windows: int, length: int, seed: int) -> NDArray[np.uint8]:
    found = [bytes.fromhex(tokens_digest(_tokens(unit, windows, length, seed))) for unit in range(units)]
    return np.frombuffer(b"".join(found), np.uint8).reshape(units, 32)


def planned_rows(plan: HarvestPlan, unit: int, hook: str) -> NDArray[np.float32]:
    """[R, D] the known synthetic rows in *planned* order: normal noise of std 1, exact in bfloat16."""
    key = philox_key("synthetic.rows", plan.spec.seed, unit, hook)
    shape = (plan.rows_per_unit, plan.d_model(hook))
    noise = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
    return (noise.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def synthetic_rows(plan: HarvestPlan, unit: int, hook: str) -> NDArray[np.float32]:
    """[R, D] the known synthetic rows in *stored* order: what a reader must give back."""
    return planned_rows(plan, unit, hook)[row_permutation(plan, unit)]


def make_attempt() -> Attempt:
    """An attempt with a random id."""
    return Attempt(
        id=secrets.token_hex(8),
        worker="test",
        seconds=0.0,
        batch_windows=8,
        threads=1,
        device="cpu",
        finished=now(),
    )


def stored_rows(plan: HarvestPlan, unit: int, rows_fn: RowsFn | None = None) -> dict[str, Stored]:
    """Hook -> [R, D] in the dtype on disk: what `commit_unit` takes."""
    make = rows_fn or synthetic_rows
    return {hook: to_stored(make(plan, unit, hook), plan.spec.dtype) for hook in plan.spec.hooks}


def write_unit(
    store: ObjectStore, plan: HarvestPlan, unit: int, rows_fn: RowsFn | None = None
) -> UnitReceipt:
    """Commit one unit of a synthetic dataset."""
    return commit_unit(
        store,
        plan,
        unit,
        stored_rows(plan, unit, rows_fn),
        tokens_sha256=tokens_digest(synthetic_tokens(plan, unit)),
        attempt=make_attempt(),
    )


def write_plan(store: ObjectStore, plan: HarvestPlan) -> None:
    """Put plan, metadata and tokens of a synthetic dataset."""
    create_dataset(store, plan, synthetic_digests(plan))
    for unit in range(plan.units):
        put_tokens(store, plan, unit, synthetic_tokens(plan, unit))


def write_dataset(
    store: ObjectStore,
    plan: HarvestPlan,
    rows_fn: RowsFn | None = None,
    *,
    units: Sequence[int] | None = None,
) -> HarvestManifest | None:
    """A whole synthetic dataset.

    Args:
        store: An empty root, or one where an earlier call stopped.
        plan: From `make_plan`.
        rows_fn: Rows in stored order; `synthetic_rows` where None.
        units: Commit these only and do not seal.

    Returns:
        The manifest, or None where `units` was given.
    """
    write_plan(store, plan)
    for unit in units if units is not None else range(plan.units):
        write_unit(store, plan, unit, rows_fn)
    return seal(store, plan) if units is None else None


# A store that fails on purpose


class Crash(BaseException):
    """The process dies here: nothing but a test catches it."""


class FaultyStore(ObjectStore):
    """A store around another one, whose n-th call goes wrong.

    Calls are counted from 1 over every method that reaches storage; `calls` lists what was called, so
    that a clean run tells how many crash points there are.

    Args:
        inner: The real store.
        faults: Call number -> what happens there, see `FAULTS`.
    """

    FAULTS: ClassVar[Mapping[str, str]] = {
        "crash_before": "Crash; storage never saw the call",
        "crash_after": "Crash; the call took effect",
        "error_before": "StoreError; storage never saw the call",
        "error_after": "StoreError although the call took effect",
        "lost_reply": "a create-only put succeeds, is retried below, and says 'already exists'",
        "truncate": "a put stores half of the bytes and succeeds",
        "absent": "a read says the object is missing",
    }

    def __init__(self, inner: ObjectStore, faults: Mapping[int, str] | None = None) -> None:
        unknown = set((faults or {}).values()) - set(self.FAULTS)
        if unknown:
            raise ValueError(f"no such faults: {sorted(unknown)}")
        self.inner, self.faults, self.uri = inner, dict(faults or {}), inner.uri
        self.calls: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def _before(self, name: str, key: str) -> str | None:
        with self._lock:
            self.calls.append((name, key))
            fault = self.faults.get(len(self.calls))
        if fault == "crash_before":
            raise Crash(name, key)
        if fault == "error_before":
            raise StoreError(f"injected before {name} {key}")
        if fault == "absent":
            raise MissingObject(f"injected: {key} does not exist")
        return fault

    def _after(self, fault: str | None, name: str, key: str) -> None:
        if fault == "crash_after":
            raise Crash(name, key)
        if fault == "error_after":
            raise StoreError(f"injected after {name} {key}")

    def _call(self, name: str, key: str, act: Callable[[], T]) -> T:
        fault = self._before(name, key)
        result = act()
        self._after(fault, name, key)
        return result

    def put_new(
        self, key: str, data: Data | Pieces, ready: Ready | None = None, digest: Digest | None = None
    ) -> bool:
        """See `ObjectStore.put_new`."""
        data = joined(data)
        fault = self._before("put_new", key)
        if fault == "truncate":
            created = self.inner.put_new(key, _half(data), ready)
        else:
            created = self.inner.put_new(key, data, ready, digest)
        self._after(fault, "put_new", key)
        return created and fault != "lost_reply"

    def put(self, key: str, data: Data) -> None:
        """See `ObjectStore.put`."""
        fault = self._before("put", key)
        self.inner.put(key, _half(data) if fault == "truncate" else data)
        self._after(fault, "put", key)

    def get(self, key: str, limit: int = MAX_GET_BYTES) -> bytes:
        """See `ObjectStore.get`."""
        return self._call("get", key, lambda: self.inner.get(key, limit))

    def get_range(self, key: str, start: int, end: int) -> bytes | memoryview:
        """See `ObjectStore.get_range`."""
        return self._call("get_range", key, lambda: self.inner.get_range(key, start, end))

    def get_ranges(self, key: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes | memoryview]:
        """See `ObjectStore.get_ranges`."""
        return self._call("get_ranges", key, lambda: self.inner.get_ranges(key, starts, ends))

    def get_suffix(self, key: str, length: int) -> bytes | memoryview:
        """See `ObjectStore.get_suffix`."""
        return self._call("get_suffix", key, lambda: self.inner.get_suffix(key, length))

    def size(self, key: str) -> int | None:
        """See `ObjectStore.size`."""
        return self._call("size", key, lambda: self.inner.size(key))

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """See `ObjectStore.list`."""
        return self._call("list", prefix, lambda: self.inner.list(prefix))

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        self._call("delete", key, lambda: self.inner.delete(key))

    def child(self, prefix: str) -> ObjectStore:
        """The inner store's child, without faults."""
        return self.inner.child(prefix)


def _half(data: Data) -> bytes:
    return bytes(data)[: len(data) // 2]


def flip_bit(store: ObjectStore, key: str, byte: int) -> None:
    """Flip the lowest bit of one byte of a stored object; negative counts from the end."""
    body = bytearray(store.get(key))
    body[byte] ^= 1
    store.put(key, body)


# Conformance


class StoreConformance:
    """What every backend must do.

    Subclass it and define the fixture `store`: an empty root, fresh for every test. Other processes open
    `store.uri`, with what they need in the environment.
    """

    def test_put_new_creates_once(self, store: ObjectStore) -> None:
        """A second create-only put says False and changes nothing."""
        assert store.put_new("a/b.json", b"first") is True
        assert store.put_new("a/b.json", b"second") is False
        assert store.get("a/b.json") == b"first"

    def test_put_new_waits_for_ready(self, store: ObjectStore) -> None:
        """`ready` is called before the object can be seen; where it raises, nothing is created."""

        def refuse() -> None:
            raise IntegrityError("not these bytes")

        with raises(IntegrityError):
            store.put_new("a", b"bad", refuse)
        assert list(store.list()) == []
        seen: list[int | None] = []
        assert store.put_new("a", b"good", lambda: seen.append(store.size("a")))
        assert seen == [None]
        assert store.get("a") == b"good"

    def test_put_overwrites(self, store: ObjectStore) -> None:
        """`put` replaces."""
        store.put("a", b"first")
        store.put("a", b"2")
        assert store.get("a") == b"2"
        assert store.size("a") == 1

    def test_bodies(self, store: ObjectStore) -> None:
        """Every kind of buffer arrives whole."""
        body = secrets.token_bytes(3 << 20)
        array = np.frombuffer(body, np.uint8).copy()
        for number, data in enumerate((body, bytearray(body), memoryview(body), array.data)):
            assert store.put_new(f"body/{number}", data)
            assert store.get(f"body/{number}") == body

    def test_empty_object(self, store: ObjectStore) -> None:
        """An object of no bytes is an object."""
        assert store.put_new("empty", b"")
        assert store.get("empty") == b""
        assert store.size("empty") == 0

    def test_ranges(self, store: ObjectStore) -> None:
        """Ranges are exact: one, several, and from the end."""
        body = bytes(range(200))
        store.put_new("r", body)
        assert bytes(store.get_range("r", 5, 9)) == body[5:9]
        assert bytes(store.get_range("r", 199, 200)) == body[199:]
        assert bytes(store.get_suffix("r", 20)) == body[-20:]
        found = store.get_ranges("r", [0, 100, 50], [3, 101, 60])
        assert [bytes(part) for part in found] == [body[:3], body[100:101], body[50:60]]

    def test_ranges_past_the_end_are_refused(self, store: ObjectStore) -> None:
        """A short object is an error, never fewer bytes."""
        store.put_new("r", bytes(100))
        for start, end in ((50, 101), (100, 101), (500, 600)):
            with raises(IntegrityError):
                store.get_range("r", start, end)
        with raises(IntegrityError):
            store.get_ranges("r", [0, 90], [10, 110])
        with raises(IntegrityError):
            store.get_suffix("r", 101)

    def test_limit(self, store: ObjectStore) -> None:
        """An object beyond the limit is refused."""
        store.put_new("large", bytes(100))
        assert len(store.get("large", limit=100)) == 100
        with raises(IntegrityError):
            store.get("large", limit=99)

    def test_missing(self, store: ObjectStore) -> None:
        """Absence is MissingObject, None, or an empty list."""
        reads: list[Callable[[], object]] = [
            lambda: store.get("no"),
            lambda: store.get_range("no", 0, 1),
            lambda: store.get_ranges("no", [0], [1]),
            lambda: store.get_suffix("no", 1),
        ]
        for read in reads:
            with raises(MissingObject):
                read()
        assert store.size("no") is None
        assert list(store.list()) == []
        assert list(store.list("no/such")) == []
        store.delete("no")

    def test_list_is_sorted_and_by_folder(self, store: ObjectStore) -> None:
        """Keys come sorted; a prefix is a folder, not the start of a name."""
        keys = ["b/2", "b/10", "b.c/1", "a", "bb/1", "b/2.x/y"]
        for key in keys:
            store.put_new(key, key.encode())
        assert list(store.list()) == [(key, len(key)) for key in sorted(keys)]
        assert [key for key, _ in store.list("b")] == ["b/10", "b/2", "b/2.x/y"]

    def test_list_is_complete(self, store: ObjectStore) -> None:
        """Listings of more than one page have every key."""
        keys = [f"many/{number:04d}" for number in range(1100)]
        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(store.put_new, keys, [b"x"] * len(keys)))
        assert [key for key, _ in store.list("many")] == keys

    def test_delete(self, store: ObjectStore) -> None:
        """A deleted key is free again."""
        store.put_new("d", b"x")
        store.delete("d")
        assert store.size("d") is None
        assert store.put_new("d", b"again")

    def test_child(self, store: ObjectStore) -> None:
        """A child is the same storage under a prefix."""
        child = store.child("in/side")
        child.put_new("x", b"1")
        assert store.get("in/side/x") == b"1"
        assert list(child.list()) == [("x", 1)]
        assert child.uri == f"{store.uri}/in/side"

    def test_hostile_keys_are_refused(self, store: ObjectStore) -> None:
        """No key leaves the root."""
        keys = ("", "/a", "a/", "a//b", "..", "../a", "a/../b", ".hidden", "a/.b", "a\\b", "a b", "ä", "a\n")
        for key in (*keys, "s3://x/y", "x" * 513):
            with raises(StoreError):
                store.put_new(key, b"x")
            with raises(StoreError):
                store.get(key)
        assert list(store.list()) == []

    def test_threads_create_once(self, store: ObjectStore) -> None:
        """Of many threads one creates at the most, every time; what stands is one body, whole: the creator's.

        That nobody is told of his success is no fault: on a slow server its reply can come too late, and the
        second try is told, truly, that something is there (`ObjectStore.put_new`).
        """
        for number in range(RACES):
            bodies = [bytes([who]) * RACE_BYTES for who in range(RACERS)]
            won = race(store, f"race/{number}", bodies)
            _check_race(store, f"race/{number}", won, bodies)

    def test_processes_create_once(self, store: ObjectStore) -> None:
        """Of many processes one creates at the most, and what stands is one body; as with threads."""
        command = [sys.executable, "-c", _RACE, store.uri]
        runs = [
            subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
            for number in range(3)
        ]
        for run in runs:
            assert run.stdout is not None
            assert run.stdout.readline() == b"ready\n"
        replies = [run.communicate(b"go\n", timeout=60)[0].strip() for run in runs]
        assert all(run.returncode == 0 for run in runs)
        bodies = [bytes([number]) * 100_000 for number in range(3)]
        _check_race(store, "race", [reply == b"True" for reply in replies], bodies)

    def test_probe_passes_and_leaves_nothing(self, store: ObjectStore) -> None:
        """The probe accepts the store and tidies up."""
        store.probe()
        store.probe(single_writer=True)
        assert list(store.list()) == []

    def test_never_pickled(self, store: ObjectStore) -> None:
        """No pickle can carry credentials away."""
        with raises(TypeError):
            pickle.dumps(store)
        assert store.uri in repr(store)

    def test_dataset(self, store: ObjectStore) -> None:
        """A dataset is written twice, sealed once, and verifies in full."""
        plan = make_plan(units=2, hooks={"resid_post.1": 8, "mlp_out.0": 4})
        manifest = write_dataset(store, plan)
        assert manifest is not None
        assert write_dataset(store, plan) == manifest
        assert verify(store, "full") == []


_RACE = """
import sys
from winnow.schemas.errors import StoreError
from winnow.store.objects import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    print(store.put_new("race", bytes([int(sys.argv[2])]) * 100_000))
except StoreError:
    print(False)
"""


def _check_race(store: ObjectStore, key: str, won: Sequence[bool], bodies: Sequence[bytes]) -> None:
    assert sum(won) <= 1, f"{sum(won)} of {len(won)} were told that they created {key}"
    standing = store.get(key)
    assert standing in ([bodies[won.index(True)]] if any(won) else bodies)
    assert store.put_new(key, b"late") is False
    assert store.get(key) == standing


@contextmanager
def raises(kind: type[BaseException]) -> Generator[None, None, None]:
    """As `pytest.raises`, so that this module needs no pytest."""
    try:
        yield
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")
