"""Windows in a pass: measured once for a root, halved where memory runs out, one shape for a unit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.pipeline import pipeline_config
from winnow.common.config_file import load_config
from winnow.common.memory import out_of_memory
from winnow.harvester.run import batching
from winnow.harvester.run.batching import choose_batch, kind_of, smallest_best
from winnow.harvester.run.driver import ensure_plan
from winnow.harvester.run.worker import UnitWorker
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError, NonFiniteError, WorkerError
from winnow.store import ActivationStore
from winnow.store.check.verify import verify
from winnow.store.format.layout import batch_key
from winnow.store.objects import ObjectStore, open_store
from winnow.store.read.reader import load_plan
from winnow.store.write.writer import seal
from winnow.subject import Subject
from winnow.trainer.run.loop import train

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
CPU = batch_key(kind_of(torch.device("cpu"), 1))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_config(tmp_path_factory.mktemp("base"), units=2, harvest={"batch_windows": "auto"})


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Config:
    config = load_config(base, [f"root={tmp_path / 'data'}"])
    ensure_plan(config, open_store(config.root))
    return config


def worker(config: Config, batch: Any = "auto") -> UnitWorker:
    assert config.subject is not None
    plan = load_plan(open_store(config.root))
    return UnitWorker(plan.to_json(), config.root, config.storage, config.subject, 1, batch)


@pytest.mark.parametrize("planned", [14, 18])
def test_rows_of_another_width_than_planned_are_refused_before_a_byte_is_written(
    config: Config, planned: int
) -> None:
    """NumPy cuts and pads items of other sizes without a word: a row of 16 numbers became one of 14 or 18."""
    store = open_store(config.root)
    plan = load_plan(store)
    sites = (plan.sites[0], plan.sites[1].model_copy(update={"d_model": planned}))
    other, before = plan.model_copy(update={"sites": sites}), list(store.list())
    assert config.subject is not None
    at_work = UnitWorker(other.to_json(), config.root, config.storage, config.subject, 1, 16)
    words = rf"hook 'mlp_out.0'.*another width: expected D = {planned}, as planned, got D = 16"
    with pytest.raises(ConfigError, match=words):
        at_work.ready()
    # a width that changes after loading, which no model is known to do: the subject is handed in
    at_work.__dict__["_subject"] = Subject.load(config.subject, until=plan.spec.hooks)
    for call in (at_work.run, at_work.make):
        with pytest.raises(ConfigError, match=words):
            call(0)
    assert list(store.list()) == before


def test_a_unit_in_int8(base: Path, tmp_path: Path) -> None:
    """From the subject to the batches: the rows are the subject's to half a scale, and every check passes."""
    root = str(tmp_path / "data")
    config = load_config(base, [f"root={root}", f"train.out={tmp_path / 'run'}", "plan.dtype=int8"])
    store = open_store(root)
    plan = ensure_plan(config, store)
    at_work = worker(config, 16)
    for unit in range(plan.units):
        at_work.run(unit)
    seal(store, plan)
    assert verify(store, "full") == []
    opened = ActivationStore.open(root)
    windows, positions = opened.locate(np.arange(plan.rows_per_unit))
    assert config.subject is not None
    found = Subject.load(config.subject).activations(opened.unit_tokens(0), opened.hooks)
    for hook, values in found.items():
        wanted = values.float().numpy()[windows, positions]
        scale = np.abs(wanted).max(axis=1, keepdims=True) / 127
        assert (np.abs(opened.read_rows(hook, 0, plan.rows_per_unit) - wanted) <= scale * 0.51).all()
    assert train(config)["fvu"] < 1


def record_that(store: ObjectStore, windows: int) -> None:
    record = batching.BatchRecord(plan_fingerprint=load_plan(store).fingerprint, batch_windows=windows)
    store.put_new(CPU, record.to_json())


@pytest.mark.parametrize(
    ("rates", "size", "tried"),
    [
        ([10, 19, 30, 31, 31, 31, 99], 4, 5),  # 5 % more is no gain; two sizes without one end it
        ([10, 10, 20, 20, 20], 4, 5),
        ([30, 30, 30], 1, 3),
        ([10, 20, None], 2, 3),
        ([1, 2, 4, 8, 16, 32, 64], 64, 7),
    ],
)
def test_the_smallest_size_that_is_as_fast_as_any(rates: list[Any], size: int, tried: int) -> None:
    asked = []

    def rate(windows: int) -> float:
        asked.append(windows)
        found = rates[windows.bit_length() - 1]
        if found is None:
            raise NO_MEMORY
        return found

    assert smallest_best(rate, 64)[0] == size
    assert asked == [2**power for power in range(tried)]
    assert smallest_best(lambda windows: windows, 24)[0] == 16


def test_what_is_no_lack_of_memory_is_an_error() -> None:
    def rate(_: int) -> float:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        smallest_best(rate, 8)
    assert not out_of_memory(RuntimeError("shapes"))
    assert out_of_memory(NO_MEMORY)
    with pytest.raises(RuntimeError) as caught:  # the CPU's own refusal, as torch words it
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


def test_a_restart_does_not_measure_again(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(config.root)
    first = worker(config)
    assert first.ready() == "cpu"
    record = batching.BatchRecord.from_json(store.get(CPU), origin=CPU)
    assert record.batch_windows in record.tokens_per_s
    assert min(record.tokens_per_s.values()) > 0
    monkeypatch.setattr(batching, "measure_batch", None)
    again = worker(config)
    facts = again.run(0)
    assert facts.batch_windows == record.batch_windows
    assert facts.batch_source == (f"as an earlier run measured; to measure again, delete {store.uri}/{CPU}")
    assert first.run(1).batch_source.startswith("measured now; to measure again, delete ")
    assert again.windows_done() == 64


def test_whoever_measures_first_decides(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(config.root)

    def measured(*_: object) -> tuple[int, dict[int, float]]:
        record_that(store, 4)  # another actor was quicker
        return 32, {32: 1.0}

    monkeypatch.setattr(batching, "measure_batch", measured)
    assert config.subject is not None
    plan = load_plan(store)
    subject = Subject.load(config.subject, until=plan.spec.hooks)
    assert choose_batch(store, plan, subject, 1).windows == 4


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device with room for eight windows; what was asked of it."""
    real, asked = Subject.activations, []

    def activations(self: Subject, windows: Any, hooks: Any, **options: Any) -> Any:
        asked.append(len(windows))
        if len(windows) > 8 or (len(windows) == 8 and asked.count(8) == 3):  # once in the middle of a unit
            raise NO_MEMORY
        return real(self, windows, hooks, **options)

    monkeypatch.setattr(Subject, "activations", activations)
    return asked


def test_out_of_memory_halves_the_batch_and_every_unit_has_one_shape(
    config: Config, limited: list[int], tmp_path: Path
) -> None:
    store = open_store(config.root)
    record_that(store, 32)
    made = worker(config)
    facts = [made.run(unit) for unit in range(3)]
    assert limited[:6] == [32, 16, 8, 8, 8, 4]
    assert [fact.batch_windows for fact in facts] == [4, 4, 4]
    assert made.windows_done() == 3 * 64
    down = {f"{CPU.removesuffix('.json')}/{windows}.json" for windows in (16, 8, 4)}
    assert {key for key, _ in store.list("batches")} == {CPU, *down}
    limited.clear()
    again = worker(config).run(0)
    assert (again.batch_windows, set(limited)) == (4, {4}), "a restart knows"
    assert again.batch_source.startswith("less than the 32 that were measured, since memory ran out")
    digest = seal(store, load_plan(store)).dataset_sha256
    assert not verify(store, level="full")

    alone = config.model_copy(update={"root": str(tmp_path / "alone")})
    plan = ensure_plan(alone, open_store(alone.root))
    for unit in range(plan.units):
        worker(alone, 4).run(unit)
    assert seal(open_store(alone.root), plan).dataset_sha256 == digest


def test_a_number_that_was_asked_for_is_halved_too_and_not_remembered(
    config: Config, limited: list[int]
) -> None:
    facts = worker(config, 16).run(0)
    assert (facts.batch_windows, facts.batch_source) == (4, "halved, since memory ran out")
    assert not list(open_store(config.root).list("batches"))


def test_not_even_one_window(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def activations(*_: object, **__: object) -> None:
        raise NO_MEMORY

    monkeypatch.setattr(Subject, "activations", activations)
    with pytest.raises(WorkerError, match=r"single window of 17 tokens.*Tried to allocate.*fewer harvest"):
        worker(config, 4).run(0)
    with pytest.raises(torch.OutOfMemoryError):
        worker(config).ready()


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "from the subject"), (1e6, "overflow of float16")]
)
def test_rows_that_are_not_finite_are_named(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, words: str
) -> None:
    config = load_config(base, [f"root={tmp_path}", "plan.dtype=float16"])
    ensure_plan(config, open_store(config.root))
    real, passes = Subject.activations, []

    def activations(self: Subject, windows: Any, hooks: Any, **options: Any) -> Any:
        found = real(self, windows, hooks, **options)
        passes.append(len(windows))
        if len(passes) == 3:
            found["mlp_out.0"][1, 5, 7] = value
        return found

    monkeypatch.setattr(Subject, "activations", activations)
    with pytest.raises(NonFiniteError, match=rf"unit 1, hook mlp_out.0, window 17 .*position 5: .*{words}"):
        worker(config, 8).run(1)
    assert np.sum(passes) < 64, "the unit is not run to its end"
