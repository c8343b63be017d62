"""Bytes of S3 objects between the socket and the caller's memory, with nothing in between.

Reads: a reply of obstore comes in memory of its own: its pages are new, and every byte is copied into it and
out again. Here obstore signs a URL, which is asked for over a plain connection, and the socket fills the
buffers. Puts: obstore takes the SHA-256 of what it sends, to sign it; a shard's is known already, for its
receipt, and taking it again costs most of what a put costs.

Both are a first try and nothing else: whatever does not go exactly as it should, as fast as the time-out
allows, is left to obstore, the one owner of retries and of errors.
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

URL_LIFE = timedelta(minutes=15)
"""A signed URL is used at once; clocks may be apart by as much as S3 allows."""
IDLE_CONNECTIONS = 32
"""Connections kept open between requests."""
REFUSED = (400, 401, 403, 405, 411, 501)
"""Replies of a server that does not want a request, or not in this form."""
MOMENTARY = frozenset(
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
"""S3's codes that speak of one request, not of its form."""
REFUSALS = 3
"""First tries refused in a row, each of which the client then got through, before they are given up."""
PIECES_TOGETHER = 1024
"""Pieces sent in one call (Linux's IOV_MAX)."""
MAX_REPLY = 1 << 16
"""Bytes of a reply to a put, or of a refusal, that are read."""

Method = Literal["GET", "PUT"]
log = logging.getLogger("winnow.store")


class _Unsuitable(Exception):
    """A first try would fail every time: nothing to sign with, a proxy, other certificates."""


@dataclass(frozen=True)
class FirstPut:
    """How the first try of a put went."""

    created: bool | None = None
    """True: it is there. False: something was there already. None: anything else; it may be there too."""
    etag: str | None = None
    """Of what was created."""
    refused: str | None = None
    """Why the server did not want it in this form."""
    code: str | None = None
    """S3's code of a reply that is an error."""


class Direct:
    """Requests of one S3 client. Safe to use from threads.

    Args:
        client: Signs the URLs.
        keys: What it signs with; None where it does not sign.
        seconds: Longest wait for a connection, for the next bytes, and for a whole reply.
    """

    def __init__(self, client: ObstoreS3, keys: Keys | None, seconds: float) -> None:
        self._client, self._keys, self._seconds = client, keys, seconds
        self._idle: deque[HTTPConnection] = deque()
        self.off: dict[Method, str] = {}
        """What is not tried any more, since it would fail every time, and why."""
        self._refusals: Counter[Method] = Counter()
        self._lock = threading.Lock()
        for name in filter(OTHER_HEADERS.fullmatch, os.environ) if keys else ():
            self.off["PUT"] = f"{name} asks for other headers"
        if keys is None:
            self.off = dict.fromkeys(("GET", "PUT"), "requests are not signed")
        weakref.finalize(self, _close_all, self._idle)

    def read(
        self, path: str, start: int, left: deque[Sequence[NDArray[np.uint8]]]
    ) -> Generator[None, None, str | None]:
        """As `ObjectStore.read_into`, but ends early, without an error, where anything is out of order.

        Args:
            path: The object's, in the client's bucket.
            start: Where the first part begins.
            left: The parts; each is taken away once it is filled.

        Returns:
            Why the server refused, where it did; for `outdone`.
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
            if not _is_range(reply, start, end):
                refused, _ = _refusal(reply)
                return refused
            body = _Body(reply, connection, deadline)
            while left:
                body.fill([buffer.data for buffer in left[0]])
                left.popleft()
                yield
            self._keep(connection, reply, opened)
            self._refusals["GET"] = 0
        return refused

    def put(self, path: str, pieces: Sequence[Data], sha256: str) -> FirstPut:
        """Create an object, with If-None-Match: *.

        Args:
            path: The object's, in the client's bucket.
            pieces: What it holds, in order.
            sha256: The digest of that, in hex. S3 refuses other bytes.
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
            connection.putrequest("PUT", url.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.putheader("Content-Length", str(sum(len(piece) for piece in pieces)))
            connection.endheaders()
            _send(connection, pieces, deadline)
            reply = connection.getresponse()
            refused, code = _refusal(reply)
            if reply.isclosed():
                self._keep(connection, reply, opened)
            if reply.status in (200, 412):
                self._refusals["PUT"] = 0
            return FirstPut({200: True, 412: False}.get(reply.status), reply.getheader("ETag"), refused, code)
        return FirstPut()

    def outdone(self, method: Method, refused: str | None) -> None:
        """The client got through with what a first try was refused: a statement about its form.

        Once may be chance; where it comes again and again, first tries are given up, with the reason.
        """
        if refused is None or method in self.off:
            return
        with self._lock:
            self._refusals[method] += 1
            if self._refusals[method] >= REFUSALS:
                self._give_up(method, refused)

    def conceal(self, text: str) -> str:
        """`text` without the keys that requests are signed with."""
        return self._keys.conceal(text) if self._keys else text

    def _give_up(self, method: Method, why: str) -> None:
        if method not in self.off:
            self.off[method] = why
            what = {"GET": "reads from", "PUT": "puts to"}[method]
            log.info("direct %s %s are not tried any more: %s", what, self._client, why)

    @contextmanager
    def _first_try(self, method: Method) -> Generator[ExitStack]:
        """Whatever goes wrong ends the block without an error; what was opened is closed after it."""
        with suppress(OSError, HTTPException, ValueError), ExitStack() as opened:
            try:
                yield opened
            except _Unsuitable as error:
                self._give_up(method, str(error))

    def _signed(self, method: Method, path: str) -> SplitResult:
        try:
            return urlsplit(obstore.sign(self._client, method, path, URL_LIFE))
        except BaseError:
            raise _Unsuitable("nothing to sign with") from None  # the cause may quote what is secret

    def _keep(self, connection: HTTPConnection, reply: HTTPResponse, opened: ExitStack) -> None:
        """Keep a connection for the next request, where there is use for it, instead of closing it."""
        if not reply.will_close and len(self._idle) < IDLE_CONNECTIONS:
            reply.close()
            opened.pop_all()
            self._idle.append(connection)

    def _connection(self, url: SplitResult) -> HTTPConnection:
        """An open connection that the server has not given up, or a new one."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
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
            raise _Unsuitable("the server's certificate is not among those that Python trusts") from None
        if _plain(connection):  # the kernel keeps the time, so that one call may wait for many packets
            wait = struct.pack("ll", int(self._seconds), int(self._seconds % 1 * 1e6))
            connection.sock.settimeout(None)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        return connection


def _is_range(reply: HTTPResponse, start: int, end: int) -> bool:
    """Whether a reply brings bytes [start, end) as they are stored."""
    found = (reply.getheader("Content-Range") or "").partition("/")[0]
    plain = reply.getheader("Content-Encoding") is None
    return plain and (reply.status, reply.length, found) == (206, end - start, f"bytes {start}-{end - 1}")


def _refusal(reply: HTTPResponse) -> tuple[str | None, str | None]:
    """Why a server does not want a request in this form, where that is what it says; and S3's code."""
    said = reply.read(MAX_REPLY)
    found = re.search(rb"<Code>(\w{1,64})</Code>", said)
    code = found[1].decode() if found else None
    if reply.status not in REFUSED or code in MOMENTARY:
        return None, code
    return f"{reply.status} {code or reply.reason}", code


def _plain(connection: HTTPConnection) -> bool:
    """Whether a connection is a plain socket of a system that can fill several buffers in one call."""
    return sys.platform == "linux" and type(connection.sock) is socket.socket


def _send(connection: HTTPConnection, pieces: Sequence[Data], deadline: float) -> None:
    """Send pieces as they lie; an OSError where they are not taken in time."""
    left = [memoryview(piece).cast("B") for piece in pieces]
    while left:
        if _plain(connection):
            sent = connection.sock.sendmsg(left[:PIECES_TOGETHER])
        else:
            sent = len(left[0])
            connection.sock.sendall(left[0])
        while left and sent >= len(left[0]):
            sent -= len(left.pop(0))
        if sent:
            left[0] = left[0][sent:]
        if time.monotonic() > deadline:
            raise TimeoutError


class _Body:
    """A reply's bytes, in order.

    What came along with the headers is in the reply's own buffer. Of what follows, a plain socket fills all
    buffers in one call, asleep in the kernel meanwhile: a thread that woke for every piece of it would need
    the interpreter's lock each time.
    """

    def __init__(self, reply: HTTPResponse, connection: HTTPConnection, deadline: float) -> None:
        self._reply, self._deadline = reply, deadline
        self._socket = connection.sock if _plain(connection) else None
        self._ahead = True
        """Whether the reply's own buffer may hold some."""

    def fill(self, buffers: list[memoryview]) -> None:
        """The next bytes into some buffers; an OSError where they do not come in time."""
        while buffers:
            if self._socket is None or self._ahead:
                got = self._reply.fp.readinto1(buffers[0])
                # Asked for more than its buffer holds, it gives all of that and keeps nothing.
                self._ahead = self._ahead and len(buffers[0]) <= DEFAULT_BUFFER_SIZE
            else:
                got = self._socket.recvmsg_into(buffers, 0, socket.MSG_WAITALL)[0]
            if not got or time.monotonic() > self._deadline:
                raise TimeoutError
            while buffers and got >= len(buffers[0]):
                got -= len(buffers.pop(0))
            if got:
                buffers[0] = buffers[0][got:]


def _readable(handle: int) -> bool:
    """Whether an idle connection has something to say: that it is closed, as a rule."""
    waiting = poll()
    waiting.register(handle, POLLIN)
    return bool(waiting.poll(0))


def _close_all(connections: deque[HTTPConnection]) -> None:
    while connections:
        connections.pop().close()
