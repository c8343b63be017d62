"""S3 servers that get things wrong in ways that were seen on real ones (`small_s3`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from harvester import planner
from harvester.testing import byte_subject
from harvester.windows import CorpusWindows
from schemas.base import validate
from schemas.config import Config, StorageSpec
from schemas.errors import StoreError
from store.layout import shard_key
from store.objects import open_store
from store.repair import repair
from store.s3_objects import S3Store
from store.testing import StoreConformance, flip_bit, make_plan, write_dataset
from store.verify import verify
from tests.conftest import only_aws
from tests.faults.small_s3 import SmallS3

pytestmark = pytest.mark.timeout(120)

Serve = Callable[..., tuple[SmallS3, S3Store]]
"""What it gets wrong -> the server, and an empty root on it."""


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
