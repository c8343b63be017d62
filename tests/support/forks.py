"""What the fault tests run in processes of their own: `python -m tests.support.forks NAME ROOT`.

Nothing here has threads before it forks, so that a child is a process like any other.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable

import numpy as np

from winnow.schemas.errors import PlanMismatch, StoreError
from winnow.schemas.harvest import HarvestPlan
from winnow.store.check.verify import verify
from winnow.store.objects import ObjectStore, open_store
from winnow.store.objects import local as local_objects
from winnow.store.testing import FaultyStore, make_plan, synthetic_rows, write_dataset, write_plan, write_unit

HOOK = "resid_post.1"
PLAN = make_plan(units=2, hooks={HOOK: 4})


def child(act: Callable[[], object]) -> int:
    """Fork; the child acts and ends with 0, or with 1 and a traceback."""
    number = os.fork()
    if number:
        return number
    try:
        act()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(number: int) -> int:
    """The exit status of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


class Deadly(FaultyStore):
    """Sends itself a signal at the n-th call, before or after it takes effect."""

    def __init__(self, inner: ObjectStore, number: int, after: bool, sign: signal.Signals) -> None:
        super().__init__(inner)
        self.number, self.after, self.sign = number, after, sign
        self._struck = False

    def _strike(self, after: bool) -> None:
        # At least, and once: metadata is put by several threads, which may count past the number together.
        if len(self.calls) >= self.number and after == self.after and not self._struck:
            self._struck = True
            os.kill(os.getpid(), self.sign)

    def _before(self, name: str, key: str) -> str | None:
        fault = super()._before(name, key)
        self._strike(False)
        return fault

    def _after(self, fault: str | None, name: str, key: str) -> None:
        self._strike(True)
        super()._after(fault, name, key)


def label(key: str) -> str:
    """What a key is part of: the labelled points of the commit."""
    name = key.split("/")[0]
    return "metadata" if key.endswith("zarr.json") else name.split(".")[0]


def whole(store: ObjectStore) -> str:
    manifest = write_dataset(store, PLAN)
    assert manifest is not None
    assert verify(store, "full") == []
    return manifest.dataset_sha256


def kill(root: str) -> object:
    """SIGKILL before and after every put of a dataset's making; run again; the same dataset."""
    counting = FaultyStore(open_store(f"{root}/reference"))
    reading = child(lambda: None)
    assert ended(reading) == 0
    manifest = write_dataset(counting, PLAN)
    assert manifest is not None
    struck: Counter[str] = Counter()
    puts = [(n, key) for n, (name, key) in enumerate(counting.calls, 1) if name == "put_new"]
    for number, key in puts:
        for after in (False, True):
            store = open_store(f"{root}/{number}-{after}")
            died = ended(
                child(lambda s=store, n=number, a=after: write_dataset(Deadly(s, n, a, signal.SIGKILL), PLAN))
            )
            assert died == -signal.SIGKILL, (number, key, died)
            assert ended(child(lambda s=store: _same(s, manifest.dataset_sha256))) == 0
            struck[label(key)] += 1
    for point in ("before the link", "after the link"):
        store = open_store(f"{root}/{point.replace(' ', '-')}")

        def die(p: str = point, s: ObjectStore = store) -> None:
            link, calls = os.link, [0]

            def deadly(*paths: str) -> None:
                calls[0] += 1
                if p == "after the link":
                    link(*paths)
                if calls[0] == len(puts) - 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                if p != "after the link":
                    link(*paths)

            local_objects.os.link = deadly
            write_dataset(s, PLAN)

        assert ended(child(die)) == -signal.SIGKILL
        assert ended(child(lambda s=store: _same(s, manifest.dataset_sha256))) == 0
        struck[point] += 1
    return struck


def _same(store: ObjectStore, digest: str) -> None:
    assert whole(store) == digest


def stop(root: str) -> object:
    """A writer stops before a put, another does everything, the first goes on: nothing changes."""
    counting = FaultyStore(open_store(f"{root}/reference"))
    write_dataset(counting, PLAN)
    stopped = 0
    for number, (name, _) in enumerate(counting.calls, 1):
        if name != "put_new" or number % 2:
            continue
        store = open_store(f"{root}/{number}")
        late = child(lambda s=store, n=number: write_dataset(Deadly(s, n, False, signal.SIGSTOP), PLAN))
        assert os.WIFSTOPPED(os.waitpid(late, os.WUNTRACED)[1])
        assert ended(child(lambda s=store: whole(s))) == 0
        before = {key: store.get(key) for key, _ in store.list()}
        os.kill(late, signal.SIGCONT)
        assert ended(late) == 0
        assert {key: store.get(key) for key, _ in store.list()} == before
        stopped += 1
    return stopped


def eight(root: str) -> object:
    """One unit on eight workers at once, each with its own float noise: one receipt, and it is true."""
    write_plan(open_store(root), PLAN)
    ready, go = os.pipe()

    def work(number: int) -> None:
        os.close(go)
        os.read(ready, 1)  # all begin when the parent closes its end
        scale = np.float32(1 + number / 1000)

        def noisy(plan: HarvestPlan, unit: int, hook: str) -> np.ndarray:
            return synthetic_rows(plan, unit, hook) * scale

        write_unit(open_store(root), PLAN, 0, noisy)

    workers = [child(lambda n=number: work(n)) for number in range(8)]
    os.close(go)
    assert [ended(worker) for worker in workers] == [0] * 8
    assert verify(open_store(root), "full") == []
    return len(list(open_store(root).list("receipts")))


def two(root: str) -> object:
    """Two harvests on one root: equal plans join, different ones are refused, whatever the race."""
    digests = set[str]()
    for turn in range(4):
        store = open_store(f"{root}/equal-{turn}")
        pair = [child(lambda s=store: whole(s)) for _ in range(2)]
        assert [ended(number) for number in pair] == [0, 0]
        assert verify(store, "full") == []
        digests.add(json.loads(store.get("manifest.json"))["dataset_sha256"])
    assert len(digests) == 1
    other = make_plan(units=2, hooks={HOOK: 4}, seed=1)

    def refused(plan: HarvestPlan, store: ObjectStore) -> None:
        try:
            write_dataset(store, plan)
        except PlanMismatch:
            os._exit(7)

    for turn in range(4):
        store = open_store(f"{root}/different-{turn}")
        pair = [child(lambda p=plan, s=store: refused(p, s)) for plan in (PLAN, other)]
        assert sorted(ended(number) for number in pair) == [0, 7]
        assert verify(store, "full") == []
    return len(digests)


def fork(root: str) -> object:
    """A client that was opened before a fork refuses in the child and works on in the parent."""
    store = open_store(root)
    store.put("a", b"1")

    def use() -> None:
        try:
            store.get("a")
        except StoreError as error:
            os._exit(7 if "forked" in str(error) else 8)

    status = ended(child(use))
    assert store.get("a") == b"1"
    return status


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](sys.argv[2])))
