"""Which failures are tried again, which quarantine a unit, and when the harvest stops."""

from __future__ import annotations

import threading
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import RayTaskError

from winnow.harvester.run import driver
from winnow.harvester.run.failures import CAUSE_CHARS, Failures
from winnow.harvester.run.single import check_single_writer
from winnow.harvester.run.worker import all_finite
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError, IntegrityError, NonFiniteError, StoreError, WorkerError
from winnow.schemas.harvest import HarvestSpec

BAD = IntegrityError("the unit is bad")


def failures(**spec: int) -> Failures:
    return Failures(HarvestSpec(**spec))


@pytest.mark.parametrize(("cause", "alone"), [(MemoryError("8 GiB"), True), (KeyError("x"), False)])
def test_a_unit_whose_actor_had_no_memory_is_tried_alone(
    monkeypatch: pytest.MonkeyPatch, cause: Exception, alone: bool
) -> None:
    def get(_: object) -> None:
        raise RayTaskError("run", "no memory", cause)

    monkeypatch.setattr(driver.ray, "get", get)
    run = driver._Run.__new__(driver._Run)
    run._flying, run._queue, run._failures = {"ref": (0, 7)}, deque([8]), failures()
    run._ledger, run._stopping = SimpleNamespace(add=print), threading.Event()
    run._collect("ref")
    assert list(run._queue) == [8, 7]
    assert run._failures.alone(7) is alone


def test_three_failures_quarantine_a_unit() -> None:
    run = failures()
    assert [run.failed(7, BAD) for _ in range(3)] == [True, True, False]
    assert run.causes() == {7: "the unit is bad."}
    refusal = run.refusal(12)
    assert isinstance(refusal, WorkerError)
    assert refusal.exit_code == 1
    for part in ("1 of 12 units", "unit 7: the unit is bad", "--accept-quarantined"):
        assert part in str(refusal)


def test_nan_is_not_tried_again_and_keeps_its_exit_code() -> None:
    run = failures()
    assert not run.failed(3, NonFiniteError("unit 3, hook a, window 5", got="NaN", fix="Run it in float32"))
    refusal = run.refusal(12)
    assert isinstance(refusal, NonFiniteError)
    assert refusal.exit_code == 2
    for part in ("unit 3, hook a, window 5", "Run it in float32", "--accept-quarantined"):
        assert part in str(refusal)
    for _ in range(3):
        run.failed(7, BAD)
    assert run.refusal(12).exit_code == 1


def test_storage_is_not_the_unit_s_fault() -> None:
    asked: list[int] = []
    run = Failures(HarvestSpec(), lambda: asked.append(1))
    assert all(run.failed(1, StoreError("an outage")) for _ in range(9))
    assert run.quarantined == {}
    assert len(asked) == 9
    with pytest.raises(StoreError, match="an outage"):
        run.failed(1, StoreError("an outage"))


def test_a_full_disk_stops_at_once() -> None:
    def full() -> None:
        raise StoreError("the disk is full")

    with pytest.raises(StoreError, match="disk is full"):
        Failures(HarvestSpec(), full).failed(1, StoreError("writing x failed"))


def test_many_in_a_row_stop_the_harvest_and_a_success_starts_over() -> None:
    run = failures(abort_after_failures=4)
    for unit in range(3):
        run.failed(unit, BAD)
    run.succeeded(9)
    for unit in range(3):
        run.failed(unit, BAD)
    with pytest.raises(WorkerError, match=r"4 attempts failed.*abort_after_failures = 4.*unit is bad"):
        run.failed(3, BAD)


def test_a_bad_config_stops_at_once() -> None:
    with pytest.raises(ConfigError, match="weights"):
        failures().failed(1, ConfigError("subject weights"))


def test_a_unit_that_killed_an_actor_is_tried_alone() -> None:
    run = failures()
    run.failed(4, WorkerError("its actor died"), died=True)
    assert run.alone(4)
    run.succeeded(4)
    assert not run.alone(4)


def test_causes_are_short() -> None:
    run = failures(unit_attempts=1)
    run.failed(1, IntegrityError("x" * 5000))
    assert len(run.causes()[1]) == CAUSE_CHARS


def test_a_single_writer_has_no_actors() -> None:
    check_single_writer(Config(root="x"))
    single = {"root": "x", "storage": {"single_writer": True}}
    check_single_writer(Config.model_validate(single))
    for harvest in ({"actors": 2}, {"ray_address": "auto"}):
        with pytest.raises(ConfigError, match="single_writer"):
            check_single_writer(Config.model_validate({**single, "harvest": harvest}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_all_finite_is_what_torch_says(dtype):
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[3] = torch.finfo(dtype).max
    values[4] = -torch.finfo(dtype).max
    values[5] = 0
    assert all_finite(values).item() is True
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = values.clone()
        broken[6, 4] = bad
        assert all_finite(broken).item() is False
