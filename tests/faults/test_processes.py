"""Processes that die, stop, race, fork, run out of disk or lose the time of day (P1, P3, P6)."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.conftest import S3Server
from tests.support.pipeline import pipeline_config
from winnow.common import clock
from winnow.schemas.config import Config, StorageSpec
from winnow.schemas.errors import StoreError, WinnowError
from winnow.store.check.verify import verify
from winnow.store.objects import local as local_objects
from winnow.store.objects import open_store
from winnow.store.testing import make_plan, write_dataset

HOOK = "resid_post.1"
PLAN = make_plan(units=2, hooks={HOOK: 4})


def forks(name: str, root: object) -> object:
    command = [sys.executable, "-W", "error", "-m", "tests.support.forks", name, str(root)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_sigkill_at_every_point_of_the_commit(tmp_path: Path) -> None:
    points = forks("kill", tmp_path)
    assert isinstance(points, dict)
    assert set(points) == {
        "plan", "metadata", "token_digests", "tokens", "activations", "receipts", "manifest",
        "before the link", "after the link",
    }  # fmt: skip
    assert sum(points.values()) > 20


def test_a_writer_that_stops_and_goes_on_much_later_changes_nothing(tmp_path: Path) -> None:
    assert forks("stop", tmp_path) >= 5  # pyright: ignore[reportOperatorIssue]


def test_one_unit_on_eight_workers(tmp_path: Path) -> None:
    assert forks("eight", tmp_path) == 1


def test_two_harvests_on_one_root(tmp_path: Path) -> None:
    assert forks("two", tmp_path) == 1


def test_a_fork_after_the_store_was_opened(tmp_path: Path, s3_uri: str) -> None:
    assert forks("fork", tmp_path) == 0  # a local folder has no client
    assert forks("fork", s3_uri) == 7


# Disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A root on a file system of 128 KiB; skips where this user may not mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True, timeout=20, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs; the fake disk below stands in")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], timeout=20, check=True)


def test_a_disk_that_is_full_then_has_room_again(small_disk: Path) -> None:
    plan = make_plan(units=6, hooks={HOOK: 32})
    store = open_store(str(small_disk / "root"))
    with pytest.raises(StoreError, match=r"No space left on device.*Free some space"):
        write_dataset(store, plan)
    assert verify(store, "full") == []  # what is there is whole
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], timeout=20, check=True)
    assert write_dataset(store, plan) is not None
    assert verify(store, "full") == []


def test_a_fake_disk_full_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.writev, [0]

    def write(handle: int, views: list[memoryview]) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        half = max(1, len(views[0]) // 2)
        return real(handle, [views[0][:half]]) if left[0] == 0 else real(handle, views)

    monkeypatch.setattr(local_objects.os, "writev", write)
    digests = set[str]()
    for room in range(16):
        store = open_store(str(tmp_path / f"{room}"))
        left[0] = room
        with pytest.raises(StoreError, match="No space left"):
            write_dataset(store, PLAN)
        left[0] = 10**6
        manifest = write_dataset(store, PLAN)
        assert manifest is not None
        digests.add(manifest.dataset_sha256)
        assert verify(store, "full") == []
    assert len(digests) == 1


# Clocks


def test_only_provenance_sees_the_time_of_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = write_dataset(open_store(str(tmp_path / "true")), PLAN)
    jumps = iter(range(10**6))

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # noqa: ARG003
            return datetime(2031, 1, 1, tzinfo=UTC) - timedelta(hours=next(jumps))

    monkeypatch.setattr(clock, "datetime", Jumping)
    monkeypatch.setattr(time, "time", lambda: 4e9 - 3600 * next(jumps))
    store = open_store(str(tmp_path / "false"))
    store.probe()
    false = write_dataset(store, PLAN)
    assert true is not None
    assert false is not None
    assert false.created > true.created
    assert false.dataset_sha256 == true.dataset_sha256
    names = [key for key, _ in open_store(str(tmp_path / "true")).list("activations")]
    for key in (*names, "plan.json"):
        assert store.get(key) == open_store(str(tmp_path / "true")).get(key)
    assert verify(store, "full") == []


# Secrets


def test_a_canary_credential_appears_nowhere(
    tmp_path: Path, s3_environment: S3Server, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = s3_environment.secret_key.encode()
    assert len(canary) >= 16
    config = pipeline_config(tmp_path, units=1, root=s3_uri)
    records = Path("/tmp") / f"wn-{os.getpid()}"  # Ray's sockets need a short path
    command = [sys.executable, "-m", "winnow", "harvest", str(config), "--json"]
    environment = {**os.environ, "RAY_TMPDIR": str(records)}
    records.mkdir()
    try:
        result = subprocess.run(command, capture_output=True, env=environment, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        assert canary not in result.stdout + result.stderr
        files = [path for path in records.rglob("*") if path.is_file() and not path.is_symlink()]
        assert any("session" in str(path) for path in files), "Ray kept its records elsewhere"
        for path in files:
            assert canary not in path.read_bytes(), path
    finally:
        subprocess.run(["rm", "-rf", str(records)], check=True)
    store = open_store(s3_uri)
    keys = [key for key, _ in store.list()]
    assert len(keys) > 10
    for key in keys:
        assert canary not in store.get(key), key
    said: list[object] = [Config(root=s3_uri), StorageSpec(), repr(store)]
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps(store)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    try:
        open_store(s3_uri, StorageSpec(timeout_seconds=0.2)).get("plan.json")
    except WinnowError as error:
        said += [error, str(error), error.__cause__]
    assert canary not in pickle.dumps(said)
