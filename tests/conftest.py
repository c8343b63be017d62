"""Fixtures shared by all tests: an S3 server (a real one where there is one) and fresh roots on it."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from winnow.common.reporter import Lines, reporting

BUCKET_PREFIX = "winnow-test-"
# `make test ARGS=...` hands its variables on, and a `make` that a test starts would take them for its own
MAKE = "MAKEFLAGS MFLAGS MAKELEVEL MAKEOVERRIDES ARGS CONFIG RAY_ADDRESS JOB SAE OUT"
for name in MAKE.split():
    os.environ.pop(name, None)
# Before torch is imported, here and in the processes that tests start. With matrices this small a second
# thread only waits, and busily: on two loaded cores two files took 33 s of CPU time, and with one thread 11.
os.environ.setdefault("OMP_NUM_THREADS", "1")
START_SECONDS = 30.0

settings.register_profile("winnow", deadline=None)  # a busy machine is no failure
settings.load_profile("winnow")


@dataclass(frozen=True)
class S3Server:
    """Where tests find S3."""

    kind: str
    """`environment`, `minio` or `moto`."""
    endpoint: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"

    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
        }


def minio_binary() -> Path | None:
    """MinIO where `make minio` puts it, or on the PATH."""
    tools = Path(os.environ.get("WINNOW_TOOLS") or Path.home() / ".cache" / "winnow" / "tools")
    installed = tools / "bin" / "minio"
    if installed.is_file() and os.access(installed, os.X_OK):
        return installed
    found = shutil.which("minio")
    return Path(found) if found else None


def s3_choice() -> str:
    """Which server the tests use: an endpoint of the environment, MinIO, or moto."""
    if os.environ.get("WINNOW_TEST_S3_ENDPOINT"):
        return "environment"
    return "minio" if minio_binary() else "moto"


def pytest_report_header() -> str:
    choice = s3_choice()
    where = {
        "environment": os.environ.get("WINNOW_TEST_S3_ENDPOINT", ""),
        "minio": str(minio_binary()),
        "moto": "moto's server, in this process (`make minio` installs the real thing)",
    }[choice]
    return f"s3: {choice}: {where}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _used:
        terminalreporter.write_line(f"S3 tests ran against {_used[0].kind} at {_used[0].endpoint}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    _sessions.append(session)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Where Ray was in this process, leave without the end of its C++ libraries.

    All is told and closed by now. Native threads outlive `ray.shutdown`, and once in a while one of them
    reads what the process's end has just freed: a segmentation fault after the last test has passed.
    """
    if "ray" in sys.modules and _sessions:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(_sessions[0].exitstatus))


_sessions: list[pytest.Session] = []
_used: list[S3Server] = []


class Listener(Lines):
    """Keeps what is said, of progress the plain lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def told() -> Iterator[list[str]]:
    """The lines that library code tells people in this test."""
    listener = Listener()
    with reporting(listener):
        yield listener.lines


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server for the session; the process that was started is ended with it."""
    for server in _s3_servers():
        _used.append(server)
        yield server


def _s3_servers() -> Iterator[S3Server]:
    choice = s3_choice()
    if choice == "environment":
        keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        missing = [key for key in keys if not os.environ.get(key)]
        if missing:
            pytest.fail(f"WINNOW_TEST_S3_ENDPOINT is set, {' and '.join(missing)} not")
        yield S3Server(
            "environment",
            os.environ["WINNOW_TEST_S3_ENDPOINT"],
            os.environ[keys[0]],
            os.environ[keys[1]],
            os.environ.get("AWS_REGION", "us-east-1"),
        )
    elif choice == "minio":
        yield from _minio(minio_binary())
    else:
        yield from moto_server()


def _minio(binary: Path | None) -> Iterator[S3Server]:
    assert binary is not None
    server = S3Server("minio", f"http://127.0.0.1:{free_port()}", "winnow-test", secrets.token_hex(16))
    keep = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "LANG") if key in os.environ}
    root = {"MINIO_ROOT_USER": server.access_key, "MINIO_ROOT_PASSWORD": server.secret_key}
    with tempfile.TemporaryDirectory(prefix="winnow-minio-") as folder:
        log_path = Path(folder) / "log"
        address = server.endpoint.removeprefix("http://")
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [
                    binary,
                    "server",
                    f"{folder}/data",
                    "--address",
                    address,
                    "--console-address",
                    ":0",
                    "--quiet",
                ],
                env={**keep, **root, "MINIO_BROWSER": "off"},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        try:
            _wait_until_live(f"{server.endpoint}/minio/health/live", process, log_path)
            yield server
        finally:
            process.kill()  # its data goes with it; a graceful end takes seconds
            process.wait()


def moto_server() -> Iterator[S3Server]:
    """Moto's threaded server on a free port.

    Moto itself looks whether an object is there and writes it later, so that two of eight may create it: here
    a put is one step.
    """
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    one_step, put = threading.Lock(), S3Response.put_object

    def put_in_one_step(self: S3Response):
        with one_step:
            return put(self)

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    S3Response.put_object = put_in_one_step
    server.start()
    try:
        yield S3Server("moto", f"http://127.0.0.1:{server._port}", "winnow-test", "winnow-test-secret")
    finally:
        server.stop()
        S3Response.put_object = put


def _wait_until_live(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        if process.poll() is not None:
            pytest.fail(f"MinIO ended with {process.returncode}: {log.read_text()[-500:]}")
        try:
            with opener.open(url, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                pytest.fail(f"MinIO did not start within {START_SECONDS:.0f} s: {log.read_text()[-500:]}")
            process_wait(process, 0.05)


def process_wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for a process to end, at most so long."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_bucket(server: S3Server) -> str:
    """A new bucket with a random name."""
    import botocore.session

    client = botocore.session.get_session().create_client(
        "s3",
        region_name=server.region,
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )
    name = BUCKET_PREFIX + secrets.token_hex(6)
    client.create_bucket(Bucket=name)
    client.close()
    return name


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with its credentials in the environment of this test."""
    only_aws(monkeypatch, s3_server.environment())
    return s3_server


def only_aws(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Of what AWS's clients read of this machine, leave nothing but `environment` to this test."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    nothing = {
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in {**nothing, **environment}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def s3_bucket(s3_server: S3Server) -> str:
    """One bucket for the session."""
    return make_bucket(s3_server)


@pytest.fixture
def s3_uri(s3_environment: S3Server, s3_bucket: str) -> str:
    """`s3://bucket/<random>`: a fresh root, reachable with the environment of this test."""
    return f"s3://{s3_bucket}/{secrets.token_hex(8)}"


@pytest.fixture(params=["local", "s3"])
def root_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh root on every backend in turn."""
    if request.param == "local":
        return str(tmp_path / "root")
    return request.getfixturevalue("s3_uri")
