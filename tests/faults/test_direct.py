"""Reads from the socket into place: a first try, which whatever goes wrong leaves to the client."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import numpy as np
import pytest

from schemas.config import StorageSpec
from schemas.errors import IntegrityError, MissingObject
from store import direct
from store.objects import S3Store, open_store
from tests.conftest import S3Server
from tests.faults.proxy import Call, HostileProxy

BODY = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def proxied(
    s3_environment: S3Server, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[S3Store, HostileProxy]]:
    """A store behind a proxy that is calm so far, with an object in it."""
    with HostileProxy(s3_environment.endpoint, lambda _: None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_store(s3_uri, StorageSpec(timeout_seconds=1))
        assert isinstance(store, S3Store)
        store.put_new("x", BODY)
        yield store, proxy


def read(store: S3Store, start: int = 1000, sizes: tuple[int, ...] = (100_000, 4, 100_000, 4)) -> bytes:
    """Some bytes in four buffers and two parts, each looked at when it is said to be filled."""
    buffers = [np.zeros(size, np.uint8) for size in sizes]
    done = start
    parts = buffers[:2], buffers[2:]
    for part, _ in zip(parts, store.read_into("x", start, parts), strict=True):
        for buffer in part:
            assert buffer.tobytes() == BODY[done : done + buffer.size]
            done += buffer.size
    return b"".join(buffer.tobytes() for buffer in buffers)


def test_one_request_and_one_connection(proxied: tuple[S3Store, HostileProxy]) -> None:
    store, proxy = proxied
    asked = list[Call]()
    proxy.rule = lambda call: asked.append(call)
    for _ in range(3):
        read(store)
    assert len(asked) == 3
    assert all("X-Amz-Signature" in call.path for call in asked)
    assert len(store._direct._idle) == 1


@pytest.mark.parametrize(
    "sizes", [(4, 100_000, 4, 100_000), (8192, 4, 8193, 4), (3, 5, 7, 150_000), (250_000, 1, 1, 40_000)]
)
def test_buffers_of_all_sizes(proxied: tuple[S3Store, HostileProxy], sizes: tuple[int, ...]) -> None:
    """What came along with the headers ends in any of them."""
    store, proxy = proxied
    asked = list[Call]()
    proxy.rule = lambda call: asked.append(call)
    for start in (0, 5000):
        assert len(read(store, start, sizes)) == sum(sizes)
    assert len(asked) == 2


@pytest.mark.parametrize("fault", ["503", "403", "reset", "cut", "stall", "drip"])
def test_what_goes_wrong_is_left_to_the_client(proxied: tuple[S3Store, HostileProxy], fault: str) -> None:
    store, proxy = proxied
    proxy.rule = lambda call: fault if call.method == "GET" and call.attempt == 1 else None
    assert len(read(store)) == 200_008
    assert proxy.spoilt[fault] == 1
    proxy.rule = lambda _: None
    assert len(read(store)) == 200_008
    assert not store._direct.off


def test_a_connection_that_the_server_closed_meanwhile(proxied: tuple[S3Store, HostileProxy]) -> None:
    store, _ = proxied
    read(store)
    (kept,) = store._direct._idle
    assert kept.sock is not None
    kept.sock.shutdown(2)
    assert len(read(store)) == 200_008
    assert store._direct._idle[0] is not kept


def test_errors_are_the_clients(proxied: tuple[S3Store, HostileProxy]) -> None:
    store, _ = proxied
    with pytest.raises(IntegrityError, match="too short"):
        read(store, start=len(BODY) - 1000)
    store.delete("x")
    with pytest.raises(MissingObject):
        read(store)


def test_behind_a_proxy_the_client_reads(
    proxied: tuple[S3Store, HostileProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, proxy = proxied
    monkeypatch.setattr(direct, "getproxies", lambda: {"http": "http://127.0.0.1:9"})
    monkeypatch.setattr(direct, "proxy_bypass", lambda _: False)
    asked = list[Call]()
    proxy.rule = lambda call: asked.append(call)
    read(store)
    assert store._direct.off
    assert not any("X-Amz-Signature" in call.path for call in asked)


def test_a_reader_who_leaves_in_the_middle(proxied: tuple[S3Store, HostileProxy]) -> None:
    """His connection has bytes of the reply in it: nobody else gets it."""
    store, _ = proxied
    buffers = [np.zeros(100_000, np.uint8) for _ in range(2)]
    reads = store.read_into("x", 0, [buffers[:1], buffers[1:]])
    next(reads)
    del reads
    gc.collect()
    assert len(store._direct._idle) == 0
    assert len(read(store)) == 200_008


def test_a_signed_url_is_in_no_log(
    proxied: tuple[S3Store, HostileProxy], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    store, proxy = proxied
    proxy.rule = lambda call: "cut" if call.method == "GET" and call.attempt == 1 else None
    with caplog.at_level(logging.DEBUG):
        read(store)
    said = caplog.text + "".join(capfd.readouterr()) + str(vars(store)) + str(vars(store._direct))
    assert "X-Amz" not in said
