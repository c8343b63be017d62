"""The probe: whether storage keeps what the commit relies on, tried before anything else is written.

Two puts in turn cannot show a server that looks whether the object is there and writes it later. So the probe
also races: threads at a barrier create one key, with bodies that take the server a while.
"""

from __future__ import annotations

import logging
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NoReturn

from winnow.schemas.errors import IntegrityError, StoreError

if TYPE_CHECKING:
    from winnow.store.objects.base import ObjectStore

RACERS = 8
"""Threads that create one key at the same time."""

log = logging.getLogger("winnow.store")


def race(store: ObjectStore, key: str, bodies: list[bytes]) -> list[bool]:
    """Create `key` from as many threads as there are bodies, at the same moment; who was told "created".

    An error counts as "not created": it may have taken effect all the same.
    """
    start = threading.Barrier(len(bodies))

    def claim(body: bytes) -> bool:
        start.wait()
        try:
            return store.put_new(key, body)
        except StoreError:
            return False

    with ThreadPoolExecutor(len(bodies), thread_name_prefix="winnow-race") as pool:
        return list(pool.map(claim, bodies))


def probe_requests(store: ObjectStore) -> tuple[int, int]:
    """Puts and gets of one probe; a delete counts as a put."""
    races = store.probe_races
    return 3 + races * (RACERS + 1) + store.remote * 2, 8 + races


class Probe:
    """One look at a store. `run` may be called once.

    Args:
        store: What is looked at.
        single_writer: Accept a store that ignores if-none-match.
    """

    def __init__(self, store: ObjectStore, single_writer: bool) -> None:
        self._store, self._single_writer = store, single_writer
        self._place = f"probe-{secrets.token_hex(16)}"
        self._used = list[str]()
        self._answered = False
        """Whether any put was answered: before that there is nothing to tidy up that anybody could find."""

    def run(self) -> None:
        """StoreError with what the store got wrong; the probe's objects are removed where that is allowed."""
        try:
            self._alone()
            if not self._single_writer:
                for _ in range(self._store.probe_races):
                    self._race()
            self._store.examine(self._key)
        finally:
            self._tidy()

    def _key(self) -> str:
        """A key that nobody else uses, to be removed in the end."""
        self._used.append(f"{self._place}/{len(self._used)}")
        return self._used[-1]

    def _alone(self) -> None:
        """What one small object can show."""
        store, key, body = self._store, self._key(), secrets.token_bytes(64)
        created = store.put_new(key, body)
        self._answered = True
        if not created and store.get(key) != body:  # else a lost reply: it is ours
            self._lies("create-only put", "a new object to be created", "'already exists' for a random key")
        if not self._single_writer:
            try:
                second = store.put_new(key, bytes(64))
            except StoreError:  # a connection that broke says nothing of the store
                second = store.get(key) != body or store.put_new(key, bytes(64))
            if second or store.get(key) != body:
                got = "success" if second else "'already exists', but the object was replaced"
                self._lies("create-only put (if-none-match)", "a second put to be refused", got, _ONE_WRITER)
        size = store.size(key)
        if store.get(key) != body or size != len(body):
            self._lies("read after write", f"the {len(body)} bytes just written", f"other bytes ({size})")
        try:
            middle, last = store.get_range(key, 7, 29), store.get_suffix(key, 16)
            several = store.get_ranges(key, [0, 40], [8, 64])
        except (StoreError, IntegrityError) as error:
            self._lies("range read", "the bytes asked for", str(error).rstrip("."))
        if middle != body[7:29] or several != [body[:8], body[40:]]:
            self._lies("range read", "the bytes asked for", "other bytes")
        if last != body[-16:]:
            self._lies("suffix range read", "the last 16 bytes", "other bytes")

    def _race(self) -> None:
        """Of several who create one key at the same time, one at the most may be told that he did."""
        key = self._key()
        bodies = [secrets.token_bytes(64) * (self._store.probe_race_bytes // 64) for _ in range(RACERS)]
        won = race(self._store, key, bodies)
        if sum(won) > 1:
            self._lies(
                "create-only put (if-none-match) under a race",
                f"one of {RACERS} puts at the same moment to create the object",
                f"'created' for {sum(won)} of them",
                _ONE_WRITER,
            )
        if self._store.get(key) not in ([bodies[won.index(True)]] if any(won) else bodies):
            self._lies(
                "create-only put (if-none-match) under a race",
                "the body of the put that created the object",
                "another's",
                _ONE_WRITER,
            )

    def _tidy(self) -> None:
        """Remove the probe's objects; what cannot be removed is named, and hides no verdict."""
        for key in self._used:
            try:
                self._store.delete(key)
            except StoreError as error:
                if self._answered:
                    left = f"{self._store.uri}/{self._place}/"
                    log.warning("what the store probe wrote to %s could not be removed: %s", left, error)
                return  # nor could the others

    def _lies(self, what: str, expected: str, got: str, fix: str | None = None) -> NoReturn:
        raise StoreError(
            f"{self._store.uri} fails the store probe at {what}",
            expected=expected,
            got=got,
            fix=fix or "Use a store that implements this part of S3",
        ) from None


_ONE_WRITER = (
    "Use a store that honours if-none-match; or, if nothing else will ever write to this root, set "
    "storage.single_writer: true"
)
