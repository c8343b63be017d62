"""Direct transfers between a socket and the caller's memory, for large S3 objects.

obstore signs a URL, and a plain HTTP connection requests it. This is a first try only: whatever does not go
exactly as it should within the time-out is left to obstore, the single owner of retries and errors.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
import struct
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from io import DEFAULT_BUFFER_SIZE
from select import POLLIN, poll
from typing import Literal
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.exceptions import BaseError
from obstore.store import S3Store as ObstoreS3

from winnow.store.objects.base import Data
from winnow.store.objects.keys import Keys
from winnow.store.objects.signing import OTHER_HEADERS, put_headers

# A URL is used at once, but the server's clock may differ by as much as S3 allows, which is 15 minutes.
_URL_LIFE = timedelta(minutes=15)
"""Validity of a signed URL."""
_IDLE_CONNECTIONS = 32
"""Connections kept open between requests."""
REFUSED = (400, 401, 403, 405, 411, 501)
"""Statuses of a server that refuses a request, or its form."""
_MOMENTARY = frozenset(
    {
        "BadDigest",
        "ExpiredToken",
        "IncompleteBody",
        "InvalidDigest",
        "RequestTimeout",
        "RequestTimeTooSkewed",
        "SlowDown",
        "TokenRefreshRequired",
        "XAmzContentSHA256Mismatch",
    }
)
"""S3's error codes that concern one request (a broken body, a clock, a load), not its form."""
# One refusal may be chance; without a limit every read would pay for a request that always fails.
REFUSALS = 3
"""Refused first tries in a row, each of which obstore then got through, before first tries are abandoned."""
_PIECES_TOGETHER = 1024
"""Pieces sent in one call (Linux's IOV_MAX)."""
# A body from a hostile server must not fill the memory; S3's error documents are far shorter.
_MAX_REPLY = 1 << 16
"""Most bytes that are read of a reply to a put, or of a refusal."""

Method = Literal["GET", "PUT"]
log = logging.getLogger("winnow.store")


class _Unsuitable(Exception):
    """First tries would fail every time: nothing to sign with, a proxy, other certificates."""


@dataclass(frozen=True)
class FirstPut:
    """Outcome of the first try of a put."""

    created: bool | None = None
    """True: created. False: an object existed already. None: unknown; it may have been created too."""
    etag: str | None = None
    """ETag of the created object."""
    refused: str | None = None
    """Reason of a server that refuses the form of the request."""
    code: str | None = None
    """S3's code of an error reply."""


class Direct:
    """Requests of one S3 client. Safe to use from threads.

    Args:
        client: Signs the URLs.
        keys: The client's keys; None if it does not sign.
        seconds: Longest wait for a connection, for the next bytes, and for a whole reply.
    """

    def __init__(self, client: ObstoreS3, keys: Keys | None, seconds: float) -> None:
        self._client, self._keys, self._seconds = client, keys, seconds
        self._idle: deque[HTTPConnection] = deque()
        self.off: dict[Method, str] = {}
        """Methods whose first tries are abandoned, with the reason."""
        self._refusals: Counter[Method] = Counter()
        self._lock = threading.Lock()
        # Such headers concern puts; a read sends a range and nothing else.
        for name in filter(OTHER_HEADERS.fullmatch, os.environ) if keys else ():
            self.off["PUT"] = f"{name} asks for other headers"
        if keys is None:
            self.off = dict.fromkeys(("GET", "PUT"), "requests are not signed")
        weakref.finalize(self, _close_all, self._idle)

    def read(
        self, path: str, start: int, left: deque[Sequence[NDArray[np.uint8]]]
    ) -> Generator[None, None, str | None]:
        """Read like `ObjectStore.read_into`, but end early and without an error if anything goes wrong.

        A reply of obstore is new memory, whose pages are touched for the first time and whose every byte is
        copied once more; here the socket fills the caller's buffers.

        Args:
            path: The object's path in the client's bucket.
            start: Offset of the first part's first byte.
            left: The parts; each is removed once it is filled.

        Returns:
            The server's reason if it refused, for `outdone`; otherwise None.
        """
        refused: str | None = None
        if "GET" in self.off:
            return refused
        end = start + sum(buffer.size for part in left for buffer in part)
        deadline = time.monotonic() + self._seconds
        with self._first_try("GET") as opened:
            url = self._signed("GET", path)
            connection = opened.enter_context(closing(self._connection(url)))
            headers = {"Range": f"bytes={start}-{end - 1}"}
            connection.request("GET", f"{url.path}?{url.query}", headers=headers)
            reply = connection.getresponse()
            # Before any byte reaches the buffers: a proxy may answer 200 with a page of its own.
            if not _is_range(reply, start, end):
                refused, _ = _refusal(reply)
                return refused
            body = _Body(reply, connection, deadline)
            while left:
                body.fill([buffer.data for buffer in left[0]])
                left.popleft()
                yield
            # Only after the whole body: a connection with unread bytes would give them to the next request.
            self._keep(connection, reply, opened)
            self._refusals["GET"] = 0
        return refused

    def put(self, path: str, pieces: Sequence[Data], sha256: str) -> FirstPut:
        """Create an object, with If-None-Match: *.

        obstore computes the SHA-256 of what it sends, to sign it. A shard's is known, from its receipt, and
        computing it again is most of the cost of a put.

        Args:
            path: The object's path in the client's bucket.
            pieces: The object's bytes, in order.
            sha256: Their digest in hex. S3 refuses other bytes.
        """
        if "PUT" in self.off:
            return FirstPut()
        deadline = time.monotonic() + self._seconds
        with self._first_try("PUT") as opened:
            url = self._signed("PUT", path)
            headers = put_headers(url, sha256, self._keys)
            if headers is None:
                return FirstPut()
            connection = opened.enter_context(closing(self._connection(url)))
            # http.client must not add a header: all that are sent are signed.
            connection.putrequest("PUT", url.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.putheader("Content-Length", str(sum(len(piece) for piece in pieces)))
            connection.endheaders()
            whole = _send(connection, pieces, deadline)
            reply = connection.getresponse()
            refused, code = _refusal(reply)
            # Of a body that the server did not take to the end, only a refusal is believed.
            if not whole and reply.status < 300:
                return FirstPut()
            if whole and reply.isclosed():  # its body, up to MAX_REPLY, was read to the end
                self._keep(connection, reply, opened)
            # 412 is a clear answer too: the form was accepted, the object exists.
            if reply.status in (200, 412):
                self._refusals["PUT"] = 0
            return FirstPut({200: True, 412: False}.get(reply.status), reply.getheader("ETag"), refused, code)
        return FirstPut()

    def outdone(self, method: Method, refused: str | None) -> None:
        """Note that obstore succeeded where a first try was refused; give first tries up after `REFUSALS`."""
        if refused is None or method in self.off:
            return
        with self._lock:
            self._refusals[method] += 1
            if self._refusals[method] >= REFUSALS:
                self._give_up(method, refused)

    def conceal(self, text: str) -> str:
        """Return `text` without the keys that requests are signed with."""
        return self._keys.conceal(text) if self._keys else text

    def _give_up(self, method: Method, why: str) -> None:
        if method not in self.off:
            self.off[method] = why
            what = {"GET": "reads from", "PUT": "puts to"}[method]
            log.info("direct %s %s are abandoned: %s", what, self._client, why)

    @contextmanager
    def _first_try(self, method: Method) -> Generator[ExitStack]:
        """End the block without an error whatever goes wrong, and close what it opened."""
        with suppress(OSError, HTTPException, ValueError), ExitStack() as opened:
            try:
                yield opened
            except _Unsuitable as error:
                self._give_up(method, str(error))

    def _signed(self, method: Method, path: str) -> SplitResult:
        try:
            return urlsplit(obstore.sign(self._client, method, path, _URL_LIFE))
        except BaseError:
            raise _Unsuitable("nothing to sign with") from None  # the cause may quote a secret

    def _keep(self, connection: HTTPConnection, reply: HTTPResponse, opened: ExitStack) -> None:
        """Keep a connection for the next request instead of closing it, unless there are enough."""
        # After an interim reply (103) the one that counts is still to come: the next request would get it.
        if not reply.will_close and reply.status >= 200 and len(self._idle) < _IDLE_CONNECTIONS:
            reply.close()
            opened.pop_all()
            self._idle.append(connection)

    def _connection(self, url: SplitResult) -> HTTPConnection:
        """Return an idle connection that the server has not closed, or a new one."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread took the last one in between
                break
            # An idle connection with something to read has been closed, or answers nobody's question.
            if connection.sock is not None and not _readable(connection.sock.fileno()):
                return connection
            connection.close()
        host = url.hostname or ""
        if url.scheme in getproxies() and not proxy_bypass(host):
            raise _Unsuitable("an HTTP proxy stands between")
        kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
        connection = kind(host, url.port, timeout=self._seconds)
        try:
            connection.connect()
        except ssl.SSLError:
            # obstore may trust a certificate that Python does not.
            raise _Unsuitable("the server's certificate is not among those that Python trusts") from None
        # A time-out of Python's makes the socket non-blocking, and MSG_WAITALL would wait for nothing; the
        # kernel's lets one call wait for many packets.
        if _plain(connection):
            wait = struct.pack("ll", int(self._seconds), int(self._seconds % 1 * 1e6))
            connection.sock.settimeout(None)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        return connection


def _is_range(reply: HTTPResponse, start: int, end: int) -> bool:
    """Return whether a reply consists of the stored bytes [start, end)."""
    # A Content-Encoding would mean other bytes on the wire than in the object.
    found = (reply.getheader("Content-Range") or "").partition("/")[0]
    plain = reply.getheader("Content-Encoding") is None
    return plain and (reply.status, reply.length, found) == (206, end - start, f"bytes {start}-{end - 1}")


def _refusal(reply: HTTPResponse) -> tuple[str | None, str | None]:
    """Return the reason if a server refuses the form of a request, otherwise None; and S3's code."""
    said = reply.read(_MAX_REPLY)
    found = re.search(rb"<Code>(\w{1,64})</Code>", said)
    code = found[1].decode() if found else None
    if reply.status not in REFUSED or code in _MOMENTARY:
        return None, code
    return f"{reply.status} {code or reply.reason}", code


def _plain(connection: HTTPConnection) -> bool:
    """Return whether one call can fill several buffers: a plain socket (no TLS) on Linux."""
    return sys.platform == "linux" and type(connection.sock) is socket.socket


def _send(connection: HTTPConnection, pieces: Sequence[Data], deadline: float) -> bool:
    """Send pieces from where they are; OSError if the server does not take them in time.

    Returns:
        False if the server hung up before the end. It may have answered before: "exists" needs no body.
    """
    left = [memoryview(piece).cast("B") for piece in pieces]
    while left:
        try:
            if _plain(connection):
                sent = connection.sock.sendmsg(left[:_PIECES_TOGETHER])
            else:
                sent = len(left[0])
                connection.sock.sendall(left[0])
        except (BrokenPipeError, ConnectionResetError):
            return False
        while left and sent >= len(left[0]):
            sent -= len(left.pop(0))
        if sent:
            left[0] = left[0][sent:]
        # The socket's time-out covers one call only: a server that drips would never reach it.
        if time.monotonic() > deadline:
            raise TimeoutError
    return True


class _Body:
    """A reply's bytes, in order."""

    def __init__(self, reply: HTTPResponse, connection: HTTPConnection, deadline: float) -> None:
        self._reply, self._deadline = reply, deadline
        self._socket = connection.sock if _plain(connection) else None
        self._ahead = True
        """Whether the reply's own buffer may contain bytes: those that came along with the headers."""

    def fill(self, buffers: list[memoryview]) -> None:
        """Read the next bytes into some buffers; OSError if they do not come in time."""
        while buffers:
            if self._socket is None or self._ahead:
                got = self._reply.fp.readinto1(buffers[0])
                # Asked for more than its buffer holds, `readinto1` returns all of that and keeps nothing.
                self._ahead = self._ahead and len(buffers[0]) <= DEFAULT_BUFFER_SIZE
            else:
                # Asleep in the kernel until all buffers are full: a thread that woke for every packet would
                # need the interpreter's lock each time.
                got = self._socket.recvmsg_into(buffers, 0, socket.MSG_WAITALL)[0]
            if not got or time.monotonic() > self._deadline:
                raise TimeoutError
            while buffers and got >= len(buffers[0]):
                got -= len(buffers.pop(0))
            if got:
                buffers[0] = buffers[0][got:]


def _readable(handle: int) -> bool:
    """Return whether an idle connection has something to read, as a rule that it was closed."""
    waiting = poll()
    waiting.register(handle, POLLIN)
    return bool(waiting.poll(0))


def _close_all(connections: deque[HTTPConnection]) -> None:
    while connections:
        connections.pop().close()
