"""The probe: whether storage guarantees what the commit relies on, tested before anything else is written."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, Protocol

from winnow.schemas.errors import IntegrityError, StoreError

RACERS = 8
"""Threads that create one key at the same time."""
ONE_WRITER = (
    "Use a store that honours if-none-match; or, if nothing else will ever write to this root, set "
    "storage.single_writer: true"
)
"""What to do where create-only puts are not what they should be."""

log = logging.getLogger("winnow.store")


class _Storage(Protocol):
    """What the probe asks of an `ObjectStore`; that class imports this module, so it is not named here."""

    uri: str
    remote: bool
    probe_races: int
    probe_race_bytes: int

    def put_new(self, key: str, data: bytes, /) -> bool: ...
    def get(self, key: str, /) -> bytes: ...
    def get_range(self, key: str, start: int, end: int, /) -> bytes | memoryview: ...
    def get_ranges(
        self, key: str, starts: Sequence[int], ends: Sequence[int], /
    ) -> list[bytes | memoryview]: ...
    def get_suffix(self, key: str, length: int, /) -> bytes | memoryview: ...
    def size(self, key: str, /) -> int | None: ...
    def list(self, prefix: str, /) -> Iterator[tuple[str, int]]: ...
    def delete(self, key: str, /) -> None: ...
    def examine(self, key: Callable[[], str], /) -> None: ...


def race(store: _Storage, key: str, bodies: list[bytes]) -> list[bool]:
    """Create `key` from as many threads as there are bodies, at the same moment.

    Returns:
        Per body, whether its put was answered "created". An error counts as not created, although the put may
        have taken effect.
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


def probe_requests(store: _Storage) -> tuple[int, int]:
    """Count the puts and gets of one probe; a delete counts as a put, a listing as a get."""
    races = store.probe_races
    # Puts: two creates and a delete; per race its creates and a delete; on S3 `examine`'s put and delete.
    return 3 + races * (RACERS + 1) + store.remote * 2, 9 + races


class Probe:
    """One test of a store. `run` may be called once.

    Args:
        store: The store under test.
        single_writer: Accept a store that ignores if-none-match.
    """

    def __init__(self, store: _Storage, single_writer: bool) -> None:
        self._store, self._single_writer = store, single_writer
        # Random, so that probes of several harvests on one root do not meet.
        self._place = f"probe-{secrets.token_hex(16)}"
        self._used = list[str]()
        self._answered = False
        """Whether any put was answered; before that, a failed delete needs no warning."""

    def run(self) -> None:
        """Test the store; its objects are removed afterwards if the store allows it.

        Raises:
            StoreError: The store fails; the message names the request.
        """
        try:
            self._alone()
            # Puts in sequence cannot expose a server that looks whether the object exists and writes it later
            # (s3s-fs 0.14.1, moto 5.2.5): threads that create one key at the same moment do.
            if not self._single_writer:
                for _ in range(self._store.probe_races):
                    self._race()
            self._store.examine(self._key)
        finally:
            self._tidy()

    def _key(self) -> str:
        """Return a new key, which `_tidy` removes in the end."""
        self._used.append(f"{self._place}/{len(self._used)}")
        return self._used[-1]

    def _alone(self) -> None:
        """Test create-only puts, read-after-write and ranges with one small object."""
        store, key, body = self._store, self._key(), secrets.token_bytes(64)
        created = store.put_new(key, body)
        self._answered = True
        # "Exists" for a random key with our bytes in it is our own put, whose first reply was lost.
        if not created and store.get(key) != body:
            self._lies("create-only put", "a new object to be created", "'already exists' for a random key")
        if not self._single_writer:
            try:
                second = store.put_new(key, bytes(64))
            except StoreError:
                # A broken connection says nothing about the store: what is stored decides, or a second try.
                second = store.get(key) != body or store.put_new(key, bytes(64))
            # A server may answer "exists" and replace the object all the same.
            if second or store.get(key) != body:
                got = "success" if second else "'already exists', but the object was replaced"
                self._lies("create-only put (if-none-match)", "a second put to be refused", got, ONE_WRITER)
        size = store.size(key)
        if store.get(key) != body or size != len(body):
            self._lies("read after write", f"the {len(body)} bytes just written", f"other bytes ({size})")
        listed = list(store.list(self._place))
        if listed != [(key, len(body))]:
            self._lies("listing", f"{key} of {len(body)} bytes, just written", str(listed)[:200])
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
        """Create one key from several threads: at most one may be told that it created the object."""
        key = self._key()
        bodies = [secrets.token_bytes(64) * (self._store.probe_race_bytes // 64) for _ in range(RACERS)]
        won = race(self._store, key, bodies)
        if sum(won) > 1:
            self._lies(
                "create-only put (if-none-match) under a race",
                f"one of {RACERS} puts at the same moment to create the object",
                f"'created' for {sum(won)} of them",
                ONE_WRITER,
            )
        # If all of them failed, as on a full disk, a put alone succeeds or says why.
        if not any(won) and self._store.size(key) is None:
            won[0] = self._store.put_new(key, bodies[0])
        # Without a winner (all replies late or lost) any one body may be stored, but whole.
        if self._store.get(key) not in ([bodies[won.index(True)]] if any(won) else bodies):
            self._lies(
                "create-only put (if-none-match) under a race",
                "the body of the put that created the object",
                "another's",
                ONE_WRITER,
            )

    def _tidy(self) -> None:
        """Remove the probe's objects; those that cannot be removed are named in a warning."""
        for key in self._used:
            try:
                self._store.delete(key)
            except StoreError as error:
                # Logged and not raised: an error in `finally` would hide the probe's verdict.
                if self._answered:
                    left = f"{self._store.uri}/{self._place}/"
                    log.warning("what the store probe wrote to %s could not be removed: %s", left, error)
                return  # the others would fail likewise

    def _lies(self, what: str, expected: str, got: str, fix: str | None = None) -> NoReturn:
        raise StoreError(
            f"{self._store.uri} fails the store probe at {what}",
            expected=expected,
            got=got,
            fix=fix or "Use a store that implements this part of S3",
        ) from None
