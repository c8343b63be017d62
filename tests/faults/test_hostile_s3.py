"""A hostile network in front of S3: everything survives, or ends in one clear sentence; nothing is lost."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from tests.conftest import S3Server, make_bucket, moto_server
from tests.support.proxy import Call, HostileProxy, Rule
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import StoreError
from winnow.store import ActivationStore
from winnow.store.check.verify import verify
from winnow.store.format.layout import receipt_key, shard_key
from winnow.store.objects import ObjectStore, open_store, s3_store
from winnow.store.objects.s3_store import S3Store
from winnow.store.testing import make_plan, synthetic_rows, write_dataset

HOOK = "resid_post.1"
PLAN = make_plan(units=2, hooks={HOOK: 4})
PATIENT = StorageSpec(timeout_seconds=30)
HASTY = StorageSpec(timeout_seconds=1)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    manifest = write_dataset(open_store(str(tmp_path_factory.mktemp("reference"))), PLAN)
    assert manifest is not None
    return manifest.dataset_sha256


@pytest.fixture
def hostile(s3_environment: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch):
    """(rule, storage) -> context of (store through the proxy, the same root without it, the proxy)."""

    @contextmanager
    def make(
        rule: Rule, storage: StorageSpec = PATIENT, **options: float
    ) -> Iterator[tuple[ObjectStore, ObjectStore, HostileProxy]]:
        uri = f"s3://{s3_bucket}/{secrets.token_hex(8)}"
        direct = open_store(uri)
        with HostileProxy(s3_environment.endpoint, rule, **options) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            yield open_store(uri, storage), direct, proxy

    return make


def calm(_: Call) -> None:
    """No fault."""


def read_whole(store: ObjectStore) -> None:
    """Every row, by both ways of reading, against what was written."""
    data = ActivationStore.over(store)
    rows = PLAN.rows_per_unit
    for unit in range(PLAN.units):
        found = data.read_rows(HOOK, unit * rows, (unit + 1) * rows)
        np.testing.assert_array_equal(found, synthetic_rows(PLAN, unit, HOOK))


def whole(store: ObjectStore) -> str:
    """Commit, read and verify everything; the dataset's digest."""
    manifest = write_dataset(store, PLAN)
    assert manifest is not None
    read_whole(store)
    assert verify(store, "full") == []
    return manifest.dataset_sha256


def some(share: float, fault: str, seed: int = 0) -> Rule:
    draw = random.Random(seed)
    return lambda _: fault if draw.random() < share else None


def puts(fault: str, part: str = "", attempts: int = 1) -> Rule:
    """The first attempts of every PUT below `part`."""
    return lambda call: (
        fault if call.method == "PUT" and part in call.path and call.attempt <= attempts else None
    )


SURVIVED: dict[str, Rule] = {
    "a 503 storm": lambda call: "503" if call.attempt <= 2 and call.number <= 40 else None,
    "20 % 500s": some(0.2, "500"),
    "20 % 500s after the request took effect": some(0.2, "500 after"),
    "10 % connection resets": some(0.1, "reset"),
    "every put's reply is lost": puts("lost reply"),
    "every put is answered 500 after it took effect": puts("500 after"),
    "a 409 for every put": puts("409"),
    "a 409 for every put, again and again": puts("409", attempts=2),
}


@pytest.mark.parametrize("weather", SURVIVED)
def test_commit_read_and_verify_survive(hostile, reference: str, weather: str) -> None:
    with hostile(SURVIVED[weather]) as (store, direct, proxy):
        assert whole(store) == reference
        assert proxy.spoilt
        assert verify(direct, "full") == []


def test_a_reply_that_takes_longer_than_the_time_out(hostile, reference: str) -> None:
    """The put takes effect, the client gives up and asks again: it finds its own receipt."""
    with hostile(puts("slow", "receipts"), HASTY, slow_seconds=2.0) as (store, direct, proxy):
        assert whole(store) == reference
        assert proxy.spoilt["slow"] == PLAN.units
        assert verify(direct, "full") == []


def test_two_seconds_of_latency_only_cost_time(hostile) -> None:
    with hostile(lambda call: "slow" if call.number % 9 == 1 else None) as (store, _, proxy):
        write_dataset(store, make_plan(units=1 + 1, hooks={HOOK: 4}), units=[0])
        assert proxy.spoilt["slow"] >= 2
        assert store.size(receipt_key(0))


OUTAGES: dict[str, Rule] = {
    "503 for ever": lambda _: "503",
    "resets for ever": lambda _: "reset",
    "slower than the time-out for ever": lambda _: "slow",
}


@pytest.mark.parametrize("outage", OUTAGES)
def test_an_outage_is_one_sentence_and_loses_nothing(hostile, reference: str, outage: str) -> None:
    with hostile(calm) as (store, direct, proxy):
        write_dataset(store, PLAN, units=[0])
        hasty = open_store(store.uri, HASTY)
        proxy.rule, proxy.slow_seconds = OUTAGES[outage], 30
        for act in (
            lambda: hasty.put_new("x", b"1"),
            lambda: hasty.get(receipt_key(0)),
            lambda: hasty.get_range(shard_key(HOOK, 0), 0, 100),
        ):
            with pytest.raises(StoreError) as caught:
                act()
            text = str(caught.value)
            assert text.count("\n") == 0
            assert store.uri in text
            assert "Check AWS_ENDPOINT_URL and the network" in text
        proxy.rule = calm
        direct.delete("x")
        assert whole(direct) == reference


TRIES = 7
"""obstore's, of one request, before it gives up."""


class Away:
    """A rule: the server is away for so many requests."""

    def __init__(self, requests: int, fault: str = "reset") -> None:
        self.left, self.fault = requests, fault

    def __call__(self, _: Call) -> str | None:
        self.left -= 1
        return self.fault if self.left >= 0 else None


def test_a_server_that_is_restarted_is_waited_for(
    hostile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(s3_store, "_PAUSE_SECONDS", 0.01)
    with hostile(calm) as (store, _, proxy):
        assert store.put_new("a", b"1")
        # A reset after a create-only put was sent is for the commit to settle: it is not tried again here.
        for fault, act, answer in (
            ("503", lambda: store.put_new("b", b"2"), True),
            ("reset", lambda: store.get("b"), b"2"),
            ("reset", lambda: list(store.list()), [("a", 1), ("b", 1)]),
        ):
            proxy.rule = Away(TRIES + 2, fault)
            caplog.clear()
            assert act() == answer
            assert caplog.text.count("does not answer, waiting up to 90 s") == 1
            assert proxy.rule.left < 0


def test_a_server_that_stays_away_ends_in_a_sentence_and_one_that_never_answered_at_once(hostile) -> None:
    with hostile(calm, HASTY) as (store, direct, proxy):
        assert store.put_new("a", b"1")
        proxy.rule = Away(10**6)
        with pytest.raises(StoreError, match="Check AWS_ENDPOINT_URL and the network"):
            store.get("a")
        assert proxy.spoilt["reset"] > TRIES
        for again in (store, open_store(store.uri, PATIENT)):
            proxy.spoilt.clear()
            with pytest.raises(StoreError, match="Check AWS_ENDPOINT_URL and the network"):
                again.get("a")
            assert proxy.spoilt["reset"] == TRIES
        assert direct.get("a") == b"1"


def test_a_clock_that_the_server_does_not_believe_is_named(hostile) -> None:
    with hostile(lambda _: "403") as (store, _, _), pytest.raises(StoreError, match="RequestTimeTooSkewed"):
        store.put_new("x", b"1")


BODIES: dict[str, Callable[[Call], str | None]] = {
    fault: lambda call, fault=fault: (
        fault if call.method == "GET" and "/c/1/0" in call.path and call.attempt == 1 else None
    )
    for fault in ("drip", "stall", "cut", "flip")
}


@pytest.mark.parametrize("fault", BODIES)
def test_a_body_that_goes_wrong_on_its_way(hostile, fault: str) -> None:
    """Survives, or fails in one sentence and reads well the next time; wrong rows never come."""
    with hostile(calm) as (store, _, proxy):
        write_dataset(store, PLAN)
        hasty = open_store(store.uri, HASTY)
        proxy.rule = BODIES[fault]
        failure = ""
        try:
            read_whole(hasty)
        except StoreError as error:
            failure = str(error)
        assert failure.count("\n") == 0
        assert not (failure and fault == "flip"), "a slice that fails its check is fetched again"
        proxy.rule = calm
        read_whole(hasty)
        assert proxy.spoilt[fault]


def test_one_kibibyte_a_second_is_slow_but_right(hostile) -> None:
    with hostile(calm, drip_bytes=1024) as (store, _, proxy):
        write_dataset(store, PLAN)
        proxy.rule = lambda call: "drip" if call.method == "GET" and "plan.json" in call.path else None
        read_whole(store)
        assert proxy.spoilt["drip"] == 1


def test_a_store_that_drops_the_precondition(monkeypatch: pytest.MonkeyPatch, reference: str) -> None:
    """Moto does not mind that the header was signed. The probe refuses; a single writer works."""
    for server in moto_server():
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        bucket = make_bucket(server)
        with HostileProxy(server.endpoint, puts("no precondition", attempts=1000)) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            store = open_store(f"s3://{bucket}/x")
            with pytest.raises(StoreError, match=r"if-none-match.*got success.*single_writer"):
                store.probe()
            assert list(store.list()) == []
            single = open_store(f"s3://{bucket}/x", StorageSpec(single_writer=True))
            assert isinstance(single, S3Store)
            single.probe(single_writer=True)
            assert single.put_new("a", b"first")
            assert not single.put_new("a", b"second")
            assert single.get("a") == b"first"
            single.delete("a")
            assert whole(single) == reference
            assert whole(single) == reference
