"""Tests the store on every S3 server that is installed here, and prints a row of docs/data.md for each.

Outside CI: `make servers`. For each server: the probe, the conformance suite, a dataset that is damaged and
repaired, and whether it checks signed digests. It looks for programs on the PATH and in Winnow's tools
(`bin` of the folder WINNOW_TOOLS):

- `minio`: `make minio`;
- `s3s-fs`: `cargo install s3s-fs --features binary`;
- `versitygw`: `go install github.com/versity/versitygw/cmd/versitygw@latest`;
- `gofakes3`: `go install github.com/johannesboyne/gofakes3/cmd/gofakes3@latest`;
- `rclone`, moto: of the development packages;
- Ceph's gateway: Debian's ceph-mon, ceph-osd, ceph-mgr, ceph-common, radosgw; one node, in memory;
- S3Proxy and S3Mock, if there is Java: the jars in `java/s3proxy` and `java/s3mock` of the tools, from
  `mvn dependency:copy-dependencies` of org.gaul:s3proxy, and com.adobe.testing:s3mock:VERSION:jar:exec.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path

import botocore.session

from benchmarks.servers import START_SECONDS, free_port, tools
from winnow.schemas.errors import WinnowError
from winnow.store.check.repair import repair
from winnow.store.check.verify import verify
from winnow.store.format.layout import shard_key
from winnow.store.objects import open_store
from winnow.store.objects.s3_store import S3Store
from winnow.store.testing import StoreConformance, flip_bit, make_plan, write_dataset

KEY, SECRET = "winnowkey", "winnowsecret"
CEPH = """[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon}/0]
auth cluster required = none
auth service required = none
auth client required = none
ms bind msgr1 = false
ms mon client mode = crc secure
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
pid file = {folder}/$name.pid
mon data = {folder}/mon
mgr data = {folder}/mgr
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 2147483648
osd class load list = *
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
rgw frontends = beast endpoint=127.0.0.1:{port}
"""


def found(name: str) -> str | None:
    """A program or a folder of jars of Winnow's tools, or a program of this environment or of the PATH."""
    places = (tools() / "bin", tools() / "java", Path(sys.executable).parent)
    return next((str(place / name) for place in places if (place / name).exists()), shutil.which(name))


def told(*command: str) -> str:
    """The version in a program's output; `?` if there is none."""
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    match = re.search(r"\d+\.\d+[\w.+-]*|RELEASE\.[\w-]+|DEVELOPMENT\.\S+", said.stdout + said.stderr)
    return match[0] if match else "?"


def go_version(name: str) -> str:
    """The version of the module that `go install` made a program of."""
    said = subprocess.run(
        ["go", "version", "-m", found(name) or ""], capture_output=True, text=True, check=False
    )
    match = re.search(r"^\s*mod\s+\S+\s+v(\S+)", said.stdout, re.MULTILINE)
    return match[1] if match else "?"


@contextmanager
def process(
    command: Sequence[str], folder: str, environment: dict[str, str] | None = None
) -> Generator[subprocess.Popen[bytes]]:
    """Run a server for the duration of a `with` block."""
    with (Path(folder) / f"log-{secrets.token_hex(4)}").open("wb") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
        try:
            yield server
        finally:
            server.kill()
            server.wait()


@contextmanager
def minio(folder: str, port: int) -> Generator[None]:
    """MinIO."""
    keys = {"MINIO_ROOT_USER": KEY, "MINIO_ROOT_PASSWORD": SECRET, "MINIO_BROWSER": "off"}
    command = [found("minio") or "", "server", f"{folder}/data", "--address", f"127.0.0.1:{port}", "--quiet"]
    with process(command, folder, keys):
        yield


@contextmanager
def s3s_fs(folder: str, port: int) -> Generator[None]:
    """s3s-fs, the server of s3s that stores files."""
    (Path(folder) / "data").mkdir()
    command = [found("s3s-fs") or "", "--access-key", KEY, "--secret-key", SECRET]
    with process([*command, "--host", "127.0.0.1", "--port", str(port), f"{folder}/data"], folder):
        yield


@contextmanager
def rclone(folder: str, port: int) -> Generator[None]:
    """`rclone serve s3`."""
    (Path(folder) / "data").mkdir()
    command = [found("rclone") or "", "serve", "s3", "--addr", f"127.0.0.1:{port}", "--config", os.devnull]
    with process([*command, "--auth-key", f"{KEY},{SECRET}", f"{folder}/data"], folder):
        yield


@contextmanager
def moto(folder: str, port: int) -> Generator[None]:
    """Moto's server."""
    with process([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], folder):
        yield


@contextmanager
def versitygw(folder: str, port: int) -> Generator[None]:
    """Versity's gateway over a folder."""
    (Path(folder) / "data").mkdir()
    command = [found("versitygw") or "", "--access", KEY, "--secret", SECRET, "--port", f"127.0.0.1:{port}"]
    with process([*command, "posix", f"{folder}/data"], folder):
        yield


@contextmanager
def gofakes3(folder: str, port: int) -> Generator[None]:
    """gofakes3, in memory."""
    command = [found("gofakes3") or "", "-host", f"127.0.0.1:{port}", "-backend", "memory"]
    with process(command, folder):
        yield


def jar_version(name: str) -> str:
    """The version in the name of a server's jar."""
    names = "".join(path.name for path in Path(found(name) or "").glob(f"{name}-*.jar"))
    match = re.search(r"-(\d[\d.]*\d)", names)
    return match[1] if match else "?"


@contextmanager
def s3proxy(folder: str, port: int) -> Generator[None]:
    """S3Proxy over a folder."""
    (Path(folder) / "data").mkdir()
    settings = {
        "s3proxy.endpoint": f"http://127.0.0.1:{port}",
        "s3proxy.authorization": "aws-v2-or-v4",
        "s3proxy.identity": KEY,
        "s3proxy.credential": SECRET,
        "jclouds.provider": "filesystem-nio2",
        "jclouds.filesystem.basedir": f"{folder}/data",
    }
    file = Path(folder) / "s3proxy.conf"
    file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    command = ["java", "-cp", f"{found('s3proxy')}/*", "org.gaul.s3proxy.Main", "--properties", str(file)]
    with process(command, folder):
        yield


@contextmanager
def s3mock(folder: str, port: int) -> Generator[None]:
    """Adobe's S3Mock."""
    jar = next(Path(found("s3mock") or "").glob("s3mock-*.jar"))
    ports = [f"--com.adobe.testing.s3mock.http-port={port}", f"--server.port={free_port()}"]
    root = f"--com.adobe.testing.s3mock.store.root={folder}/data"
    with process(["java", "-jar", str(jar), *ports, root], folder):
        yield


@contextmanager
def ceph(folder: str, port: int) -> Generator[None]:
    """Ceph's gateway over a monitor, a manager and a store in memory."""
    for name in ("mon", "mgr", "osd"):
        (Path(folder) / name).mkdir()
    fsid, disk, monitor = str(uuid.uuid4()), str(uuid.uuid4()), free_port()
    config, monmap = f"{folder}/ceph.conf", f"{folder}/monmap"
    Path(config).write_text(CEPH.format(fsid=fsid, mon=monitor, folder=folder, port=port))

    def do(*command: str) -> None:
        subprocess.run([command[0], "-c", config, *command[1:]], check=True, capture_output=True, timeout=120)

    where = f"[v2:127.0.0.1:{monitor}]"
    make = ["monmaptool", "--create", "--fsid", fsid, "--addv", "a", where, monmap]
    subprocess.run(make, check=True, capture_output=True)
    do("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
    with ExitStack() as stack:
        for program, name in (("ceph-mon", "a"), ("ceph-mgr", "x")):
            stack.enter_context(process([program, "-c", config, "-f", "-i", name], folder))
        do("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        do("ceph", "osd", "new", disk)
        stack.enter_context(process(["ceph-osd", "-c", config, "-f", "-i", "0"], folder))
        user = ["user", "create", "--uid=winnow", "--display-name=winnow"]
        do("radosgw-admin", *user, f"--access-key={KEY}", f"--secret={SECRET}")
        stack.enter_context(process(["radosgw", "-c", config, "-f", "-n", "client.admin"], folder))
        yield


SERVERS: dict[str, tuple[Callable[..., object], str, Callable[[], str]]] = {
    "MinIO": (minio, "minio", lambda: told(found("minio") or "", "--version")),
    "Ceph's gateway": (ceph, "radosgw", lambda: told("radosgw", "--version")),
    "s3s-fs": (s3s_fs, "s3s-fs", lambda: told(found("s3s-fs") or "", "--version")),
    "versitygw": (versitygw, "versitygw", lambda: go_version("versitygw")),
    "gofakes3": (gofakes3, "gofakes3", lambda: go_version("gofakes3")),
    "S3Proxy": (s3proxy, "s3proxy", lambda: jar_version("s3proxy")),
    "S3Mock": (s3mock, "s3mock", lambda: jar_version("s3mock")),
    "rclone serve s3": (rclone, "rclone", lambda: told(found("rclone") or "", "--version")),
    "moto": (moto, "python", lambda: metadata.version("moto")),
}


def await_bucket(port: int) -> str:
    """A new bucket, once the server answers."""
    # S3Mock takes over a minute on two busy cores.
    end, opener = time.monotonic() + 6 * START_SECONDS, urllib.request.build_opener()
    while True:
        try:
            opener.open(f"http://127.0.0.1:{port}/", timeout=1).close()
            break
        # Any answer will do: an error for a request without a signature shows that it listens.
        except urllib.error.HTTPError:
            break
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
    client = botocore.session.get_session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
    )
    name = f"winnow-{secrets.token_hex(4)}"
    # A server may answer before it is ready to create a bucket.
    while True:
        try:
            client.create_bucket(Bucket=name)
            return name
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def fresh(bucket: str) -> S3Store:
    """An empty root."""
    store = open_store(f"s3://{bucket}/{secrets.token_hex(6)}")
    assert isinstance(store, S3Store)
    return store


def attempt(act: Callable[[], object]) -> str:
    """`yes`, or `no` and the error."""
    try:
        act()
    except (WinnowError, AssertionError) as error:
        return f"no: {' '.join(str(error).split())[:160]}"
    return "yes"


def mended(store: S3Store) -> None:
    """Damage a shard of a dataset and repair it."""
    write_dataset(store, make_plan(units=2))
    flip_bit(store, shard_key("resid_post.1", 1), -30)
    repair(store)
    assert verify(store, "full") == [], "still damaged"


def row(name: str, version: str, bucket: str) -> str:
    """Results of one server as a row of the table."""
    suite = StoreConformance()
    tests = [test for test, _ in inspect.getmembers(suite, inspect.ismethod) if test.startswith("test_")]
    failed: dict[str, str] = {}
    for test in tests:
        said = attempt(lambda test=test: getattr(suite, test)(fresh(bucket)))
        if said != "yes":
            failed[test] = said
    store = fresh(bucket)
    probe = attempt(store.probe)
    fast = attempt(lambda: mended(fresh(bucket)))
    for test, said in failed.items():
        print(f"  {name}: {test}: {said}", file=sys.stderr)
    alone = fresh(bucket)
    single = attempt(lambda: alone.probe(single_writer=True))
    checks = {(True, False): "yes", (True, True): "no"}.get(
        (alone._server.looked, alone._server.unchecked), "?"
    )
    for what, said in (("probe", probe), ("probe of a single writer", single), ("repair", fast)):
        print(f"  {name}: {what}: {said}", file=sys.stderr)
    passed = f"{len(tests) - len(failed)} of {len(tests)}"
    where = re.search(r"probe at ([^:]*)", probe)
    verdict = "passes" if probe == "yes" else f"refused: {where[1] if where else probe}"
    return f"| {name} {version} | {verdict} | {passed} | {checks} | {'yes' if fast == 'yes' else 'no'} |"


def main() -> None:
    """Test the servers that the command line names, or all."""
    logging.getLogger("winnow.store").setLevel(logging.ERROR)
    wanted = sys.argv[1:] or list(SERVERS)
    print("| server | probe | conformance | checks the signed digest | repair |\n|---|---|---|---|---|")
    for name in wanted:
        serve, program, version = SERVERS[name]
        if found(program) is None:
            print(f"  {name}: {program} is not installed", file=sys.stderr)
            continue
        port = free_port()
        # Credentials, profiles and regions of the user's environment would decide the result.
        for variable in [variable for variable in os.environ if variable.startswith("AWS_")]:
            del os.environ[variable]
        with tempfile.TemporaryDirectory(prefix="winnow-") as folder, serve(folder, port):  # pyright: ignore
            os.environ.update(
                AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
                AWS_ACCESS_KEY_ID=KEY,
                AWS_SECRET_ACCESS_KEY=SECRET,
            )
            print(row(name, version(), await_bucket(port)), flush=True)


if __name__ == "__main__":
    main()
