"""Objects of S3.

obstore is the single owner of HTTP retries, which are over within seconds if a server refuses connections. A
server that has answered before is waited for here, until it is back or a time limit has passed. Nothing above
this module repeats a request except the commit (`winnow.store.records.commit`), which first reads back what
is stored.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.exceptions import (
    AlreadyExistsError,
    GenericError,
    PreconditionError,
)
from obstore.store import S3Store as ObstoreS3

from winnow.schemas.base import sha256_hex
from winnow.schemas.errors import ConditionFailed, IntegrityError, MissingObject, StoreError
from winnow.store.objects.base import (
    MAX_GET_BYTES,
    Data,
    Digest,
    ObjectStore,
    Pieces,
    Ready,
    check_key,
    joined,
)
from winnow.store.objects.direct import Direct, FirstPut
from winnow.store.objects.probe import ONE_WRITER
from winnow.store.objects.s3_errors import advice, describe_failure, is_missing_feature, is_outage, is_refused

# S3 takes 5 GiB in one part. A create-only put is one request, so this is also the limit of `put_new`.
SINGLE_PUT_BYTES = 4 << 30
"""Longest object that is sent in one part."""
# S3 takes 10,000 parts: 1.2 TiB.
MULTIPART_BYTES = 128 << 20
"""Length of a part of a longer object."""
# S3 lists 1,000 keys per page.
_PAGE = 1000
"""Objects of one page of a listing."""
# 100, 128, 250, 256, 500, 512, 1,000 and so on; of other listings one in thirty costs a request in vain.
_CUTS = (50, 64)
"""Any server's page is a multiple of one of these."""
_PAUSE_SECONDS = 1.0
"""Between two rounds of obstore's tries while a server is away."""
log = logging.getLogger("winnow.store")
T = TypeVar("T")


@dataclass
class _ServerFacts:
    """Facts about a server, learnt once and shared by all stores of one client."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    looked: bool = False
    """Whether the two facts below have been found out."""
    unchecked: bool = False
    """Whether the server accepts bytes that do not match the SHA-256 their put is signed with."""
    etag_is_md5: bool = False
    """Whether the ETag of an object put in one part is its MD5."""
    answered: bool = False
    """Whether it has answered any request. One that never has may not exist: it is not waited for."""
    away: bool = False
    """Whether it was said that the server does not answer, and it has not answered since."""


class S3Store(ObjectStore):
    """Objects of one S3 bucket under a prefix, through obstore.

    Args:
        client: obstore's store of the bucket.
        bucket: Its name.
        prefix: What the keys begin with.
        direct: The first tries of shards, straight to the socket.
        patience: Seconds for which a server that has answered before is waited for.
        single_writer: Whether puts look first, instead of if-none-match.
        server: What is known of the server; shared by the stores of one client.
    """

    def __init__(
        self,
        client: ObstoreS3,
        bucket: str,
        prefix: str,
        direct: Direct,
        patience: float = 0.0,
        single_writer: bool = False,
        server: _ServerFacts | None = None,
    ) -> None:
        self._client, self._bucket, self._prefix, self._patience = client, bucket, prefix, patience
        self._direct, self._single_writer, self._server = direct, single_writer, server or _ServerFacts()
        self._process = os.getpid()
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    def _path(self, key: str) -> str:
        # obstore's I/O threads exist only in the process that made the client: a child must open its own.
        if os.getpid() != self._process:
            raise StoreError(
                f"{self.uri} was opened before this process was forked", fix="Open it again in the child"
            )
        return f"{self._prefix}/{check_key(key)}" if self._prefix else check_key(key)

    def _ask(self, request: Callable[[], T]) -> T:
        """Return what `request` returns; while a server that has answered before is away, ask it again.

        A restart of a server, or of the proxy before it, takes seconds to minutes, and obstore's tries are
        over after one to six seconds if connections are refused.
        """
        server, began = self._server, time.monotonic()
        while True:
            try:
                answer = request()
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                server.answered, server.away = True, False
                raise
            except GenericError as error:
                # A put may have taken effect: asked again, it is answered "exists", as after obstore's own.
                if not server.answered or not is_outage(error):
                    raise
                # After a wait in vain, or an interrupted one, nothing waits again until it has answered: a
                # command that ends has its status to write, and more.
                if time.monotonic() - began > self._patience:
                    server.answered = False
                    raise
                if not server.away:
                    server.away = True
                    reason = self._direct.conceal(describe_failure(error))
                    log.warning(
                        "%s does not answer, waiting up to %.0f s: %s", self.uri, self._patience, reason
                    )
                try:
                    time.sleep(_PAUSE_SECONDS)
                except KeyboardInterrupt:
                    server.answered = False
                    raise
            else:
                server.answered, server.away = True, False
                return answer

    def put_new(
        self, key: str, data: Data | Pieces, ready: Ready | None = None, digest: Digest | None = None
    ) -> bool:
        """See `ObjectStore.put_new`: If-None-Match: *, one part; a single writer checks first instead."""
        pieces = data if isinstance(data, tuple) else (data,)
        size = sum(memoryview(piece).nbytes for piece in pieces)
        if size > SINGLE_PUT_BYTES:
            raise StoreError(
                f"{self.uri}/{key} is too long to be created in one part",
                expected=f"at most {SINGLE_PUT_BYTES:,} bytes",
                got=f"{size:,} bytes",
                fix="Make units smaller: plan.windows_per_unit",
            )
        # Before the first byte is sent: once S3 has them all, the object is visible and cannot be taken back.
        if ready is not None:
            ready()
        if self._single_writer:
            # Safe only because nobody else writes; see docs/reliability.md, "One writer".
            if self.size(key) is not None:
                return False
            self.put(key, joined(data))
            return True
        first = FirstPut()
        if digest is not None:
            self._look_once()
            first = self._direct.put(self._path(key), pieces, digest())
            if first.created:
                self._confirm(key, pieces, first.etag)
            # None is anything but a clear answer. The object may exist by now; then obstore's put answers
            # "exists", and the caller reads back what is stored.
            if first.created is not None:
                return first.created
        try:  # obstore sends the pieces from where they are, without a copy
            path = self._path(key)
            made = self._ask(
                lambda: obstore.put(self._client, path, pieces, mode="create", use_multipart=False)
            )
        except AlreadyExistsError:
            return False
        except _FAILURES as error:
            self._fail(error, key, "writing", ONE_WRITER if is_missing_feature(error) else None)
        self._direct.outdone("PUT", first.refused)
        # Before anything relies on the object: the receipt is put after this returns.
        self._confirm(key, pieces, made["e_tag"])
        return True

    def put(self, key: str, data: Data) -> None:
        """See `ObjectStore.put`."""
        try:
            large = memoryview(data).nbytes > SINGLE_PUT_BYTES
            path = self._path(key)
            made = self._ask(
                lambda: obstore.put(self._client, path, data, use_multipart=large, chunk_size=MULTIPART_BYTES)
            )
        except _FAILURES as error:
            self._fail(error, key, "writing")
        # The ETag of a multipart upload is no MD5 of the object.
        self._confirm(key, (data,), None if large else made["e_tag"])

    # Bytes that break on their way

    def examine(self, key: Callable[[], str]) -> None:
        """See `ObjectStore.examine`: test whether the server refuses bytes without the signed digest."""
        server = self._server
        with server.lock:
            if server.looked:
                return
            # A put signed with another digest than its body's: S3 and MinIO refuse it, moto 5.2.5 creates it.
            server.looked, place, body = True, key(), secrets.token_bytes(64)
            first = self._direct.put(self._path(place), [body], sha256_hex(body[::-1]))
            if not first.created:
                return
            server.unchecked = True
            server.etag_is_md5 = first.etag is not None and _unquoted(first.etag) == _md5((body,))
            log.warning(
                "%s does not check bytes against the SHA-256 that their put is signed with: every object "
                "is %s after its put",
                self.uri,
                "compared by its ETag" if server.etag_is_md5 else "read back",
            )

    def _look_once(self) -> None:
        """Call `examine` in a process that has not probed, such as an actor."""
        if not self._server.looked:
            key = f"probe-{secrets.token_hex(16)}/0"
            self.examine(lambda: key)
            if self._server.unchecked:
                # A store that refuses deletes has said so at the driver's probe.
                with suppress(StoreError):
                    self.delete(key)

    def _confirm(self, key: str, pieces: Pieces, etag: str | None) -> None:
        """Raise IntegrityError if other bytes arrived than were sent, on a server that does not check."""
        server = self._server
        if not server.unchecked:
            return
        # Only a match decides: servers that store large objects in parts give those another kind of ETag.
        if server.etag_is_md5 and etag and _unquoted(etag) == _md5(pieces):
            return
        # Read back in parts, so that a shard is not held twice.
        sent, stored = hashlib.sha256(), hashlib.sha256()
        for piece in pieces:
            sent.update(piece)
        size = sum(memoryview(piece).nbytes for piece in pieces)
        for start in range(0, size, MULTIPART_BYTES):
            stored.update(self.get_range(key, start, min(start + MULTIPART_BYTES, size)))
        if sent.digest() != stored.digest() or self.size(key) != size:
            raise IntegrityError(
                f"{self.uri}/{key} was corrupted on its way to the server, which does not check digests",
                expected="the bytes that were sent",
                got="others",
                fix="Remove that object while nobody else writes to this root, then run the same command "
                "again; find out what corrupts data between this machine and the server",
            )

    def version(self, key: str) -> str | None:
        """See `ObjectStore.version`: the ETag."""
        try:
            path = self._path(key)
            return self._ask(lambda: obstore.head(self._client, path)["e_tag"])
        except FileNotFoundError:
            return None
        except _FAILURES as error:
            self._fail(error, key, "looking up")

    def replace(self, key: str, data: Data, version: str | None) -> None:
        """See `ObjectStore.replace`: If-Match, if the server supports it."""
        if version is None:
            return self.put(key, data)
        # Ceph's gateway 16.2.15 knows an ETag only without its quotes and answers 412 to the standard's form:
        # a repair there never ended (`findings/ceph_if_match.sh`). A weak ETag, as proxies make of an ETag,
        # matches no condition; the server's own is what follows its mark.
        strong = version.removeprefix("W/")
        changed = False
        for etag in dict.fromkeys((strong, strong.strip('"'))):
            mode: Any = {"e_tag": etag}
            put = partial(obstore.put, self._client, self._path(key), data, mode=mode, use_multipart=False)
            try:
                made = self._ask(put)
            except PreconditionError:
                # The same ETag as before: the server refused its form, not the object's state.
                changed = self.version(key) != version
                if changed:
                    break
            except _FAILURES as error:
                if is_missing_feature(error):
                    return self.put(key, data)
                self._fail(error, key, "writing")
            else:
                return self._confirm(key, (data,), made["e_tag"])
        # An earlier try may have replaced the object and lost its reply: then its retry fails the condition.
        if self._stored_is(key, data):
            return None
        if changed:
            raise ConditionFailed(
                f"{self.uri}/{key} changed while it was repaired",
                fix="Repair when nobody else writes to this root",
            )
        raise ConditionFailed(
            f"replacing {self.uri}/{key} failed: the server refuses If-Match with the object's own ETag",
            expected="an object that is replaced only if its ETag is still the same",
            got=f"412 for the ETag {version}",
            fix="Remove the object while nobody else writes to this root, then run the same command again",
        )

    def _stored_is(self, key: str, data: Data) -> bool:
        """Return whether an object has exactly these bytes."""
        # The length first: an object of another length need not be read.
        try:
            return self.size(key) == memoryview(data).nbytes and self.get(key) == data
        except MissingObject:
            return False

    def get(self, key: str, limit: int = MAX_GET_BYTES) -> bytes:
        """See `ObjectStore.get`."""
        path = self._path(key)

        def read() -> tuple[int, bytes]:
            reply = obstore.get(self._client, path)
            size, encoding = reply.meta["size"], reply.attributes.get("Content-Encoding")
            if encoding:  # no object of a root has one: a proxy compressed it
                raise ValueError(f"the reply has the Content-Encoding {str(encoding)[:40]!r}")
            # The headers have the length: an object that is too large is refused before its body is read.
            return size, bytes(reply.bytes()) if size <= limit else b""

        try:
            size, body = self._ask(read)
        except _FAILURES as error:
            self._fail(error, key, "reading")
        if size <= limit:
            return body
        raise IntegrityError(
            f"{self.uri}/{key} is too large", expected=f"at most {limit} bytes", got=f"{size} bytes"
        )

    def get_range(self, key: str, start: int, end: int) -> bytes | memoryview:
        """See `ObjectStore.get_range`."""
        return self.get_ranges(key, [start], [end])[0]

    def get_ranges(self, key: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes | memoryview]:
        """See `ObjectStore.get_ranges`."""
        try:
            path = self._path(key)
            found = self._ask(lambda: obstore.get_ranges(self._client, path, starts=starts, ends=ends))
        except _FAILURES as error:
            self._short(key, max(ends), error)
        # Servers answer a range past the end with fewer bytes, and rclone some ranges with the whole object.
        views: list[bytes | memoryview] = [memoryview(part) for part in found]
        if any(len(view) != end - start for view, start, end in zip(views, starts, ends, strict=True)):
            self._short(key, max(ends))
        return views

    def read_into(self, key: str, start: int, parts: Sequence[Sequence[NDArray[np.uint8]]]) -> Iterator[None]:
        """See `ObjectStore.read_into`: from the socket into the buffers; obstore reads what that leaves."""
        left = deque(parts)
        end = start + sum(buffer.size for part in parts for buffer in part)
        refused = yield from self._direct.read(self._path(key), start, left)
        # A part that was filled only halfway is still in `left` and is read again from its beginning.
        if left:
            yield from super().read_into(
                key, end - sum(buffer.size for part in left for buffer in part), left
            )
            self._direct.outdone("GET", refused)

    def get_suffix(self, key: str, length: int) -> bytes | memoryview:
        """See `ObjectStore.get_suffix`."""
        try:
            path, options = self._path(key), cast(Any, {"range": {"suffix": length}})
            found = self._ask(lambda: obstore.get(self._client, path, options=options).bytes())
        except _FAILURES as error:
            self._short(key, length, error)
        if len(found) != length:  # of a shorter object, S3 answers a suffix with all of it
            self._short(key, length)
        return memoryview(found)

    def _short(self, key: str, needed: int, error: Exception | None = None) -> NoReturn:
        """Raise what a failed range means: the object is too short, or the request failed."""
        # Servers differ in how they answer a range past the end; only the object's length tells.
        if not isinstance(error, FileNotFoundError):
            size = self.size(key)
            if size is not None and size < needed:
                raise IntegrityError(
                    f"{self.uri}/{key} is too short", expected=f"at least {needed} bytes", got=f"{size} bytes"
                ) from None
        self._fail(error or ValueError("a range reply of the wrong length"), key, "reading a range of")

    def size(self, key: str) -> int | None:
        """See `ObjectStore.size`."""
        try:
            path = self._path(key)
            return self._ask(lambda: obstore.head(self._client, path)["size"])
        except FileNotFoundError:
            return None
        except _FAILURES as error:
            self._fail(error, key, "looking up")

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """See `ObjectStore.list`."""
        folder = self._path(prefix) if prefix else self._prefix
        cut = len(self._prefix) + 1 if self._prefix else 0

        def listed(offset: str | None = None) -> dict[str, int]:
            chunks = obstore.list(  # pyright: ignore[reportUnknownMemberType]
                self._client, folder or None, offset=offset, chunk_size=_PAGE
            )
            return {item["path"]: item["size"] for chunk in chunks for item in chunk}

        try:
            found = self._ask(listed)
            # Servers cut a listing at a page without a word, or, as the older listing, in a way that obstore
            # does not see.
            while found and any(len(found) % keys == 0 for keys in _CUTS):
                last = max(found)
                more = self._ask(partial(listed, last))
                if not more:
                    break
                if min(more) <= last:
                    # It ignores where to begin: only a full page of S3's own says that there is more.
                    if len(found) % _PAGE:
                        break
                    raise ValueError(f"the server lists no more than {len(found):,} objects (ListObjectsV2)")
                found |= more
            for path in found:
                # Cut all the same, it would be another key, and every object would seem to be missing.
                if folder and not f"{path}/".startswith(f"{folder}/"):
                    raise ValueError(
                        f"of the folder {folder!r} the server lists {path!r}, which is not in it"
                    )
        except _FAILURES as error:
            self._fail(error, prefix, "listing")
        # Consoles make an empty object of a new folder: `root/`, which obstore calls `root`.
        folders = {path[:end] for path in found for end, sign in enumerate(path) if sign == "/"}
        folders.add(self._prefix)
        kept = ((path, size) for path, size in found.items() if size or path not in folders)
        # Sorted: promised by the interface, whatever order the server has.
        return iter(sorted((path[cut:], size) for path, size in kept))

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        try:
            path = self._path(key)
            self._ask(lambda: obstore.delete(self._client, path))
        except FileNotFoundError:
            return
        except _FAILURES as error:
            self._fail(error, key, "deleting")

    def child(self, prefix: str) -> S3Store:
        """See `ObjectStore.child`."""
        facts = (self._direct, self._patience, self._single_writer, self._server)
        return S3Store(self._client, self._bucket, self._path(prefix), *facts)

    def _fail(self, error: Exception, key: str, doing: str, fix: str | None = None) -> NoReturn:
        """Raise what `error` means, as a StoreError."""
        # Always `from None`: S3's replies can quote signed headers, and a traceback would print them.
        reason = self._direct.conceal(describe_failure(error))
        where = f"{self.uri}/{key}".rstrip("/")
        if "NoSuchBucket" in reason:
            raise StoreError(
                f"bucket {self._bucket!r} does not exist",
                fix="Create it, or correct the root or AWS_ENDPOINT_URL",
            ) from None
        if isinstance(error, FileNotFoundError):
            raise MissingObject(f"{where} does not exist") from None
        verdict = "was refused" if is_refused(error) else "failed"
        raise StoreError(f"{doing} {where} {verdict}: {reason}", fix=fix or advice(error)) from None


_FAILURES = (obstore.exceptions.BaseError, OSError, ValueError)


def _unquoted(etag: str) -> str:
    """Return an ETag without quotes and the mark of a weak one."""
    return etag.removeprefix("W/").strip('"')


def _md5(pieces: Pieces) -> str:
    """Return the MD5 in hex, which most servers use as ETag: it detects accidents, not malice."""
    digest = hashlib.md5(usedforsecurity=False)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
