"""The stream over real storage: the order's rows, read once, by whoever owns them."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from winnow.schemas.errors import ConfigError
from winnow.store import ActivationStore
from winnow.store.format import order as order_module
from winnow.store.format.layout import slice_bytes
from winnow.store.format.shards import to_float32, to_stored
from winnow.store.objects import open_store
from winnow.store.read.assemble import RUN_BATCHES, RUNS_AHEAD
from winnow.store.read.groups import reading_threads
from winnow.store.read.stream import memory_bytes
from winnow.store.testing import make_plan, synthetic_rows, write_dataset
from winnow.trainer.step.widen import widened

HOOKS = {"resid_post.1": 8, "mlp_out.2": 4}
SEED = 11


@pytest.fixture(autouse=True)
def any_mixing(monkeypatch):
    """Tiny groups of tiny units mix badly; the arithmetic is the same."""
    monkeypatch.setattr(order_module, "LARGEST_DESIGN_EFFECT", float("inf"))


@pytest.fixture
def no_threads_left():
    yield
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("winnow-stream"):
            thread.join(10)
            assert not thread.is_alive(), thread.name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("dataset"))
    write_dataset(open_store(folder), make_plan(units=6, hooks=HOOKS))
    return folder


@pytest.fixture
def store(folder, no_threads_left):
    return ActivationStore.open(folder)


def all_rows(plan, hook):
    return np.concatenate([synthetic_rows(plan, unit, hook) for unit in range(plan.units)])


def test_on_every_backend(root_uri):
    plan = make_plan(units=4, hooks=HOOKS)
    write_dataset(open_store(root_uri), plan)
    store = ActivationStore.open(root_uri)
    whole = {hook: all_rows(plan, hook) for hook in HOOKS}
    with store.stream(list(HOOKS), batch_rows=64, seed=SEED, group_units=2, epochs=2) as stream:
        for number, batch in enumerate(stream):
            assert batch.step == number
            for hook, rows in batch.rows.items():
                assert np.array_equal(rows.numpy(), whole[hook][stream.order.rows_at(batch.step)])
        assert number + 1 == 2 * stream.order.steps_per_epoch


@pytest.mark.parametrize("group_units", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_ranks_together_yield_the_order(store, group_units, world):
    whole = {hook: all_rows(store.plan, hook) for hook in HOOKS}
    options = {"batch_rows": 48, "seed": SEED, "lanes": 16, "group_units": group_units, "epochs": 3}
    ranks = [store.stream(list(HOOKS), rank=rank, world=world, **options) for rank in range(world)]
    order, steps = ranks[0].order, 0
    for batches in zip(*ranks, strict=True):
        rows = order.rows_at(batches[0].step)
        for hook in HOOKS:
            found = torch.cat([batch.rows[hook] for batch in batches])
            assert found.dtype == torch.float32
            assert np.array_equal(found.numpy(), whole[hook][rows])
        weights = torch.cat([batch.weights for batch in batches])
        assert np.array_equal(weights.numpy(), store.weights(list(HOOKS), 0, store.rows)[rows])
        steps += 1
    assert steps == 3 * order.steps_per_epoch


def test_batches_are_the_consumers_own(tmp_path, no_threads_left):
    """A batch kept must not change when its group's buffers are used again, in any stored dtype."""
    for dtype in ("bfloat16", "float16", "float32", "int8"):
        root = str(tmp_path / dtype)
        plan = make_plan(units=5, dtype=dtype)
        write_dataset(open_store(root), plan)
        with ActivationStore.open(root).stream(
            "resid_post.1", batch_rows=64, seed=1, group_units=2, epochs=2
        ) as stream:
            kept = list(stream)
        whole = np.concatenate([synthetic_rows(plan, unit, "resid_post.1") for unit in range(5)])
        whole = to_float32(to_stored(whole, dtype), dtype)
        for batch in kept:
            assert np.array_equal(batch.rows["resid_post.1"].numpy(), whole[stream.order.rows_at(batch.step)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
def test_batches_in_the_stored_dtype(tmp_path, no_threads_left, dtype):
    write_dataset(open_store(str(tmp_path)), make_plan(units=5, dtype=dtype, hooks=HOOKS))
    store, options = ActivationStore.open(str(tmp_path)), {"batch_rows": 64, "seed": 1, "epochs": 1}
    with (
        store.stream(list(HOOKS), group_units=2, dtype="stored", **options) as stored,
        store.stream(list(HOOKS), group_units=2, dtype="packed", **options) as packed,
        store.stream(list(HOOKS), group_units=2, **options) as wide,
    ):
        assert (packed.memory_bytes < wide.memory_bytes) == (dtype != "float32")
        for one, raw, other in zip(stored, packed, wide, strict=True):
            for hook, rows in one.rows.items():
                assert rows.dtype == (torch.float32 if dtype == "int8" else getattr(torch, dtype))
                assert torch.equal(rows.float(), other.rows[hook])
                assert raw.rows[hook].dtype == getattr(torch, dtype)
                assert torch.equal(widened(raw.rows[hook]), other.rows[hook])
    with pytest.raises(ConfigError, match="dtype"):
        store.stream("mlp_out.2", dtype="float64", **options)


def test_bytes_are_counted_while_they_come(store):
    with store.stream("mlp_out.2", batch_rows=64, seed=0, group_units=2) as stream:
        next(stream)
        group = 2 * 64 * slice_bytes(store.plan, "mlp_out.2")
        assert group <= stream.bytes_read <= 2 * group


@pytest.mark.parametrize("group_units", [2, 16])
def test_resuming_anywhere_equals_skipping(store, group_units):
    options = {"batch_rows": 64, "seed": SEED, "group_units": group_units, "steps": 90}
    with store.stream("mlp_out.2", **options) as stream:
        through = [batch.rows["mlp_out.2"] for batch in stream]
        edges = [
            0,
            1,
            stream.order.steps_in(0) - 1,
            stream.order.steps_in(0),
            stream.order.steps_per_epoch,
            89,
            90,
        ]
    assert len(through) == 90
    for start in edges:
        with store.stream("mlp_out.2", start_step=start, **options) as stream:
            assert stream.state().step == start
            rest = [batch.rows["mlp_out.2"] for batch in stream]
            assert stream.state().step == 90
        assert len(rest) == 90 - start
        assert all(torch.equal(a, b) for a, b in zip(rest, through[start:], strict=True))


def test_elastic_resume_through_worlds(store):
    """Three changes of world size, at a group's edge, in a group and at an epoch's end."""
    options = {"batch_rows": 64, "seed": SEED, "group_units": 2}
    with store.stream("mlp_out.2", **options) as stream:
        order = stream.order
        stops = [order.steps_in(0), order.steps_in(0) + 3, order.steps_per_epoch, order.steps_per_epoch + 5]
        through = [next(stream).rows["mlp_out.2"] for _ in range(stops[-1])]
    done = []
    for world, stop in zip([4, 1, 8, 2], stops, strict=True):
        ranks = [
            store.stream("mlp_out.2", rank=rank, world=world, start_step=len(done), steps=stop, **options)
            for rank in range(world)
        ]
        done += [torch.cat([b.rows["mlp_out.2"] for b in batches]) for batches in zip(*ranks, strict=True)]
    assert len(done) == len(through)
    assert all(torch.equal(a, b) for a, b in zip(done, through, strict=True))


def test_a_rank_reads_only_its_own_bytes_and_a_single_group_once(store):
    plan = store.plan
    epoch_bytes = 5 * 64 * sum(slice_bytes(plan, hook) for hook in HOOKS)
    for group_units, epochs, times in [(2, 3, 3), (16, 3, 1)]:
        for world in (1, 4):
            with store.stream(
                list(HOOKS), batch_rows=64, seed=SEED, group_units=group_units, epochs=epochs, world=world
            ) as stream:
                for _ in stream:
                    pass
                assert stream.bytes_read == epoch_bytes * times // world
                assert stream.seconds_waiting > 0


def test_memory_is_counted(store):
    order = store.order(batch_rows=64, seed=0, group_units=2)
    with store.stream(list(HOOKS), batch_rows=64, seed=0, group_units=2) as stream:
        next(stream)
        rows, held = 2 * store.plan.rows_per_unit, stream._rows
        buffers = [held._current, held._coming.buffers]
        exact = sum(sum(a.nbytes for a in b.rows.values()) + b.weights.nbytes for b in buffers)
        assert exact == 2 * rows * (2 * 12 + 4)
        batches = (RUNS_AHEAD + 2) * RUN_BATCHES * 64 * 12 * 4
        whole = exact + rows * 2 * 8 + batches
        assert stream.memory_bytes == memory_bytes(store.plan, order, list(HOOKS)) == whole


def test_sixty_hooks_take_no_more_files_and_threads_than_one(tmp_path, no_threads_left):
    """Memory is what is stated, and a file is open only while a thread reads it."""
    hooks = {f"{site}.{layer}": 64 for layer in range(30) for site in ("mlp_in", "mlp_out")}
    write_dataset(open_store(str(tmp_path)), make_plan(units=5, hooks=hooks, dtype="int8"))
    dataset = ActivationStore.open(str(tmp_path))

    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    def most(some: list[str]) -> tuple[int, int]:
        before, found = held(), (0, 0)
        with dataset.stream(some, batch_rows=64, seed=SEED, group_units=2, epochs=2) as stream:
            for batch in stream:
                assert list(batch.rows) == some
                found = tuple(max(pair) for pair in zip(found, held(), strict=True))
        return tuple(now - then for now, then in zip(found, before, strict=True))

    most(list(hooks)[:1])  # what is imported and opened once
    files, threads = most(list(hooks))
    assert files <= reading_threads(dataset.store, 8) + 2
    assert threads <= most(list(hooks)[:1])[1] + 1
    tracemalloc.start()
    try:
        with dataset.stream(list(hooks), batch_rows=64, seed=SEED, group_units=2, epochs=2) as stream:
            for batch in stream:
                del batch
            stated = stream.memory_bytes
        assert tracemalloc.get_traced_memory()[1] < 1.2 * stated + 2**20
    finally:
        tracemalloc.stop()


def test_splits(store):
    size = store.plan.rows_per_unit
    for split, rows in [("train", (size, 6 * size)), ("validation", (0, size)), ("all", (0, 6 * size))]:
        with store.stream("mlp_out.2", split=split, batch_rows=64, seed=0, epochs=1) as stream:
            found = np.sort(np.concatenate([stream.order.rows_at(batch.step) for batch in stream]))
        assert np.array_equal(found, np.arange(*rows))
    with pytest.raises(ConfigError, match="split"):
        store.stream("mlp_out.2", split="test", batch_rows=64, seed=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hooks": ["resid_post.9"]}, "resid_post.1, mlp_out.2"),
        ({"hooks": []}, "hooks"),
        ({"hooks": ["mlp_out.2", "mlp_out.2"]}, "hooks"),
        ({"batch_rows": 65}, "batch_rows"),
        ({"batch_rows": 64 * 1000}, "batch_rows"),
        ({"lanes": 48}, "lanes"),
        ({"world": 3}, "world"),
        ({"rank": 1}, "rank"),
        ({"start_step": -1}, "step"),
        ({"prefetch": 0}, "prefetch"),
        ({"steps": 4, "epochs": 1}, "both"),
    ],
)
def test_what_cannot_be_is_refused_before_reading(store, change, named):
    with pytest.raises(ConfigError, match=named):
        store.stream(**{"hooks": ["mlp_out.2"], "batch_rows": 64, "seed": 0, **change})


def test_bad_mixing_is_refused(store, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="Set group_units to 5 or more"):
        store.stream("mlp_out.2", batch_rows=512, seed=0, group_units=1)


def test_closing_in_the_middle(store):
    stream = store.stream("mlp_out.2", batch_rows=64, seed=0, group_units=1)
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(ConfigError, match="closed"):
        next(stream)
    with store.stream("mlp_out.2", batch_rows=64, seed=0, steps=0) as stream:
        assert list(stream) == []


def test_a_stream_let_go_leaves_no_thread(store):
    stream = store.stream("mlp_out.2", batch_rows=64, seed=0, group_units=1)
    next(stream)
    del stream  # the fixture looks for its threads


def test_the_store_imports_no_torch():
    code = "import sys, winnow.store, winnow.store.read.stream; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_benchmark_runs(tmp_path, s3_environment):
    from benchmarks.store import main

    out = tmp_path / "out.json"
    sizes = {"units": 3, "group-units": 2, "windows-per-unit": 64, "commit-windows": 64, "context-length": 9}
    sizes |= {"d-model": 8, "batch-rows": 64, "rounds": 1, "open-units": 1200}
    arguments = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["store", "--json", str(out), *arguments])
        main()
    figures = json.loads(out.read_text())
    for key in ("local_stream_over_loop", "s3_stream_over_get", "commit_over_loop", "open_100k_units_s"):
        assert figures[key] > 0
    assert figures["order_peak_bytes"] < 2**20


def test_arrays_are_used_again_once_dropped(store):
    """A consumer who drops his batches gets the same few arrays; one who keeps them, fresh ones."""
    with store.stream("mlp_out.2", batch_rows=64, seed=0, group_units=2) as stream:
        dropped = {next(stream).rows["mlp_out.2"].data_ptr() for _ in range(60)}
        kept = [next(stream).rows["mlp_out.2"][3:5] for _ in range(60)]  # views count too
        assert len(dropped) <= RUN_BATCHES * (RUNS_AHEAD + 2)
        assert len({rows.data_ptr() for rows in kept}) == 60


@pytest.mark.parametrize("group_units", [2, 16])
def test_one_thread_reads_shuffles_and_assembles(store, monkeypatch, group_units):
    """As on a machine of one core: nothing waits for what only a second thread could do."""
    monkeypatch.setattr("winnow.store.read.groups.usable_cores", lambda: 1)
    whole = all_rows(store.plan, "mlp_out.2")
    with store.stream("mlp_out.2", batch_rows=64, seed=SEED, group_units=group_units, epochs=3) as stream:
        for batch in stream:
            assert np.array_equal(batch.rows["mlp_out.2"].numpy(), whole[stream.order.rows_at(batch.step)])
    names = {thread.name for thread in threading.enumerate()}
    assert not any(name.startswith("winnow-stream") for name in names)
    assert batch.step + 1 == 3 * stream.order.steps_per_epoch


def test_real_batches_mix_as_the_formula_says():
    from benchmarks.mixing import measure

    found = measure(units=6, group_units=2, windows_per_unit=64, context_length=33, batch_rows=64, epochs=3)
    assert 0.9 < found["measured_over_formula"] < 1.1
    assert found["buffer_over_formula"] > 0


@pytest.mark.parametrize("group_units", [2, 3, 16])
def test_elastic_resume_at_every_kind_of_edge(store, group_units):
    """Worlds 1, 2, 4 and 8, resumed three times in a row at step 0, group edges and epoch ends."""
    options = {"batch_rows": 64, "seed": SEED, "group_units": group_units}
    with store.stream("mlp_out.2", **options) as stream:
        order = stream.order
        epoch, edge = order.steps_per_epoch, order.steps_in(0)
        through = [next(stream).rows["mlp_out.2"] for _ in range(epoch + edge + 1)]
    stops = sorted({0, edge, epoch, epoch + edge})
    for worlds in ((1, 2, 4, 8), (8, 4, 2, 1), (2, 8, 1, 4)):
        done = []
        for world, stop in zip(worlds, [*stops[-3:], len(through)], strict=True):
            if world == worlds[0]:  # a run that is resumed before its first step
                for rank in range(world):
                    with store.stream("mlp_out.2", rank=rank, world=world, steps=0, **options) as stream:
                        assert list(stream) == []
            ranks = [
                store.stream("mlp_out.2", rank=rank, world=world, start_step=len(done), steps=stop, **options)
                for rank in range(world)
            ]
            done += [torch.cat([b.rows["mlp_out.2"] for b in step]) for step in zip(*ranks, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(done, through, strict=True))
