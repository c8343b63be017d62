"""S3 servers that get things wrong in ways that were seen on real ones (`small_s3`)."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import only_aws
from tests.support.small_s3 import SmallS3
from winnow.harvester.plan import planner
from winnow.harvester.plan.windows import CorpusWindows
from winnow.schemas.base import sha256_hex, validate
from winnow.schemas.config import Config, StorageSpec
from winnow.schemas.errors import IntegrityError, StoreError
from winnow.schemas.harvest import UnitReceipt
from winnow.store.check.repair import repair
from winnow.store.check.verify import verify
from winnow.store.format.layout import receipt_key, shard_key
from winnow.store.objects import open_store
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
