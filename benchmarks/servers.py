"""An S3 server for benchmarks: that of the environment, or MinIO for the duration of a run."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 30.0


def tools() -> Path:
    """The folder to which `make` installs programs."""
    return Path(os.environ.get("WINNOW_TOOLS") or Path.home() / ".cache" / "winnow" / "tools")


def free_port() -> int:
    """A port of loopback on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def minio_binary() -> Path | None:
    """MinIO from `make minio`, or on the PATH; None if it is not installed."""
    found = shutil.which(tools() / "bin" / "minio") or shutil.which("minio")
    return Path(found) if found else None


@contextmanager
def s3_root(cores: list[int] | None = None) -> Generator[str | None]:
    """`s3://bucket` of a fresh bucket, with its credentials in the environment; None without a server.

    Args:
        cores: Cores of MinIO; None are those of this process.
    """
    if os.environ.get("AWS_ENDPOINT_URL"):
        yield _bucket()
        return
    binary = minio_binary()
    if binary is None:
        yield None
        return
    address = f"127.0.0.1:{free_port()}"
    settings = {
        "AWS_ENDPOINT_URL": f"http://{address}",
        "AWS_ACCESS_KEY_ID": "winnow-bench",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
        "AWS_REGION": "us-east-1",
    }
    root = {
        "MINIO_ROOT_USER": settings["AWS_ACCESS_KEY_ID"],
        "MINIO_ROOT_PASSWORD": settings["AWS_SECRET_ACCESS_KEY"],
        "MINIO_BROWSER": "off",
    }
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="winnow-minio-") as folder:
        command = [binary, "server", f"{folder}/data", "--address", address, "--quiet"]
        # Affinity is the thread's, and a process inherits that of the thread which starts it.
        ours = os.sched_getaffinity(0)
        os.sched_setaffinity(0, ours if cores is None else cores)
        process = subprocess.Popen(
            command, env={**before, **root}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.sched_setaffinity(0, ours)
        os.environ.update(settings)
        try:
            _await(f"http://{address}/minio/health/live", process)
            yield _bucket()
        finally:
            for name in settings:
                os.environ.pop(name, None)
            os.environ.update({name: before[name] for name in settings if name in before})
            process.kill()
            process.wait()


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    # Without a proxy of the environment, which cannot reach our loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            with opener.open(url, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _bucket() -> str:
    import botocore.session

    client = botocore.session.get_session().create_client(
        "s3",
        region_name=os.environ.get("AWS_REGION", "us-east-1"),
        endpoint_url=os.environ["AWS_ENDPOINT_URL"],
    )
    name = f"winnow-bench-{secrets.token_hex(6)}"
    client.create_bucket(Bucket=name)
    client.close()
    return f"s3://{name}"
