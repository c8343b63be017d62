"""Objects of S3.

HTTP retries have one owner, obstore; nothing above this file repeats a request except the commit
(`winnow.store.records.commit`), which reads back what stands there first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.exceptions import (
    AlreadyExistsError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import S3Store as ObstoreS3

from winnow.schemas.base import sha256_hex
from winnow.schemas.errors import IntegrityError, MissingObject, StoreError
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

SINGLE_PUT_BYTES = 4 << 30
"""Longest object that `S3Store.put` sends in one part; S3 takes 5 GiB."""
MULTIPART_BYTES = 128 << 20
"""A part of a longer one; S3 takes 10,000 of them."""
log = logging.getLogger("winnow.store")


@dataclass
class Known:
    """What was learnt about a server, once, by all stores of one client."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    looked: bool = False
    unchecked: bool = False
    """It takes bytes that do not have the SHA-256 their put is signed with."""
    etag_is_md5: bool = False
    """Of an object that was put in one part."""


class S3Store(ObjectStore):
    """Objects of one S3 bucket under a prefix, through obstore."""

    def __init__(
        self,
        client: ObstoreS3,
        bucket: str,
        prefix: str,
        direct: Direct,
        single_writer: bool = False,
        known: Known | None = None,
    ) -> None:
        self._client, self._bucket, self._prefix = client, bucket, prefix
        self._direct, self._single_writer, self._known = direct, single_writer, known or Known()
        self._process = os.getpid()
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    def _path(self, key: str) -> str:
        if os.getpid() != self._process:
            raise StoreError(
                f"{self.uri} was opened before this process was forked", fix="Open it again in the child"
            )
        return f"{self._prefix}/{check_key(key)}" if self._prefix else check_key(key)

    def put_new(
        self, key: str, data: Data | Pieces, ready: Ready | None = None, digest: Digest | None = None
    ) -> bool:
        """See `ObjectStore.put_new`: If-None-Match: *, one part; a single writer looks first instead."""
        pieces = data if isinstance(data, tuple) else (data,)
        size = sum(memoryview(piece).nbytes for piece in pieces)
        if size > SINGLE_PUT_BYTES:
            raise StoreError(
                f"{self.uri}/{key} is too long to be created in one part",
                expected=f"at most {SINGLE_PUT_BYTES:,} bytes",
                got=f"{size:,} bytes",
                fix="Make units smaller: plan.windows_per_unit",
            )
        if ready is not None:
            ready()
        if self._single_writer:
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
            if first.created is not None:
                return first.created
        try:  # obstore sends pieces as they lie, without a copy
            made = obstore.put(self._client, self._path(key), pieces, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        except _FAILURES as error:
            self._fail(error, key, "writing")
        self._direct.outdone("PUT", first.refused)
        self._confirm(key, pieces, made["e_tag"])
        return True

    def put(self, key: str, data: Data) -> None:
        """See `ObjectStore.put`."""
        try:
            large = memoryview(data).nbytes > SINGLE_PUT_BYTES
            path = self._path(key)
            made = obstore.put(self._client, path, data, use_multipart=large, chunk_size=MULTIPART_BYTES)
        except _FAILURES as error:
            self._fail(error, key, "writing")
        self._confirm(key, (data,), None if large else made["e_tag"])

    # What arrives

    def examine(self, key: Callable[[], str]) -> None:
        """See `ObjectStore.examine`: whether the server refuses bytes that do not have the signed digest."""
        known = self._known
        with known.lock:
            if known.looked:
                return
            known.looked, place, body = True, key(), secrets.token_bytes(64)
            first = self._direct.put(self._path(place), [body], sha256_hex(body[::-1]))
            if not first.created:
                return
            known.unchecked = True
            known.etag_is_md5 = first.etag is not None and first.etag.strip('"') == _md5((body,))
            log.warning(
                "%s does not compare what arrives with the SHA-256 that a put is signed with: every object "
                "is %s after its put",
                self.uri,
                "compared by its ETag" if known.etag_is_md5 else "read back",
            )

    def _look_once(self) -> None:
        """`examine`, in a process that has not probed."""
        if not self._known.looked:
            key = f"probe-{secrets.token_hex(16)}/0"
            self.examine(lambda: key)
            if self._known.unchecked:
                with suppress(StoreError):  # a store that refuses it says so at its probe
                    self.delete(key)

    def _confirm(self, key: str, pieces: Pieces, etag: str | None) -> None:
        """Raise where other bytes arrived than were sent, on a server that does not look itself."""
        if not self._known.unchecked:
            return
        if self._known.etag_is_md5 and etag:
            whole = etag.strip('"') == _md5(pieces)
        else:
            sent, stored = hashlib.sha256(), hashlib.sha256()
            for piece in pieces:
                sent.update(piece)
            size = sum(memoryview(piece).nbytes for piece in pieces)
            for start in range(0, size, MULTIPART_BYTES):
                stored.update(self.get_range(key, start, min(start + MULTIPART_BYTES, size)))
            whole = sent.digest() == stored.digest() and self.size(key) == size
        if not whole:
            raise IntegrityError(
                f"{self.uri}/{key} was broken on its way to the server, which does not compare digests",
                expected="the bytes that were sent",
                got="others",
                fix="Remove that object while nobody else writes to this root, then run the same command "
                "again; look for what breaks bytes between here and there",
            )

    def version(self, key: str) -> str | None:
        """See `ObjectStore.version`: the ETag."""
        try:
            return obstore.head(self._client, self._path(key))["e_tag"]
        except FileNotFoundError:
            return None
        except _FAILURES as error:
            self._fail(error, key, "looking up")

    def replace(self, key: str, data: Data, version: str | None) -> None:
        """See `ObjectStore.replace`: If-Match, where the store knows it."""
        if version is None:
            return self.put(key, data)
        # Ceph's gateway 16.2 knows an ETag without its quotes only, and answers 412 to the standard's form.
        for etag in dict.fromkeys((version, version.strip('"'))):
            mode: Any = {"e_tag": etag}
            try:
                made = obstore.put(self._client, self._path(key), data, mode=mode, use_multipart=False)
            except PreconditionError:
                if self.version(key) != version:
                    break
            except (NotImplementedError, NotSupportedError):
                return self.put(key, data)
            except _FAILURES as error:
                self._fail(error, key, "writing")
            else:
                return self._confirm(key, (data,), made["e_tag"])
        if self._stands(key, data):  # an earlier try's, whose reply was lost
            return None
        raise StoreError(
            f"{self.uri}/{key} changed while it was repaired",
            fix="Repair when nobody else writes to this root",
        )

    def _stands(self, key: str, data: Data) -> bool:
        """Whether an object holds these bytes."""
        try:
            return self.size(key) == memoryview(data).nbytes and self.get(key) == data
        except MissingObject:
            return False

    def get(self, key: str, limit: int = MAX_GET_BYTES) -> bytes:
        """See `ObjectStore.get`."""
        try:
            reply = obstore.get(self._client, self._path(key))
            size = reply.meta["size"]
            if size <= limit:
                return bytes(reply.bytes())
        except _FAILURES as error:
            self._fail(error, key, "reading")
        raise IntegrityError(
            f"{self.uri}/{key} is too large", expected=f"at most {limit} bytes", got=f"{size} bytes"
        )

    def get_range(self, key: str, start: int, end: int) -> bytes | memoryview:
        """See `ObjectStore.get_range`."""
        return self.get_ranges(key, [start], [end])[0]

    def get_ranges(self, key: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes | memoryview]:
        """See `ObjectStore.get_ranges`."""
        try:
            found = obstore.get_ranges(self._client, self._path(key), starts=starts, ends=ends)
        except _FAILURES as error:
            self._short(key, max(ends), error)
        views: list[bytes | memoryview] = [memoryview(part) for part in found]
        if any(len(view) != end - start for view, start, end in zip(views, starts, ends, strict=True)):
            self._short(key, max(ends))
        return views

    def read_into(self, key: str, start: int, parts: Sequence[Sequence[NDArray[np.uint8]]]) -> Iterator[None]:
        """See `ObjectStore.read_into`: from the socket into the buffers; what that leaves, as usual."""
        left = deque(parts)
        end = start + sum(buffer.size for part in parts for buffer in part)
        refused = yield from self._direct.read(self._path(key), start, left)
        if left:
            yield from super().read_into(
                key, end - sum(buffer.size for part in left for buffer in part), left
            )
            self._direct.outdone("GET", refused)

    def get_suffix(self, key: str, length: int) -> bytes | memoryview:
        """See `ObjectStore.get_suffix`."""
        try:
            found = obstore.get(self._client, self._path(key), options={"range": {"suffix": length}}).bytes()
        except _FAILURES as error:
            self._short(key, length, error)
        if len(found) != length:
            self._short(key, length)
        return memoryview(found)

    def _short(self, key: str, needed: int, error: Exception | None = None) -> NoReturn:
        """A range failed: say whether the object is too short, and otherwise what went wrong."""
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
            return obstore.head(self._client, self._path(key))["size"]
        except FileNotFoundError:
            return None
        except _FAILURES as error:
            self._fail(error, key, "looking up")

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """See `ObjectStore.list`."""
        folder = self._path(prefix) if prefix else self._prefix
        cut = len(self._prefix) + 1 if self._prefix else 0
        found: list[tuple[str, int]] = []
        try:
            for chunk in obstore.list(  # pyright: ignore[reportUnknownMemberType]
                self._client, folder or None, chunk_size=1000
            ):
                found.extend((item["path"][cut:], item["size"]) for item in chunk)
        except _FAILURES as error:
            self._fail(error, prefix, "listing")
        found.sort()
        return iter(found)

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        try:
            obstore.delete(self._client, self._path(key))
        except FileNotFoundError:
            return
        except _FAILURES as error:
            self._fail(error, key, "deleting")

    def child(self, prefix: str) -> S3Store:
        """See `ObjectStore.child`."""
        place = self._path(prefix)
        return S3Store(self._client, self._bucket, place, self._direct, self._single_writer, self._known)

    def _fail(self, error: Exception, key: str, doing: str) -> NoReturn:
        """Raise what `error` means. The cause is cut off: S3 replies can quote signed headers."""
        reason = self._direct.conceal(describe_failure(error))
        where = f"{self.uri}/{key}".rstrip("/")
        if "NoSuchBucket" in reason:
            raise StoreError(
                f"bucket {self._bucket!r} does not exist",
                fix="Create it, or correct the root or AWS_ENDPOINT_URL",
            ) from None
        if isinstance(error, FileNotFoundError):
            raise MissingObject(f"{where} does not exist") from None
        refused = isinstance(error, (PermissionDeniedError, UnauthenticatedError))
        if refused or _REFUSED.search(reason):  # a refused listing comes as a generic error
            raise StoreError(
                f"{doing} {where} was refused: {reason}",
                fix="Check the credentials, their rights on this bucket, and AWS_REGION",
            ) from None
        raise StoreError(
            f"{doing} {where} failed: {reason}",
            fix="Check AWS_ENDPOINT_URL and the network, raise storage.timeout_seconds for slow links",
        ) from None


_REFUSED = re.compile(r"AccessDenied|SignatureDoesNotMatch|InvalidAccessKeyId|ExpiredToken|\b40[13]\b")
_FAILURES = (obstore.exceptions.BaseError, OSError, ValueError)


def _md5(pieces: Pieces) -> str:
    """MD5 in hex: what most servers give as an ETag. Against accidents, not against malice."""
    digest = hashlib.md5(usedforsecurity=False)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def describe_failure(error: Exception) -> str:
    """One line of an obstore error, with the S3 code where it has one, and no credential."""
    text = str(error)
    code, message = re.search(r"<Code>(.*?)</Code>", text), re.search(r"<Message>(.*?)</Message>", text)
    if code:
        text = f"{code[1]}: {message[1]}" if message else code[1]
    else:
        text = re.split(r"\n\nDebug source|\nDebug source", text)[0]
    text = " ".join(text.split())[:300]
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_TOKEN", "AWS_ACCESS_KEY_ID"):
        value = os.environ.get(name)
        if value:
            text = text.replace(value, "***")
    return text
