"""S3 servers that get things wrong in ways that were seen on real ones (`small_s3`)."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import only_aws
from tests.support.small_s3 import OLD_PAGE, SmallS3
from winnow.harvester.plan import planner
from winnow.harvester.plan.windows import CorpusWindows
from winnow.schemas.base import sha256_hex, validate
from winnow.schemas.config import Config, StorageSpec
from winnow.schemas.errors import IntegrityError, StoreError
from winnow.schemas.harvest import UnitReceipt
from winnow.store.check.repair import repair
from winnow.store.check.verify import verify
from winnow.store.format.layout import receipt_key, shard_key
from winnow.store.objects import keys, open_store
from winnow.store.objects.direct import REFUSALS
from winnow.store.objects.s3_store import S3Store
from winnow.store.records.commit import commit_receipt
from winnow.store.testing import (
    StoreConformance,
    flip_bit,
    make_attempt,
    make_plan,
    write_dataset,
    write_unit,
)
from winnow.subject.testing import byte_subject

pytestmark = pytest.mark.timeout(120)

BODY = np.random.default_rng(0).bytes(100_000)

Serve = Callable[..., tuple[SmallS3, S3Store]]
"""What it gets wrong -> the server, and an empty root on it."""


def flipped(body: bytes) -> bytes:
    """With one bit that is wrong, in the middle."""
    return body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    with ExitStack() as stack:

        def make(*wrong: str) -> tuple[SmallS3, S3Store]:
            server = stack.enter_context(SmallS3(*wrong))
            only_aws(monkeypatch, server.environment())
            store = open_store("s3://bucket/root")
            assert isinstance(store, S3Store)
            return server, store

        yield make


class TestSmall(StoreConformance):
    """The server that is told nothing is a good one."""

    test_list_is_complete = None  # it answers in one page, however many keys there are

    @pytest.fixture
    def store(self, serve: Serve) -> S3Store:
        return serve()[1]


# The probe


def test_a_server_that_looks_first_and_writes_later_is_refused(serve: Serve) -> None:
    """Two puts in turn cannot show it."""
    server, store = serve("window")
    assert store.put_new("x", b"1")
    assert not store.put_new("x", b"2")
    with pytest.raises(StoreError, match=r"under a race.*got 'created' for \d of them.*single_writer: true"):
        store.probe()
    assert list(server.objects) == ["root/x"]
    store.probe(single_writer=True)
    for _ in range(3):
        with pytest.raises(AssertionError, match="were told that they created"):
            StoreConformance().test_threads_create_once(store)
        for key in list(server.objects):
            del server.objects[key]


def test_what_a_probe_has_found_is_remembered(serve: Serve) -> None:
    server, store = serve()
    store.probe()
    asked = server.asked.total()
    store.probe()
    store.probe(single_writer=True)
    assert server.asked.total() == asked


@pytest.mark.parametrize("window", [False, True])
def test_a_refused_delete_hides_no_verdict(
    serve: Serve, caplog: pytest.LogCaptureFixture, window: bool
) -> None:
    server, store = serve("no_deletes", *(["window"] if window else []))
    if window:
        with pytest.raises(StoreError, match="under a race"):
            store.probe()
    else:
        store.probe()
    (said,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    left = next(iter(server.objects)).rpartition("/")[0]
    assert f"s3://bucket/{left}/ could not be removed" in said.getMessage()
    assert "AccessDenied" in said.getMessage()


def test_nothing_is_read_or_written_before_the_store_is_known(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the corpus, which may take hours, nor the plan, by the very put that is not known to work."""
    server, store = serve("window")
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {n} of it"}}\n' for n in range(400)))
    raw = {
        "root": store.uri,
        "subject": {"model": "testing/tokenizer-only"},
        "corpus": {"sources": [{"uri": f"{tmp_path}/a.jsonl"}]},
        "plan": {"hooks": ["resid_post.1"], "context_length": 16, "windows_per_unit": 64},
    }
    config = validate(Config, raw, origin="test")
    with monkeypatch.context() as patch:
        patch.setattr(CorpusWindows, "read", lambda _: pytest.fail("the corpus was read"))
        with pytest.raises(StoreError, match="under a race"):
            planner.make_plan(config, store, subject=byte_subject())
    assert not server.objects
    one = config.model_copy(update={"storage": StorageSpec(single_writer=True)})
    plan = planner.make_plan(one, open_store(store.uri, one.storage), subject=byte_subject())
    assert "root/plan.json" in server.objects
    assert plan.units


# Conditional overwrites


@pytest.mark.parametrize("wrong", [(), ("bare_etags",)])
def test_a_repair_ends_whichever_form_of_an_etag_the_server_knows(
    serve: Serve, wrong: tuple[str, ...]
) -> None:
    _, store = serve(*wrong)
    plan = make_plan(units=2)
    write_dataset(store, plan)
    flip_bit(store, shard_key("resid_post.1", 1), -30)
    assert repair(store).restored == [shard_key("resid_post.1", 1)]
    assert verify(store, "full") == []
    seen = store.version("plan.json")
    store.put("plan.json", b"another's")
    with pytest.raises(StoreError, match="changed while it was repaired"):
        store.replace("plan.json", b"ours", seen)
    assert store.get("plan.json") == b"another's"


def test_an_overwrite_whose_reply_is_lost_is_found(serve: Serve) -> None:
    server, store = serve()
    store.put("x", b"old")
    lost = iter([True])

    def spoil(key: str, body: bytes) -> bytes:
        if body == b"new" and next(lost, False):
            server.objects[key] = body
        return body

    server.spoil = spoil  # the first try took effect, the one that is answered comes after it
    store.replace("x", b"new", store.version("x"))
    assert store.get("x") == b"new"


# Bytes that break on their way


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("probed", [True, False])
def test_bytes_that_break_on_their_way_are_found_before_the_receipt(
    serve: Serve, caplog: pytest.LogCaptureFixture, opaque: bool, probed: bool
) -> None:
    """On a server that does not compare them: by the ETag in the put's reply, else read back."""
    server, store = serve("unchecked", *(["opaque"] if opaque else []))
    if probed:
        store.probe()
    plan = make_plan(units=3)
    write_dataset(store, plan, units=[0])
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1, "once for a client"
    assert ("read back" if opaque else "compared by its ETag") in said[0]
    assert not [key for key in server.objects if "probe-" in key]
    asked = server.asked["GET"]
    write_unit(store, plan, 1)
    assert server.asked["GET"] - asked == (2 if opaque else 0), "the shard and the receipt"

    server.spoil = lambda key, body: flipped(body) if "/c/2/0" in key else body
    with pytest.raises(IntegrityError, match="corrupted on its way"):
        write_unit(store, plan, 2)
    assert receipt_key(2) not in {key for key, _ in store.list()}
    with pytest.raises(IntegrityError, match="unit 2"):  # nor is it adopted by the next attempt
        write_unit(store, plan, 2)
    store.delete(shard_key("resid_post.1", 2))
    server.spoil = lambda _, body: body
    write_dataset(store, plan)
    assert verify(store, "full") == []


def test_other_objects_that_break_on_their_way_are_found_too(serve: Serve) -> None:
    server, store = serve("unchecked")
    store.probe()
    server.spoil = lambda _, body: flipped(body)
    plan = make_plan(units=2)
    receipt = UnitReceipt(
        plan_fingerprint=plan.fingerprint,
        unit=0,
        tokens_sha256=sha256_hex(b""),
        shards={},
        void="nothing",
        attempt=make_attempt(),
    )
    for act in (
        lambda: store.put("checkpoint", b"123"),
        lambda: store.replace("checkpoint", b"123", store.version("checkpoint")),
        lambda: commit_receipt(store, plan, receipt),
    ):
        with pytest.raises(IntegrityError, match="corrupted on its way"):
            act()


def test_a_server_that_compares_refuses_them_itself(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server, store = serve()
    store.probe()
    assert not caplog.records
    first = iter([True])
    server.spoil = lambda key, body: flipped(body) if "/c/" in key and next(first, False) else body
    plan = make_plan(units=2)
    write_dataset(store, plan)
    assert verify(store, "full") == []
    assert not store._direct.off, "one broken request says nothing of the server"


# What was learnt of a server


def read(store: S3Store) -> bytes:
    buffer = np.zeros(1000, np.uint8)
    list(store.read_into("x", 10, [[buffer]]))
    return buffer.tobytes()


def test_refused_urls_are_not_asked_for_ever(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server, store = serve("no_urls")
    store.put_new("x", BODY)
    with caplog.at_level(logging.INFO, "winnow.store"):
        for _ in range(10):
            assert read(store) == BODY[10:1010]
    assert server.asked["GET url"] == REFUSALS
    assert store._direct.off == {"GET": "403 AccessDenied"}
    assert [record.getMessage() for record in caplog.records if "403" in record.getMessage()] == [
        'direct reads from S3Store(bucket="bucket") are abandoned: 403 AccessDenied'
    ]


def test_refused_puts_are_not_tried_for_ever(serve: Serve) -> None:
    server, store = serve("no_digests")
    store.probe()
    before = server.asked["PUT"]
    for number in range(10):
        assert store.put_new(f"y/{number}", BODY, None, hashlib.sha256(BODY).hexdigest)
    assert server.asked["PUT"] - before == 10 + REFUSALS
    assert store._direct.off == {"PUT": "400 InvalidRequest"}


@pytest.mark.parametrize(
    ("method", "status", "code"),
    [("PUT", 400, "RequestTimeout"), ("PUT", 400, "InvalidRequest"), ("GET", 403, "AccessDenied")],
)
def test_one_refusal_turns_nothing_off(serve: Serve, method: str, status: int, code: str) -> None:
    server, store = serve()
    store.probe()
    store.put_new("x", BODY)
    spoilt = Counter[int]()
    for number in range(2 * REFUSALS):
        once = iter([(status, code)])
        server.answer = lambda asked, _, once=once: next(once, None) if asked == method else None
        if method == "PUT":
            assert store.put_new(f"y/{number}", BODY, None, hashlib.sha256(BODY).hexdigest)
        else:
            assert read(store) == BODY[10:1010]
        server.answer = lambda _, __: None
        assert store.put_new(f"z/{number}", BODY, None, hashlib.sha256(BODY).hexdigest)
        assert read(store) == BODY[10:1010]
        spoilt[number] += next(once, None) is None
    assert spoilt.total() == 2 * REFUSALS, "each was answered so"
    assert not store._direct.off


# Replies that are allowed, or that proxies make


@pytest.mark.parametrize("key", ["", "activations/", "receipts/"])
def test_folders_made_in_a_console_are_no_objects(serve: Serve, key: str) -> None:
    """They are empty objects whose key ends with a slash."""
    server, store = serve()
    server.objects[f"root/{key}"] = b""
    if not key:
        assert list(store.list()) == []
    write_dataset(store, make_plan(units=2))
    assert verify(store, "full") == []
    store.put_new("alone", b"")
    assert ("alone", 0) in store.list()


def test_keys_that_are_listed_as_in_urls_are_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut at the prefix's length they would be other keys, and every unit would seem to be missing."""
    server, _ = serve("encoded_keys")
    store = open_store("s3://bucket/date=2026-01-01")
    with pytest.raises(StoreError, match=r"'date%3D2026.*implements this part of S3"):
        store.probe()
    assert not server.objects


def test_a_listing_in_pages_that_nobody_asked_for_is_refused(serve: Serve) -> None:
    server, store = serve("old_pages")
    for number in range(OLD_PAGE):
        server.objects[f"root/many/{number:04d}"] = b"x"
    with pytest.raises(StoreError, match=r"no more than 1,000 objects.*implements this part of S3"):
        store.list("many")
    server.wrong.clear()
    assert len(list(store.list("many"))) == OLD_PAGE
    server.objects["root/many/last"] = b"x"
    assert len(list(store.list("many"))) == OLD_PAGE + 1


@pytest.mark.parametrize("page", [100, 250, 256, 500, 1000])
@pytest.mark.parametrize("beyond", [-1, 0, 1, 1300])
def test_a_listing_that_is_cut_without_a_word_is_read_on(serve: Serve, page: int, beyond: int) -> None:
    server, store = serve()
    server.silent_page = page
    for number in range(page + beyond):
        server.objects[f"root/many/{number:04d}"] = b"x"
    assert len(list(store.list("many"))) == page + beyond


def test_a_server_that_begins_again_has_listed_all(serve: Serve) -> None:
    server, store = serve("old_pages")
    for number in range(100):
        server.objects[f"root/many/{number:04d}"] = b"x"
    assert len(list(store.list("many"))) == 100


def test_a_listing_that_lags_behind_is_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    _, store = serve()
    monkeypatch.setattr(store, "list", lambda _: iter([]))
    with pytest.raises(StoreError, match="fails the store probe at listing"):
        store.probe()


def test_weak_etags_end_a_repair_too(serve: Serve) -> None:
    _, store = serve("weak_etags")
    write_dataset(store, make_plan(units=2))
    flip_bit(store, shard_key("resid_post.1", 1), -30)
    repair(store)
    assert verify(store, "full") == []


def test_a_server_without_if_match_is_repaired_without(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    server, store = serve("no_if_match")
    store.put("x", b"old")
    store.replace("x", b"new", store.version("x"))
    assert store.get("x") == b"new"
    assert not caplog.records, "it answers: it is not waited for"
    server.answer = lambda method, _: (412, "PreconditionFailed") if method == "PUT" else None
    with pytest.raises(StoreError, match="refuses If-Match with the object's own ETag"):
        store.replace("x", b"newer", store.version("x"))


@pytest.mark.parametrize("wrong", ["part_etags", "weak_etags"])
def test_an_etag_that_is_no_md5_accuses_nobody(serve: Serve, wrong: str) -> None:
    """Of small objects it is one, also on servers that store large ones in parts."""
    server, store = serve("unchecked", wrong)
    store.probe()
    assert store._server.etag_is_md5
    assert store.put_new("x", BODY, None, hashlib.sha256(BODY).hexdigest)
    store.put("y", BODY)
    server.spoil = lambda _, body: flipped(body)
    with pytest.raises(IntegrityError, match="corrupted on its way"):
        store.put("y", BODY)


def test_an_answer_before_the_body_is_read_counts(serve: Serve) -> None:
    """A server may refuse by the headers alone and hang up; the put of a shard that exists ends in words."""
    server, store = serve("early")
    body = BODY * 200
    assert store.put_new("x", body, None, hashlib.sha256(body).hexdigest)
    asked = server.asked["PUT"]
    assert not store.put_new("x", body, None, hashlib.sha256(body).hexdigest)
    assert server.asked["PUT"] == asked + 1
    assert not store._direct._idle


def test_after_an_interim_reply_a_connection_is_not_used_again(serve: Serve) -> None:
    """The reply that is still to come would be taken for the next request's."""
    _, store = serve("interim")
    store.probe()
    for number in range(3):
        store.put_new(f"x/{number}", BODY, None, hashlib.sha256(BODY).hexdigest)
        assert not store._direct._idle
        assert store.get(f"x/{number}") == BODY


def test_a_proxy_that_compresses_is_named(serve: Serve) -> None:
    _, store = serve("compressed")
    with pytest.raises(StoreError, match=r"Content-Encoding 'gzip'.*without a proxy"):
        store.probe()


# What to do about an error


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "RequestTimeTooSkewed", "was refused.*this machine's clock"),
        (400, "ExpiredToken", "was refused.*Renew the credentials"),
        (403, "AccessDenied", "was refused.*their rights on this bucket"),
        (403, "QuotaExceeded", "was refused.*Free space on the server"),
        (507, "XMinioStorageFull", "failed.*Free space on the server"),
        (301, "PermanentRedirect", "failed.*AWS_REGION"),
        (400, "AuthorizationHeaderMalformed", "failed.*AWS_REGION"),
        (501, "NotImplemented", "failed.*implements this part of S3"),
        (400, "InvalidRequest", "failed.*Check AWS_ENDPOINT_URL and the network"),
    ],
)
def test_each_refusal_says_what_to_do(
    serve: Serve, caplog: pytest.LogCaptureFixture, status: int, code: str, said: str
) -> None:
    """And nothing that lasts is waited for, although the client tries each 5xx again."""
    server, store = serve()
    store.put_new("c/403/0", b"1")
    server.answer = lambda _, __: (status, code)
    for act in (lambda: store.get("c/403/0"), lambda: store.put("c/403/0", b"2")):
        with pytest.raises(StoreError, match=said):
            act()
    assert not caplog.records


def test_a_unit_403_is_not_a_refusal(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serve()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"c/403/0 failed.*Check AWS_ENDPOINT_URL and the network"):
        open_store("s3://bucket/root").get("c/403/0")


def test_a_server_that_knows_no_if_none_match_is_refused_with_the_way_out(serve: Serve) -> None:
    server, store = serve()
    server.answer = lambda method, _: (501, "NotImplemented") if method == "PUT" else None
    with pytest.raises(StoreError, match=r"NotImplemented.*single_writer: true"):
        store.probe()


# Keys that are renewed


def test_a_session_that_expires_is_renewed_by_the_files_of_aws(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sign-in tool rewrites the file; keys are asked for again, and each put and read has the new ones."""
    server, _ = serve()
    endpoint = server.environment()["AWS_ENDPOINT_URL"]
    file = tmp_path / "credentials"

    def sign_in(token: str) -> None:
        lines = ("[default]", f"aws_access_key_id = key-{token}", "aws_secret_access_key = secret")
        file.write_text("\n".join([*lines, f"aws_session_token = {token}", ""]))

    only_aws(monkeypatch, {"AWS_ENDPOINT_URL": endpoint, "AWS_SHARED_CREDENTIALS_FILE": str(file)})
    monkeypatch.setattr(keys, "RENEW", timedelta(0))
    sign_in("first")
    server.tokens = "first".__eq__
    store = open_store("s3://bucket/root")
    plan = make_plan(units=3)
    write_dataset(store, plan, units=[0])
    server.tokens = "second".__eq__
    with pytest.raises(StoreError, match=r"ExpiredToken.*Renew the credentials.*run the same command again"):
        write_unit(store, plan, 1)
    file.write_text("[default")  # caught half-written: the keys stay as they were
    with pytest.raises(StoreError, match="ExpiredToken"):
        write_unit(store, plan, 1)
    sign_in("second")
    assert write_dataset(store, plan) is not None
    assert verify(store, "full") == []
    assert isinstance(store, S3Store)
    assert not store._direct.off


def test_a_roles_session_is_renewed_before_it_expires(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the process that a profile names; of each session the server takes the newest only."""
    server, _ = serve()
    issued = tmp_path / "issued"
    issued.write_text("")
    (tmp_path / "sign_in.py").write_text(ISSUE)
    (tmp_path / "config").write_text(
        f"[default]\ncredential_process = {sys.executable} -S {tmp_path}/sign_in.py {issued}\n"
    )
    endpoint = server.environment()["AWS_ENDPOINT_URL"]
    only_aws(monkeypatch, {"AWS_ENDPOINT_URL": endpoint, "AWS_CONFIG_FILE": str(tmp_path / "config")})
    monkeypatch.setattr(keys, "RENEW", timedelta(0))
    server.tokens = lambda token: token == f"token-{len(issued.read_text())}"
    store = open_store("s3://bucket/root")
    plan = make_plan(units=2)
    assert write_dataset(store, plan) is not None
    assert verify(store, "full") == []
    assert len(issued.read_text()) > 10, "renewed many times on the way"


# A session that ends so soon is renewed whenever botocore is asked for it.
ISSUE = """
import json, sys, time
with open(sys.argv[1], "a+") as issued:
    issued.write("x")
    issued.seek(0)
    number = len(issued.read())
end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 60))
print(json.dumps({"Version": 1, "AccessKeyId": f"key-{number}", "SecretAccessKey": "secret",
                  "SessionToken": f"token-{number}", "Expiration": end}))
"""
