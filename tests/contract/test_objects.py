"""Every backend passes the conformance suite; moto's server too, whichever server S3 tests use."""

from __future__ import annotations

import os
import pickle
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import botocore.session
import numpy as np
import pytest

from tests.conftest import S3Server, make_bucket, moto_server, only_aws
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError, StoreError
from winnow.store import ActivationStore
from winnow.store.check.verify import verify
from winnow.store.objects import ObjectStore, open_store
from winnow.store.objects.local import LocalStore
from winnow.store.objects.probe import RACERS
from winnow.store.objects.s3 import check_endpoint, s3_endpoint
from winnow.store.objects.s3_errors import describe_failure
from winnow.store.objects.s3_store import S3Store
from winnow.store.testing import FaultyStore, StoreConformance, make_plan, synthetic_rows, write_dataset


class TestLocal(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        return open_store(str(tmp_path / "root"))

    def test_uris(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for uri in ("a b", f"{tmp_path}/a b", f"file://{tmp_path}/a%20b", f"file://localhost{tmp_path}/a b"):
            assert open_store(uri).uri == str(tmp_path / "a b")
        with pytest.raises(ConfigError, match="another machine"):
            open_store("file://elsewhere/x")
        # what pathlib makes of `s3://bucket/x`: as a folder it would take the data without a word
        for lost in (Path("s3://bucket/x"), "s3:/bucket/x", "S3:/bucket", Path("file:///data"), "file:/data"):
            with pytest.raises(ConfigError, match="has one slash"):
                open_store(lost)
        assert open_store("./s3:/bucket/x").uri == str(tmp_path / "s3:/bucket/x")
        odd = (
            "date=1/a#b",
            "s3:",
            "file:x",
            "a?b",
            "[a]",
            "-a",
            "a::b",
            "ä",
            "~no-such-user",
            "a:b",
            "a\\b",
            "a\nb",
            "$HOME",
            "%",
        )
        for name in odd:
            for uri in (name, f"{tmp_path}/{name}", f"file://{tmp_path}/{name}"):
                assert open_store(uri).uri == str(tmp_path / name)
            open_store(name).put_new("x", name.encode())
            assert (tmp_path / name / "x").read_bytes() == name.encode()

    def test_leftovers_of_killed_processes(self, store: ObjectStore, tmp_path: Path) -> None:
        store.put_new("x", b"1")
        old, new = tmp_path / "root/.tmp/old", tmp_path / "root/.tmp/new"
        for path in (old, new):
            path.write_bytes(b"torn")
        os.utime(old, (1, 1))
        assert list(store.list()) == [("x", 1)]
        store.probe()
        assert (old.exists(), new.exists()) == (False, True)

    def test_no_temporary_file_stays(self, store: ObjectStore, tmp_path: Path) -> None:
        store.put_new("a/x", b"1")
        store.put_new("a/x", b"2")
        store.put("a/x", b"3")
        assert list((tmp_path / "root/.tmp").iterdir()) == []

    def test_full_disk(self, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        store.put_new("before", b"1")
        with monkeypatch.context() as patch:
            patch.setattr(os, "writev", full)
            with pytest.raises(StoreError, match=r"No space left.*Free some space"):
                store.put_new("a/x", bytes(100))
        assert store.size("a/x") is None
        assert list((tmp_path / "root/.tmp").iterdir()) == []

    def test_a_disk_that_fills_up_under_the_probe(self, store: ObjectStore, monkeypatch) -> None:
        real, written = os.writev, list[int]()

        def first_only(handle: int, views: list[memoryview]) -> int:
            if written:
                raise OSError(28, "No space left on device")
            written.append(real(handle, views))
            return written[0]

        monkeypatch.setattr(os, "writev", first_only)
        with pytest.raises(StoreError, match=r"No space left.*Free some space"):
            store.probe()
        assert list(store.list()) == []

    def test_a_file_in_the_way(self, store: ObjectStore) -> None:
        store.put_new("a", b"1")
        with pytest.raises(StoreError, match="a part of this path is a file"):
            store.put_new("a/b", b"2")
        assert store.size("a/b") is None
        # `/proc` answers every `mkdir` so, root included, which no permissions stop
        with pytest.raises(StoreError, match=r"writing .* failed: No such file.*that is a folder") as caught:
            open_store("/proc/winnow-absent").put_new("x", b"1")
        assert caught.value.exit_code == 2

    def test_free_bytes(self, store: ObjectStore) -> None:
        assert (store.free_bytes() or 0) > 0


class TestS3(StoreConformance):
    @pytest.fixture
    def store(self, s3_uri: str) -> ObjectStore:
        return open_store(s3_uri)

    def test_missing_bucket(self, s3_environment: S3Server) -> None:
        store = open_store(f"s3://winnow-absent-{secrets.token_hex(4)}/x")
        for call in (lambda: store.put_new("a", b"1"), lambda: store.get("a"), lambda: list(store.list())):
            with pytest.raises(StoreError, match="does not exist"):
                call()
        with pytest.raises(StoreError, match=r"bucket .* does not exist"):
            store.probe()

    def test_unreachable(self, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(StoreError, match="failed"):
            open_store(s3_uri).get("a")


@pytest.mark.parametrize("fault", ["lost_reply", "error_after"])
def test_a_slow_server_is_no_race(tmp_path: Path, fault: str) -> None:
    """Nobody is told that he created it; only two who are told so, or a body of two, are a fault."""
    store = FaultyStore(LocalStore(tmp_path / "slow"), dict.fromkeys(range(1, 1 + RACERS), fault))
    StoreConformance().test_threads_create_once(store)
    liar = Liar(tmp_path / "liar")
    liar.lie = "overwrites"
    with pytest.raises(AssertionError):
        StoreConformance().test_threads_create_once(liar)


@pytest.fixture(scope="module")
def moto() -> Iterator[S3Server]:
    yield from moto_server()


@pytest.fixture(scope="module")
def moto_bucket(moto: S3Server) -> str:
    return make_bucket(moto)


class TestMoto(StoreConformance):
    test_list_is_complete = None  # pages are shown on the server of TestS3; 1,100 puts take moto ten seconds

    @pytest.fixture
    def store(self, moto: S3Server, moto_bucket: str, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
        for name, value in moto.environment().items():
            monkeypatch.setenv(name, value)
        return open_store(f"s3://{moto_bucket}/{secrets.token_hex(8)}")


# Opening


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    only_aws(monkeypatch, {})
    return monkeypatch


def test_missing_credentials_are_said_without_asking_anybody(no_aws: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> None:
        pytest.fail("a metadata service that is not there would be waited for")

    no_aws.setattr(socket.socket, "connect", asked)
    with pytest.raises(StoreError, match=r"S3 credentials are missing.*AWS_ACCESS_KEY_ID"):
        open_store("s3://bucket/x")
    no_aws.setenv("AWS_ACCESS_KEY_ID", "key")
    with pytest.raises(StoreError, match="no AWS_SECRET_ACCESS_KEY"):
        open_store("s3://bucket/x")


@pytest.mark.parametrize(
    "uri",
    ["gs://bucket/x", "http://host/x", "memory://x", "s3://", "s3://ab/x", "s3://key:secret@bucket/x"],
)
def test_uris_that_are_refused(uri: str, no_aws: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(uri)
    assert "secret@" not in str(caught.value)


PREFIXES = (
    "date=2026-01-01/run",
    "a b+c/100%",
    "a%20b/%2E%2E",
    "ä/q?x=1#y",
    ".hidden/~!'()*&$@=;:,",
    "back\\slash",
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_whatever_s3_allows_is_a_prefix(s3_uri: str, prefix: str) -> None:
    """Written, listed, read by signed URL and signed put, verified; where another client finds it too."""
    store = open_store(f"{s3_uri}/{prefix}")
    assert isinstance(store, S3Store)
    store.probe()
    write_dataset(store, make_plan(units=2))
    assert verify(store, "full") == []
    assert not store._direct.off
    data = ActivationStore.open(store.uri)
    np.testing.assert_array_equal(
        data.read_rows("resid_post.1", 0, 64), synthetic_rows(data.plan, 0, "resid_post.1")[:64]
    )
    bucket, _, folder = store.uri.removeprefix("s3://").partition("/")
    client = botocore.session.get_session().create_client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    assert client.get_object(Bucket=bucket, Key=f"{folder}/plan.json")["Body"].read() == store.get(
        "plan.json"
    )
    client.close()


@pytest.mark.parametrize(
    ("prefix", "got"),
    [("../x", "'..'"), ("a/./b", "'.'"), ("a//b", "empty"), ("a\tb", "control"), ("ä" * 400, "800 bytes")],
)
def test_a_prefix_that_no_client_can_name_is_refused_for_its_true_reason(
    s3_environment: S3Server, prefix: str, got: str
) -> None:
    with pytest.raises(ConfigError, match=got):
        open_store(f"s3://bucket/{prefix}")


@pytest.mark.parametrize(
    ("endpoint", "allow", "plain"),
    [
        ("https://s3.example.com", False, False),
        ("http://127.0.0.1:9000", False, True),
        ("http://localhost:9000", False, True),
        ("http://[::1]:9000", False, True),
        ("http://10.0.0.1:9000", True, True),
    ],
)
def test_endpoints(endpoint: str, allow: bool, plain: bool) -> None:
    assert check_endpoint(endpoint, allow) is plain


@pytest.mark.parametrize(
    "endpoint",
    ["http://10.0.0.1:9000", "http://minio:9000", "http://127.0.0.1.example.com", "ftp://x", "host:9000"],
)
def test_endpoints_that_are_refused(endpoint: str, s3_environment: S3Server, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL"):
        open_store("s3://bucket/x", StorageSpec())


def test_endpoint_with_a_password_is_refused_without_quoting_it() -> None:
    with pytest.raises(ConfigError) as caught:
        check_endpoint("https://user:canary@host", False)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(("word", "permitted"), [("true", True), ("1", True), ("false", False), ("", False)])
def test_plain_http_is_permitted_by_the_environment_of_commands_without_a_config(
    monkeypatch, word, permitted
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    monkeypatch.setenv("AWS_ALLOW_HTTP", word)
    if permitted:
        assert s3_endpoint(False) == ("http://minio:9000", True)
    else:
        with pytest.raises(ConfigError, match="AWS_ALLOW_HTTP"):
            s3_endpoint(False)


# Profiles


@pytest.fixture
def profile(s3_uri: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A root whose keys, region and endpoint stand in AWS's files only; AWS_PROFILE names them."""
    (tmp_path / "config").write_text(
        f"[profile research]\nregion = {s3_server.region}\nservices = ours\n"
        f"[services ours]\ns3 =\n  endpoint_url = {s3_server.endpoint}\n"
    )
    (tmp_path / "credentials").write_text(
        f"[research]\naws_access_key_id = {s3_server.access_key}\n"
        f"aws_secret_access_key = {s3_server.secret_key}\n"
    )
    files = {"CONFIG_FILE": "config", "SHARED_CREDENTIALS_FILE": "credentials"}
    only_aws(monkeypatch, {f"AWS_{name}": str(tmp_path / file) for name, file in files.items()})
    monkeypatch.setenv("AWS_PROFILE", "research")
    return s3_uri


def test_a_profile_serves_a_root_as_it_serves_a_corpus(profile: str, s3_server: S3Server) -> None:
    store = open_store(profile)
    assert isinstance(store, S3Store)
    store.probe()
    write_dataset(store, make_plan(units=2))
    assert verify(store, "full") == []
    assert not store._direct.off, "puts are signed with the profile's keys, reads by URL"
    said = str(vars(store)) + repr(store) + str(vars(store._direct)) + repr(store._direct._keys)
    assert s3_server.secret_key not in said
    for what in (store, store._direct._keys):
        with pytest.raises(TypeError, match="never pickled"):
            pickle.dumps(what)


def test_a_profile_that_is_not_there_is_named(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(StoreError, match=r"\(absent\).*AWS_PROFILE"):
        open_store(profile)


def test_the_environments_keys_go_before_a_profile(
    profile: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with AWS's own clients."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    store = open_store(profile)
    assert isinstance(store, S3Store)
    assert store._direct._keys is not None
    given = store._direct._keys.given()
    assert given is not None
    assert given["access_key_id"] == "another-key"
    if s3_server.kind != "moto":  # which takes every key
        with pytest.raises(StoreError, match="Check the credentials"):
            store.put_new("x", b"1")


# Secrets


def test_a_refused_secret_is_not_repeated(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "canary-key")
    store = open_store(s3_uri)
    said = [repr(store), str(vars(store))]
    for call in (lambda: store.get("a"), lambda: store.put_new("a", b"1"), lambda: list(store.list())):
        try:
            call()
        except StoreError as error:
            said += [str(error), repr(error), str(error.__cause__)]
    assert "canary" not in " ".join(said)


def test_failures_are_told_without_signed_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "canary-token")
    body = (
        "Generic S3 error: 403: <Error><Code>SignatureDoesNotMatch</Code><Message>No canary-token</Message>"
        "<CanonicalRequest>x-amz-security-token:canary-token</CanonicalRequest></Error>"
    )
    assert describe_failure(ValueError(body)) == "SignatureDoesNotMatch: No ***"


# The probe: stores that lie


class Liar(LocalStore):
    """A local store that gets one thing wrong."""

    lie = ""

    def put_new(self, key, data, ready=None, digest=None):
        if self.lie == "overwrites":
            self.put(key, data)
            return True
        created = super().put_new(key, data, ready, digest)
        if self.lie == "replaces" and not created:
            self.put(key, data)
        return created

    def get(self, key, limit=1 << 31):
        return b"old" if self.lie == "stale" else super().get(key, limit)

    def get_ranges(self, key, starts, ends):
        if self.lie == "whole":
            return [super(Liar, self).get(key) for _ in starts]
        return super().get_ranges(key, starts, ends)

    def get_suffix(self, key, length):
        return self.get_range(key, 0, length) if self.lie == "prefix" else super().get_suffix(key, length)


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ("overwrites", "if-none-match.*single_writer: true"),
        ("replaces", "if-none-match"),
        ("stale", "read after write|if-none-match"),
        ("whole", "range read"),
        ("prefix", "suffix range"),
    ],
)
def test_probe_refuses_a_lying_store(lie: str, said: str, tmp_path: Path) -> None:
    store = Liar(tmp_path)
    store.lie = lie
    with pytest.raises(StoreError, match=said):
        store.probe()
    assert list(store.list()) == []


@pytest.mark.parametrize(
    "faults",
    [{1: "lost_reply"}, {2: "error_after"}, {2: "error_before"}, {1: "lost_reply", 3: "error_after"}],
)
def test_probe_goes_by_what_stands_where_a_reply_is_lost(faults: dict[int, str], tmp_path: Path) -> None:
    root = LocalStore(tmp_path)
    FaultyStore(root, faults).probe()
    assert list(root.list()) == []
    liar = Liar(tmp_path / "liar")
    liar.lie = "overwrites"
    with pytest.raises(StoreError, match="if-none-match"):
        FaultyStore(liar, faults).probe()


def test_single_writer_accepts_only_the_missing_precondition(tmp_path: Path) -> None:
    store = Liar(tmp_path)
    store.lie = "overwrites"
    store.probe(single_writer=True)
    with pytest.raises(StoreError, match="if-none-match"):
        store.probe()
    store = Liar(tmp_path)
    store.lie = "whole"
    with pytest.raises(StoreError, match="range read"):
        store.probe(single_writer=True)


def test_a_forked_child_may_not_use_the_client(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3_uri)
    assert isinstance(store, S3Store)
    monkeypatch.setattr(store, "_process", -1)
    with pytest.raises(StoreError, match="forked"):
        store.get("a")
