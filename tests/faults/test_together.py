"""Several processes of one command at the same moment: files are whole, and work is done once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.explorer_site import SPEC, make_site
from winnow.common.shared_files import locked, write_whole
from winnow.explorer.index import build
from winnow.explorer.index.build import Indexer, open_index_store
from winnow.explorer.index.subjects import LazySubject
from winnow.explorer.index.table import INDEX_KEY
from winnow.sae.model import Sae
from winnow.store import ActivationStore
from winnow.store.objects import open_store

WRITERS = 4


def test_a_file_that_several_write_is_one_of_theirs_whole(tmp_path: Path) -> None:
    path, start = tmp_path / "new" / "graph.json", threading.Barrier(WRITERS)
    bodies = [str(number).encode() * (100_000 + number) for number in range(WRITERS)]

    def write(body: bytes) -> None:
        start.wait()
        for _ in range(50):
            write_whole(path, body)
            assert path.read_bytes() in bodies

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, bodies))
    assert list(path.parent.iterdir()) == [path]
    # As any other file of this user's: a cache may be shared, and `tempfile` lets nobody else read.
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "digest"
    write_whole(path, b"old")

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("digest", b"old")]


ADDS = (
    "import json, sys; from winnow.store.objects import open_store\n"
    "store = open_store(sys.argv[1]); print('ready', flush=True); sys.stdin.readline()\n"
    "for number in range(20):\n"
    "    mine = f'{sys.argv[2]}-{number}'\n"
    "    change = lambda old: json.dumps(sorted({*json.loads(old or '[]'), mine})).encode()\n"
    "    store.update('list.json', change)\n"
)


def test_updates_of_one_object_by_several_processes_are_all_kept(root_uri: str) -> None:
    # A result of one `winnow evaluate` was lost if another was stored between its read and its put.
    words = [sys.executable, "-c", ADDS, root_uri]
    processes = [
        subprocess.Popen([*words, str(each)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for each in range(WRITERS)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.communicate("go\n", timeout=200)
    assert [process.returncode for process in processes] == [0] * WRITERS
    expected = sorted(f"{each}-{number}" for each in range(WRITERS) for number in range(20))
    assert json.loads(open_store(root_uri).get("list.json")) == expected


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    holds = (
        "import sys; from pathlib import Path; from winnow.common.shared_files import locked\n"
        "with locked(Path(sys.argv[1]), print): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", holds, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        waited: list[bool] = []

        def waiting() -> None:
            waited.append(True)
            holder.kill()

        with locked(folder, waiting):
            assert waited == [True]
        with locked(folder, waiting):
            assert waited == [True]


def test_of_two_indexes_at_once_the_second_waits_and_shows_the_first(tmp_path: Path, monkeypatch) -> None:
    # Both had looked for a finished index before either began: the first to end removed the blocks of the
    # other, and the other deleted the parts of a finished index.
    site = make_site(tmp_path / "site")
    dataset = ActivationStore.open(site.root)

    def indexer() -> Indexer:
        store, scratch = open_index_store(str(tmp_path / "index"), None)
        subject = LazySubject(site.config.subject, dataset.plan.subject)
        spec = SPEC.model_copy(update={"logits": 0})
        sae = Sae.load(site.saes[0])
        return Indexer(dataset, site.root, sae, store, scratch, spec, {"": subject}, part_latents=16)

    begun, waits = threading.Event(), threading.Event()
    monkeypatch.setattr(build, "say", lambda line: waits.set() if "waiting for it" in line else None)
    made: list[tuple[str, int]] = []

    def hands(mine: Indexer, number: int):
        def make_all(step, todo, done):
            for each in todo:
                made.append((step, each))
                mine.make(step, each)
                begun.set()
                assert number or waits.wait(60), "the second did not wait"
                done()

        return make_all

    with ThreadPoolExecutor(2) as pool:
        first = indexer()
        running = pool.submit(first.run, make_all=hands(first, 0))
        assert begun.wait(60)
        second = indexer()
        found = pool.submit(second.run, make_all=hands(second, 1))
        assert found.result() == running.result()
    assert len(made) == len(set(made)) == first.units + first.parts
    assert json.loads((tmp_path / "index" / INDEX_KEY).read_bytes())
    assert not os.path.lexists(first.scratch)
