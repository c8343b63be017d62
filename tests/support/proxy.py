"""A hostile HTTP proxy for the tests: it stands in front of an S3 server and spoils what it is told to.

A rule sees each request and names a fault, or None to pass it on untouched::

    with HostileProxy(server.endpoint, lambda call: "503" if call.number < 4 else None) as proxy: ...

=================== =====================================================================
`503`, `500`, `409` answer so; the server never sees the request
`403`               refused because the clocks are apart
`500 after`         the request takes effect, the answer is 500
`lost reply`        the request takes effect, the connection is reset
`reset`             the connection is reset; the server never sees the request
`slow`              the request takes effect, the answer comes `slow_seconds` later
`drip`              the answer's body comes at `drip_bytes` a second
`stall`             half of the answer's body comes, then nothing more
`cut`               half of the answer's body comes, then the connection is reset
`flip`              one bit of the answer's body is wrong
`flip sent`         one bit of the request's body is wrong
`no precondition`   the request is passed on without If-None-Match
=================== =====================================================================
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "te", "upgrade"}


@dataclass(frozen=True)
class Call:
    """One request, as a rule sees it."""

    number: int
    """From 1, over all requests."""
    method: str
    path: str
    attempt: int
    """From 1, over requests of this method and path; what signs a URL does not count as its path."""


Rule = Callable[[Call], str | None]


class HostileProxy:
    """Listens on loopback while its `with` block lasts."""

    def __init__(
        self, upstream: str, rule: Rule, *, slow_seconds: float = 2.0, drip_bytes: int = 1024
    ) -> None:
        parts = urlsplit(upstream)
        assert parts.hostname
        assert parts.port
        self.upstream, self.rule = (parts.hostname, parts.port), rule
        self.slow_seconds, self.drip_bytes = slow_seconds, drip_bytes
        self.spoilt: Counter[str] = Counter()
        """Fault -> how often it was done."""
        self.closed = threading.Event()
        self._lock, self._calls, self._seen = threading.Lock(), 0, Counter[tuple[str, str]]()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HostileProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def decide(self, method: str, path: str) -> str | None:
        with self._lock:
            self._calls += 1
            whose = method, path.partition("?X-Amz-")[0]
            self._seen[whose] += 1
            fault = self.rule(Call(self._calls, method, path, self._seen[whose]))
            if fault:
                self.spoilt[fault] += 1
            return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    proxy: HostileProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what this is about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def answer(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = proxy.decide(self.command, self.path)
        if fault == "reset":
            return self.reset()
        if fault in ("503", "500", "409", "403"):
            return self.reply(int(fault), [], _error(fault))
        if fault == "flip sent":
            body = bytes([body[0] ^ 1]) + body[1:]
        status, headers, data = self.forward(body, fault == "no precondition")
        if fault == "lost reply":
            return self.reset()
        if fault == "500 after":
            return self.reply(500, [], _error("500"))
        if fault == "slow":
            proxy.closed.wait(proxy.slow_seconds)
        if fault == "flip" and data:
            data = bytes([data[0] ^ 1]) + data[1:]
        return self.reply(status, headers, data, fault)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

    def forward(self, body: bytes, unconditional: bool) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.server.proxy.upstream, timeout=60)
        try:
            dropped = HOP | ({"if-none-match"} if unconditional else set())
            headers = {key: value for key, value in self.headers.items() if key.lower() not in dropped}
            headers["Content-Length"] = str(len(body))
            connection.request(self.command, self.path, body or None, headers)
            reply = connection.getresponse()
            data = reply.read()
            kept = [(key, value) for key, value in reply.getheaders() if key.lower() not in HOP]
            if self.command == "HEAD":
                kept.append(("Content-Length", reply.getheader("Content-Length") or "0"))
            return reply.status, kept, data
        finally:
            connection.close()

    def reply(
        self, status: int, headers: list[tuple[str, str]], data: bytes, fault: str | None = None
    ) -> None:
        proxy = self.server.proxy
        self.send_response_only(status)
        for key, value in headers:
            self.send_header(key, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("stall", "cut"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                proxy.closed.wait(60)
            self.reset()
        elif fault == "drip":
            step = max(1, proxy.drip_bytes // 10)
            for start in range(0, len(data), step):
                self.wfile.write(data[start : start + step])
                self.wfile.flush()
                if proxy.closed.wait(0.1):
                    break
        else:
            self.wfile.write(data)

    def reset(self) -> None:
        """Close with a TCP reset instead of a farewell."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def _error(status: str) -> bytes:
    codes = {"503": "SlowDown", "500": "InternalError", "409": "ConditionalRequestConflict"}
    code = codes.get(status, "RequestTimeTooSkewed")
    return f"<Error><Code>{code}</Code><Message>said the proxy</Message></Error>".encode()
