"""Processes that write and remove in one local folder at the same moment: no folder is an object."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from winnow.store.objects.local import LocalStore

WORKERS = 4


def together(work: Callable[[int], None]) -> None:
    """Run `work` in `WORKERS` threads that start at the same moment; raises what any of them raises."""
    start = threading.Barrier(WORKERS)

    def one(number: int) -> None:
        start.wait()
        work(number)

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(one, range(WORKERS)))


def test_probes_of_one_new_root_remove_no_folder_that_another_uses(tmp_path: Path) -> None:
    # As the ranks of a mesh do whose run folder is new: one probe's clean-up took the other's folder away.
    for number in range(20):
        root = tmp_path / str(number) / "run"

        def probe(_: int, root: Path = root) -> None:
            for _ in range(3):
                LocalStore(root).probe()

        together(probe)
        assert not list(LocalStore(root).list())


def test_puts_find_a_folder_although_deletes_remove_it(tmp_path: Path) -> None:
    def churn(worker: int) -> None:
        store = LocalStore(tmp_path)
        for turn in range(200):
            new, replaced = (f"shared/{turn % 5}/{worker}-{kind}" for kind in ("new", "replaced"))
            assert store.put_new(new, b"new")
            store.put(replaced, b"replaced")
            assert (store.get(new), store.get(replaced)) == (b"new", b"replaced")
            listed = dict(store.list("shared"))
            assert (listed[new], listed[replaced]) == (3, 8)
            store.delete(new)
            store.delete(replaced)

    together(churn)
    assert not list(LocalStore(tmp_path).list())
