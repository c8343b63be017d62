"""Serves the trainer service's health and Prometheus metrics on loopback, with the standard library's server.

`/healthz` is 200 while the service's loop turns, else 503. `/metrics` is Prometheus' text format.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from winnow.jobs.queue import job_facts
from winnow.jobs.service import Service
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError, StoreError
from winnow.schemas.service import RunStatus
from winnow.store.objects import open_store
from winnow.trainer.run.status import read_status

# As long as a lease: a loop that turns more slowly loses its jobs to other services.
_STUCK_SECONDS = 60.0
"""Seconds without a turn after which the loop counts as stuck."""
_JOB_STATES = ("waiting", "running", "stopped", "finished", "failed")
_GAUGES = {
    "winnow_run_step": ("step", "Steps finished"),
    "winnow_run_steps": ("steps", "Steps of the whole run"),
    "winnow_run_tokens": ("tokens", "Rows trained on"),
    "winnow_run_tokens_per_second": ("tokens_per_s", "Rows per second of its own time"),
    "winnow_run_fvu": ("fvu", "FVU of the last batch that was logged; once finished, held out"),
    "winnow_run_waiting_share": ("waiting_share", "Share of the time spent waiting for data"),
    "winnow_run_seconds": ("seconds", "Wall-clock of its steps"),
    "winnow_run_cost": ("cost", "At prices.trainer_hour"),
}


def _is_healthy(service: Service) -> bool:
    """Whether the service's loop turns."""
    return time.monotonic() - service.last_turn < _STUCK_SECONDS


def metrics_text(service: Service) -> str:
    """The current metrics, in Prometheus' text format."""
    facts = job_facts(service.store)
    states = Counter(fact["state"] for fact in facts)
    lines = ["# HELP winnow_jobs Jobs of the queue", "# TYPE winnow_jobs gauge"]
    lines += [f'winnow_jobs{{state="{state}"}} {states[state]}' for state in _JOB_STATES]
    lines += ["# HELP winnow_devices Devices of this service", "# TYPE winnow_devices gauge"]
    free = len(service.free)
    lines += [f'winnow_devices{{state="free"}} {free}']
    lines += [f'winnow_devices{{state="busy"}} {len(service.devices) - free}']
    lines += ["# HELP winnow_failed_attempts_total Attempts that failed"]
    lines += ["# TYPE winnow_failed_attempts_total counter"]
    lines += [f"winnow_failed_attempts_total {sum(fact['failed_attempts'] for fact in facts)}"]
    runs = [
        (attempt.job.name, out, status)
        for attempt in list(service.attempts)  # a copy: the loop changes it in another thread
        for out in attempt.job.outs
        if (status := _status(out, attempt.job.job.config.storage)) is not None
    ]
    for name, (attribute, help_text) in _GAUGES.items():
        lines += [f"# HELP {name} {help_text}", f"# TYPE {name} gauge"]
        for job, out, status in runs:
            value = getattr(status, attribute)
            if value is not None:
                lines.append(f'{name}{{job="{job}",run="{_escaped(out)}"}} {value}')
    return "\n".join(lines) + "\n"


def _status(out: str, storage: StorageSpec) -> RunStatus | None:
    """A run's status; None also if its folder is unreachable, which its worker reports."""
    try:
        return read_status(open_store(out, storage))
    except (ConfigError, StoreError):
        return None


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


@contextmanager
def serving(service: Service, port: int) -> Iterator[int]:
    """Answer on 127.0.0.1 while the block runs; yields the port.

    Args:
        service: The service to report on.
        port: Port to listen on; 0 takes a free one.

    Raises:
        ConfigError: The port is in use.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/healthz":
                healthy = _is_healthy(service)
                self._answer(200 if healthy else 503, "ok\n" if healthy else "the loop is stuck\n")
            elif self.path == "/metrics":
                try:
                    self._answer(200, metrics_text(service))
                except StoreError:
                    self._answer(503, "storage cannot be reached\n")
            else:
                self._answer(404, "/healthz or /metrics\n")

        def _answer(self, code: int, text: str) -> None:
            data = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        # The base class writes a line per request to stderr, among the service's own messages.
        def log_message(self, format: str, *args: Any) -> None:  # noqa: ARG002
            return

    # On loopback only: there is no authentication, and metrics name jobs and folders.
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ConfigError(f"port {port}", expected="a free one on 127.0.0.1", got=error.strerror) from error
    thread = threading.Thread(target=server.serve_forever, name="winnow-metrics", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
