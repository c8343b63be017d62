"""The conformance suite: what every storage backend must do.

A backend is supported if a subclass of `StoreConformance` that opens it passes.
"""

from __future__ import annotations

import pickle
import secrets
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from winnow.schemas.errors import IntegrityError, MissingObject, StoreError
from winnow.store.check.verify import verify
from winnow.store.objects import ObjectStore
from winnow.store.objects.probe import RACERS, race
from winnow.store.testing.synthetic import make_plan, write_dataset

# A server that looks first and writes later lets two clients win in 19 races of 20 with bodies of a MiB; five
# races miss it once in three million runs.
RACES, RACE_BYTES = 5, 1 << 20


class StoreConformance:
    """What every backend must do.

    Subclass it and define the fixture `store`: an empty root, new for every test. Other processes open
    `store.uri` and take credentials from the environment.
    """

    def test_put_new_creates_once(self, store: ObjectStore) -> None:
        """A second create-only put says False and changes nothing."""
        assert store.put_new("a/b.json", b"first") is True
        assert store.put_new("a/b.json", b"second") is False
        assert store.get("a/b.json") == b"first"

    def test_put_new_waits_for_ready(self, store: ObjectStore) -> None:
        """`ready` is called before the object can be seen; if it raises, nothing is created."""

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
        """An empty object exists."""
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
        # "." sorts before "/", so a store that sorts folder by folder gives another order.
        keys = ["b/2", "b/10", "b.c/1", "a", "bb/1", "b/2.x/y"]
        for key in keys:
            store.put_new(key, key.encode())
        assert list(store.list()) == [(key, len(key)) for key in sorted(keys)]
        assert [key for key, _ in store.list("b")] == ["b/10", "b/2", "b/2.x/y"]

    def test_list_is_complete(self, store: ObjectStore) -> None:
        """Listings of more than one page have every key."""
        # S3 lists 1,000 keys per page.
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
        """At most one of many threads creates an object, and what is stored is the creator's whole body."""
        for number in range(RACES):
            bodies = [bytes([who]) * RACE_BYTES for who in range(RACERS)]
            won = race(store, f"race/{number}", bodies)
            _check_race(store, f"race/{number}", won, bodies)

    def test_processes_create_once(self, store: ObjectStore) -> None:
        """At most one of many processes creates an object, and what is stored is one whole body."""
        command = [sys.executable, "-c", _RACE, store.uri]
        runs = [
            subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
            for number in range(3)
        ]
        # All wait before their put until the last one is ready: start-up takes far longer than a put, so
        # they would otherwise go one after another and show nothing.
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
        """A dataset that is written twice is sealed once, and verifies in full."""
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
    # At most one, not exactly one: on a slow server the creator's reply can come too late, and its second try
    # is told, truly, that something exists (`ObjectStore.put_new`).
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
