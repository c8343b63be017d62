"""Serves metrics to Prometheus, and whether the process is healthy, while a command runs.

What a process measures registers itself in `REGISTRY`; nothing is served unless a command asks for it. Names
follow Prometheus' conventions: base units, `_total` for what only grows, `_ratio` for shares from 0 to 1.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from winnow.schemas.errors import ConfigError, StoreError

LOOPBACK = "127.0.0.1"
REGISTRY = CollectorRegistry()
"""What this process measures. Not the library's own registry, which others share."""

# The format that every Prometheus reads; the newer one differs only in names with other characters.
_TEXT = "text/plain; version=0.0.4; charset=utf-8"


@contextmanager
def serving_metrics(
    port: int,
    host: str = LOOPBACK,
    registry: CollectorRegistry = REGISTRY,
    healthy: Callable[[], bool] = lambda: True,
) -> Generator[int]:
    """Answer `/metrics` and `/healthz` while the block runs; yields the port.

    `/healthz` is 200 or 503. There is no authentication.

    Args:
        port: Port to listen on; 0 takes a free one.
        host: Address to listen on.
        registry: What is served. If one of its collectors raises `StoreError`, the answer is 503.
        healthy: What `/healthz` says.

    Raises:
        ConfigError: The port is in use, or the machine has no such address.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/healthz":
                alive = healthy()
                self._answer(200 if alive else 503, b"ok\n" if alive else b"the loop is stuck\n")
            elif self.path == "/metrics":
                try:
                    self._answer(200, generate_latest(registry))
                except StoreError:
                    self._answer(503, b"storage cannot be reached\n")
            else:
                self._answer(404, b"/healthz or /metrics\n")

        def _answer(self, code: int, data: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", _TEXT)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        # The base class writes a line per request to stderr, among the command's own messages.
        def log_message(self, format: str, *args: Any) -> None:  # noqa: ARG002
            return

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise ConfigError(f"port {port} of {host}", expected="a free one", got=error.strerror) from error
    except OverflowError as error:
        raise ConfigError("the port of the metrics", expected="0 to 65535", got=port) from error
    thread = threading.Thread(target=server.serve_forever, name="winnow-metrics", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
