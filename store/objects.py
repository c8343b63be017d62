"""The one seam to object storage: a small interface, `open_store`, and the S3 side of it.

Local folders are in `store.local_objects`. HTTP retries have one owner, obstore; nothing above this
file repeats a request except the commit (`store.commit`), which reads back what stands there first.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NoReturn, cast
from urllib.parse import unquote, urlsplit

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

from schemas.config import StorageSpec
from schemas.errors import ConfigError, IntegrityError, MissingObject, StoreError
from store.direct import Direct

Data = bytes | bytearray | memoryview
"""What a store takes; ranges come back as `bytes` or a read-only `memoryview` without a copy."""
Pieces = tuple[Data, ...]
"""One object's bytes, in order, so that nobody has to copy them together first."""

Ready = Callable[[], object]
"""Raises where an object must not come to be after all."""
Digest = Callable[[], str]
"""Gives an object's SHA-256 in hex, once it is known."""

MAX_GET_BYTES = 1 << 31
"""Largest object that `get` reads whole unless told otherwise, in bytes."""

SINGLE_PUT_BYTES = 4 << 30
"""Longest object that `S3Store.put` sends in one part; S3 takes 5 GiB."""
PART_BYTES = 128 << 20
"""A part of a longer one; S3 takes 10,000 of them."""

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")


def joined(data: Data | Pieces) -> Data:
    """An object's bytes in one buffer; a copy only where they lie in pieces."""
    return b"".join(data) if isinstance(data, tuple) else data


def check_key(key: str) -> str:
    """`key`, or a StoreError where it could leave the root (see `schemas.base.RelativeKey`)."""
    if len(key) > 512 or not _KEY.fullmatch(key):
        raise StoreError(f"object key {key[:80]!r} is not allowed", expected="relative, without '..'")
    return key


class ObjectStore(ABC):
    """Objects under one root. Safe to use from threads; never pickled, so that no secret travels.

    Every method raises StoreError where storage is unreachable, refuses, or is full.
    """

    uri: str
    """The root, without credentials."""
    remote = True
    """Whether reading costs a network's time, so that a local copy may pay."""

    @abstractmethod
    def put_new(
        self, key: str, data: Data | Pieces, ready: Ready | None = None, digest: Digest | None = None
    ) -> bool:
        """Create an object, in one part, durable on return.

        Args:
            key: The object.
            data: What it holds.
            ready: Called before the object can be seen, and as late as the storage allows; where it raises,
                nothing is created. For checks that can be made while the bytes get durable.
            digest: For large objects whose digest is taken anyway: storage that wants it need not take it
                again, and refuses bytes that do not have it.

        Returns:
            True: this call created it. False: something is there already, perhaps from this very
            call, whose reply was lost on the first try.
        """

    @abstractmethod
    def put(self, key: str, data: Data) -> None:
        """Create or overwrite. For run outputs and repair only, never for a dataset's hot path."""

    def version(self, key: str) -> str | None:
        """A mark that changes with the object (an ETag); None where there is no object or no mark."""
        del key
        return None

    def replace(self, key: str, data: Data, version: str | None) -> None:
        """Overwrite an object that is damaged. For repair only.

        Args:
            key: The object.
            data: What it shall hold.
            version: What `version` gave before the damage was looked at. Where the storage can, it refuses
                if the object has changed since.

        Raises:
            StoreError: Somebody else wrote the object meanwhile.
        """
        del version
        self.put(key, data)

    @abstractmethod
    def get(self, key: str, limit: int = MAX_GET_BYTES) -> bytes:
        """The whole object.

        Raises:
            MissingObject: Nothing is there.
            IntegrityError: It is longer than `limit` bytes; it was not read.
        """

    @abstractmethod
    def get_range(self, key: str, start: int, end: int) -> bytes | memoryview:
        """Bytes [start, end), exactly.

        Raises:
            MissingObject: Nothing is there.
            IntegrityError: The object ends before `end`.
        """

    @abstractmethod
    def get_ranges(self, key: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes | memoryview]:
        """Several ranges of one object, near ones in one request; errors as in `get_range`."""

    @abstractmethod
    def get_suffix(self, key: str, length: int) -> bytes | memoryview:
        """The last `length` bytes in one request; errors as in `get_range`."""

    def read_into(self, key: str, start: int, parts: Sequence[Sequence[NDArray[np.uint8]]]) -> Iterator[None]:
        """Fill buffers with the run of bytes that begins at `start`; errors as in `get_range`.

        Args:
            key: The object.
            start: Where the first part begins.
            parts: Buffers [bytes], writable, that lie one after another in the object. A buffer may be in
                several parts, to be looked at in between.

        Yields:
            Once after each part is filled, so that it can be looked at while it is in the cache.
        """
        data = np.frombuffer(
            self.get_range(key, start, start + sum(buffer.size for part in parts for buffer in part)),
            np.uint8,
        )
        done = 0
        for part in parts:
            for buffer in part:
                buffer[:] = data[done : done + buffer.size]
                done += buffer.size
            yield

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Length in bytes, or None where nothing is there."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(key, bytes) of every object in the folder `prefix` and below, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""

    @abstractmethod
    def child(self, prefix: str) -> ObjectStore:
        """The same storage, rooted at the folder `prefix`."""

    def free_bytes(self) -> int | None:
        """Bytes free for new objects, or None where the storage does not say."""
        return None

    def probe(self, single_writer: bool = False) -> None:
        """Check, with one small object, that the storage keeps what the commit relies on.

        Args:
            single_writer: Accept a store that ignores if-none-match.

        Raises:
            StoreError: What the store got wrong.
        """
        key, body = f"probe-{secrets.token_hex(16)}/object", secrets.token_bytes(64)
        try:
            self._probe(key, body, single_writer)
        finally:
            self.delete(key)

    def _probe(self, key: str, body: bytes, single_writer: bool) -> None:
        if not self.put_new(key, body):
            self._lies("create-only put", "a new object to be created", "'already exists' for a random key")
        if not single_writer:
            second = self.put_new(key, bytes(64))
            if second or self.get(key) != body:
                got = "success" if second else "'already exists', but the object was replaced"
                fix = (
                    "Use a store that honours if-none-match; or, if nothing else will ever write to this "
                    "root, set storage.single_writer: true"
                )
                self._lies("create-only put (if-none-match)", "a second put to be refused", got, fix)
        size = self.size(key)
        if self.get(key) != body or size != len(body):
            self._lies("read after write", f"the {len(body)} bytes just written", f"other bytes ({size})")
        try:
            middle, last = self.get_range(key, 7, 29), self.get_suffix(key, 16)
            several = self.get_ranges(key, [0, 40], [8, 64])
        except (StoreError, IntegrityError) as error:
            self._lies("range read", "the bytes asked for", str(error).rstrip("."))
        if middle != body[7:29] or several != [body[:8], body[40:]]:
            self._lies("range read", "the bytes asked for", "other bytes")
        if last != body[-16:]:
            self._lies("suffix range read", "the last 16 bytes", "other bytes")

    def _lies(self, what: str, expected: str, got: str, fix: str | None = None) -> NoReturn:
        raise StoreError(
            f"{self.uri} fails the store probe at {what}",
            expected=expected,
            got=got,
            fix=fix or "Use a store that implements this part of S3",
        ) from None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.uri}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is never pickled (it may hold credentials): pass its uri")


def open_store(uri: str, storage: StorageSpec | None = None) -> ObjectStore:
    """The object store at `uri`.

    Args:
        uri: A local path, `file:///...`, or `s3://bucket/prefix`.
        storage: Time-outs and permissions.

    Raises:
        ConfigError: Another scheme, no bucket, or a plain `http://` endpoint beyond loopback.
        StoreError: S3 credentials are missing.
    """
    from store.local_objects import LocalStore

    storage = storage or StorageSpec()
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if scheme is None:
        return LocalStore(uri)
    if scheme[1].lower() == "file":
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"root {uri!r} names another machine", expected="file:///absolute/path")
        return LocalStore(unquote(parts.path))
    if scheme[1].lower() == "s3":
        bucket, _, prefix = uri[len("s3://") :].partition("/")
        return _open_s3(bucket, prefix.strip("/"), storage)
    raise ConfigError(
        f"root has the scheme {scheme[1]!r}", expected="a local path, file:// or s3://", got=f"{scheme[1]}://"
    )


def _open_s3(bucket: str, prefix: str, storage: StorageSpec) -> S3Store:
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(
            "root does not name an S3 bucket",
            expected="s3://bucket/prefix with a bucket of 3 to 63 letters, digits, '.', '-'",
            got="credentials inside the URI" if "@" in bucket or ":" in bucket else repr(bucket[:80]),
            fix="Credentials belong in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)",
        )
    if prefix:
        check_key(prefix)
    env = os.environ
    endpoint, plain = s3_endpoint(storage.allow_http)
    _require_credentials()
    wait = timedelta(seconds=storage.timeout_seconds)
    config: dict[str, Any] = {"region": env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"}
    if endpoint:
        config["endpoint"] = endpoint.rstrip("/")
    client = ObstoreS3(
        bucket,
        config=cast(Any, config),
        client_options={
            "timeout": wait,
            "read_timeout": wait,
            "connect_timeout": min(wait, timedelta(seconds=10)),
            "allow_http": plain,
        },
        retry_config={
            "max_retries": 6,
            "retry_timeout": min(3 * wait, timedelta(minutes=4)),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=5),
                "base": 2,
            },
        },
    )
    direct = Direct(client, storage.timeout_seconds)
    return S3Store(client, bucket, prefix, direct, storage.single_writer)


def s3_endpoint(allow_http: bool) -> tuple[str | None, bool]:
    """The environment's S3 endpoint (None: AWS itself), checked, and whether it speaks plain HTTP."""
    env = os.environ
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or env.get("AWS_ENDPOINT")
    return endpoint, check_endpoint(endpoint, allow_http) if endpoint else False


def check_endpoint(endpoint: str, allow_http: bool) -> bool:
    """Whether an endpoint speaks plain HTTP; ConfigError where it must not, or is no URL."""
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise ConfigError(
            "AWS_ENDPOINT_URL is not an endpoint", expected="https://host[:port], without user or password"
        )
    if parts.scheme == "https":
        return False
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not (loopback or allow_http):
        raise ConfigError(
            f"AWS_ENDPOINT_URL is plain http:// to {host}",
            expected="https://, or http:// to this machine's loopback",
            fix="Use https, or set storage.allow_http: true where the network is trusted",
        )
    return True


def _require_credentials() -> None:
    """StoreError, within seconds, where the environment and the instance hold no S3 credentials."""
    env = os.environ
    key, secret = env.get("AWS_ACCESS_KEY_ID"), env.get("AWS_SECRET_ACCESS_KEY")
    if key and secret:
        return
    named = (
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_SKIP_SIGNATURE",
    )
    if not (key or secret) and (any(env.get(name) for name in named) or _instance_role()):
        return
    missing = "AWS_SECRET_ACCESS_KEY" if key else "AWS_ACCESS_KEY_ID"
    raise StoreError(
        "S3 credentials are missing",
        expected="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or an instance role",
        got=f"no {missing}" + ("" if key or secret else " and no instance role"),
        fix="Set them, then run the same command again",
    )


def _instance_role() -> bool:
    """Whether the instance metadata service answers that this machine has a role (2 s a request)."""
    base = urlsplit(os.environ.get("AWS_METADATA_ENDPOINT") or "http://169.254.169.254")
    try:
        connection = http.client.HTTPConnection(base.hostname or "", base.port or 80, timeout=2)
        try:
            lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
            connection.request("PUT", "/latest/api/token", headers=lifetime)
            reply = connection.getresponse()
            token = reply.read(4096).decode("latin-1")
            if reply.status != 200:
                return False
            headers = {"X-aws-ec2-metadata-token": token}
            connection.request("GET", "/latest/meta-data/iam/security-credentials/", headers=headers)
            reply = connection.getresponse()
            return reply.status == 200 and bool(reply.read(4096).strip())
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError):
        return False


class S3Store(ObjectStore):
    """Objects of one S3 bucket under a prefix, through obstore."""

    def __init__(
        self, client: ObstoreS3, bucket: str, prefix: str, direct: Direct, single_writer: bool = False
    ) -> None:
        self._client, self._bucket, self._prefix = client, bucket, prefix
        self._direct, self._single_writer = direct, single_writer
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
        if digest is not None:
            created = self._direct.put(self._path(key), pieces, digest())
            if created is not None:
                return created
        try:  # obstore sends pieces as they lie, without a copy
            obstore.put(self._client, self._path(key), pieces, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        except _FAILURES as error:
            self._fail(error, key, "writing")
        return True

    def put(self, key: str, data: Data) -> None:
        """See `ObjectStore.put`."""
        try:
            large = memoryview(data).nbytes > SINGLE_PUT_BYTES
            obstore.put(self._client, self._path(key), data, use_multipart=large, chunk_size=PART_BYTES)
        except _FAILURES as error:
            self._fail(error, key, "writing")

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
            self.put(key, data)
            return
        mode: Any = {"e_tag": version}
        try:
            obstore.put(self._client, self._path(key), data, mode=mode, use_multipart=False)
        except PreconditionError:
            raise StoreError(
                f"{self.uri}/{key} changed while it was repaired",
                fix="Repair when nobody else writes to this root",
            ) from None
        except (NotImplementedError, NotSupportedError):
            self.put(key, data)
        except _FAILURES as error:
            self._fail(error, key, "writing")

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
        left = list(parts)
        for _ in self._direct.read(self._path(key), start, parts):
            start += sum(buffer.size for buffer in left.pop(0))
            yield
        if left:
            yield from super().read_into(key, start, left)

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
        return S3Store(self._client, self._bucket, self._path(prefix), self._direct, self._single_writer)

    def _fail(self, error: Exception, key: str, doing: str) -> NoReturn:
        """Raise what `error` means. The cause is cut off: S3 replies can quote signed headers."""
        reason = describe_failure(error)
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
