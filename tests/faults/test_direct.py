"""Reads and puts straight from and to the socket: a first try, which leaves what goes wrong to the client."""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from tests.conftest import S3Server
from tests.support.proxy import Call, HostileProxy
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import IntegrityError, MissingObject
from winnow.store.objects import Data, direct, open_store
from winnow.store.objects.s3_store import S3Store
from winnow.store.testing import make_plan, write_unit

BODY = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def proxied(
    s3_environment: S3Server, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[S3Store, HostileProxy]]:
    """A store behind a proxy that is calm so far, with an object in it."""
    with HostileProxy(s3_environment.endpoint, lambda _: None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = opened(s3_uri, 60)
        store.put_new("x", BODY)
        yield store, proxy


def opened(uri: str, timeout_seconds: float) -> S3Store:
    """A store that has learnt what else it would ask at its first shard."""
    store = open_store(uri, StorageSpec(timeout_seconds=timeout_seconds))
    assert isinstance(store, S3Store)
    store.probe(single_writer=True)
    return store


def suited(store: S3Store, fault: str) -> S3Store:
    """The store, or one whose time-out is soon over if the fault is one of waiting.

    Other tests count requests: a busy machine must not run into a time-out there.
    """
    return opened(store.uri, 1) if fault in ("stall", "drip", "slow") else store


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


@pytest.mark.parametrize("plain", [True, False])
def test_one_request_and_one_connection(
    proxied: tuple[S3Store, HostileProxy], monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    """Where the socket is not plain, as with TLS, buffer by buffer."""
    store, proxy = proxied
    monkeypatch.setattr(direct, "_plain", lambda _: plain)
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
    store, proxy = suited(proxied[0], fault), proxied[1]
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
    direct._close_all(store._direct._idle)
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


def test_a_signature_is_in_no_log(
    proxied: tuple[S3Store, HostileProxy], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    store, proxy = proxied
    proxy.rule = lambda call: {"GET": "cut", "PUT": "reset"}[call.method] if call.attempt == 1 else None
    with caplog.at_level(logging.DEBUG):
        read(store)
        put(store)
    said = caplog.text + "".join(capfd.readouterr()) + str(vars(store)) + str(vars(store._direct))
    assert "x-amz" not in said.lower()
    assert "AWS4-HMAC" not in said


# Puts


def put(store: S3Store, key: str = "y", body: bytes = BODY) -> bool:
    """Create an object in pieces, its digest known."""
    pieces = (memoryview(body)[:100_000], body[100_000:100_004], memoryview(body)[100_004:])
    return store.put_new(key, pieces, None, hashlib.sha256(body).hexdigest)


def test_a_put_is_one_request(proxied: tuple[S3Store, HostileProxy]) -> None:
    store, proxy = proxied
    asked = list[Call]()
    proxy.rule = lambda call: asked.append(call)
    assert put(store, "y")
    assert put(store, "z")
    assert not put(store, "y", BODY[::-1])
    assert [call.method for call in asked] == ["PUT"] * 3
    assert len(store._direct._idle) == 1
    assert store.get("y") == store.get("z") == BODY


@pytest.mark.parametrize("plain", [True, False])
def test_a_long_put_fills_the_sockets_buffer(
    proxied: tuple[S3Store, HostileProxy], monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    """As above: piece by piece."""
    store, proxy = proxied
    monkeypatch.setattr(direct, "_plain", lambda _: plain)
    body = BODY * 100
    asked = list[Call]()
    proxy.rule = lambda call: asked.append(call)
    assert put(store, "y", body)
    assert len(asked) == 1
    assert store.get("y") == body


@pytest.mark.parametrize("fault", ["503", "500", "409", "403", "reset", "flip sent"])
def test_a_put_that_fails_is_left_to_the_client(proxied: tuple[S3Store, HostileProxy], fault: str) -> None:
    store, proxy = proxied
    proxy.rule = lambda call: fault if call.method == "PUT" and call.attempt == 1 else None
    assert put(store)
    assert proxy.spoilt[fault] == 1
    assert store.get("y") == BODY
    proxy.rule = lambda _: None
    assert put(store, "z")


@pytest.mark.parametrize("fault", ["500 after", "lost reply", "slow"])
def test_a_put_whose_reply_is_lost_may_have_been_ours(
    proxied: tuple[S3Store, HostileProxy], fault: str
) -> None:
    store, proxy = suited(proxied[0], fault), proxied[1]
    proxy.rule = lambda call: fault if call.method == "PUT" and call.attempt == 1 else None
    assert not put(store), "the client finds what the first try put"
    assert store.get("y") == BODY
    assert "PUT" not in store._direct.off


def test_the_server_refuses_bytes_of_another_digest(proxied: tuple[S3Store, HostileProxy]) -> None:
    store, _ = proxied
    wrong = hashlib.sha256(BODY + b"x").hexdigest()
    assert store._direct.put(store._path("y"), [BODY], wrong).created is None
    assert store.size("y") is None


def test_what_only_the_client_can_sign_it_puts(
    proxied: tuple[S3Store, HostileProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that ask for other headers."""
    store, proxy = proxied
    monkeypatch.setenv("AWS_SSE_BUCKET_KEY_ENABLED", "true")
    other = open_store(store.uri)
    assert isinstance(other, S3Store)
    asked = list[Call]()
    proxy.rule = lambda call: asked.append(call)
    assert put(other)
    assert other._direct.off == {"PUT": "AWS_SSE_BUCKET_KEY_ENABLED asks for other headers"}
    assert [call.method for call in asked] == ["PUT"]


def test_a_shard_is_put_with_the_digest_of_its_receipt(
    proxied: tuple[S3Store, HostileProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, proxy = proxied
    plan = make_plan()
    given = list[str]()
    real = store._direct.put

    def noted(path: str, pieces: Sequence[Data], sha256: str) -> direct.FirstPut:
        given.append(sha256)
        return real(path, pieces, sha256)

    monkeypatch.setattr(store._direct, "put", noted)
    asked = list[Call]()
    proxy.rule = lambda call: asked.append(call)
    receipt = write_unit(store, plan, 0)
    assert given == [shard.sha256 for shard in receipt.shards.values()]
    puts = [call for call in asked if call.method == "PUT"]
    assert len(puts) == len(given) + 1, "each shard and the receipt, once"
