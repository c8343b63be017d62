"""A real Ray head of the tests' own: its ports, its folder, its token, its processes; nothing else's."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.conftest import free_port

START_SECONDS = 90.0


@dataclass(frozen=True)
class Head:
    """A running head."""

    url: str
    """Of its dashboard, which takes jobs."""
    token: str
    folder: Path
    """Where it keeps sessions and logs."""

    def environment(self) -> dict[str, str]:
        """What a client needs, on top of PATH and HOME."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}


@contextmanager
def ray_head(cpus: int = 2, **environment: str) -> Iterator[Head]:
    """`ray start --head --block` with token authentication, in the foreground of a process of ours."""
    token = secrets.token_hex(32)
    port, dashboard = free_port(), free_port()
    bin_folder = Path(sys.executable).parent
    env = {
        **{name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ},
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    with tempfile.TemporaryDirectory(prefix="wr-") as short:  # sockets lie in it: paths must be short
        folder = Path(short)
        with (folder / "out").open("wb") as out:
            process = subprocess.Popen(
                [
                    bin_folder / "ray", "start", "--head", "--block", "--disable-usage-stats",
                    f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
                    "--node-ip-address=127.0.0.1", f"--ray-client-server-port={free_port()}",
                    f"--dashboard-agent-listen-port={free_port()}",
                    f"--num-cpus={cpus}", f"--object-store-memory={80 * 2**20}", f"--temp-dir={folder / 'r'}",
                ],
                env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        try:
            head = Head(f"http://127.0.0.1:{dashboard}", token, folder)
            _wait(head, process, folder / "out")
            yield head
        finally:
            _end(process)


def _wait(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the job server answers, as it does once the head is whole."""
    request = urllib.request.Request(
        f"{head.url}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + START_SECONDS
    while True:
        if process.poll() is not None:
            pytest.fail(f"ray start ended with {process.returncode}: {log.read_text()[-2000:]}")
        try:
            with opener.open(request, timeout=2):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > end:
                pytest.fail(f"no head after {START_SECONDS:.0f} s ({error}): {log.read_text()[-2000:]}")
            time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the head and what it started, by their ids."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    for member in alive:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=10)
