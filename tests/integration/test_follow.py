"""Follow mode and the ring: the same batches while the dataset is made, and marks that hold it back."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from tests.support.planted import planted_config, planted_rows
from winnow.harvester.run import brake as brake_module
from winnow.harvester.run.brake import Brake
from winnow.schemas.errors import ConfigError, IntegrityError, MissingObject, StoreError, WorkerError
from winnow.schemas.follow import FollowerPosition, FollowLimits
from winnow.store import ActivationStore
from winnow.store.check.verify import verify
from winnow.store.format import order as order_module
from winnow.store.objects import open_store
from winnow.store.read import follow
from winnow.store.read.follow import Follower, deleted_units, follower_key, read_followers, units_passed
from winnow.store.testing import make_plan, synthetic_rows, write_dataset, write_plan, write_unit
from winnow.store.write.writer import seal

HOOK = "resid_post.1"
OPTIONS = {"batch_rows": 64, "seed": 5, "group_units": 2}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(order_module, "LARGEST_DESIGN_EFFECT", float("inf"))
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(brake_module, "LOOK_SECONDS", 0.0)


def harvest(root: str, plan, go: threading.Event, units=None) -> threading.Thread:
    """Writes a dataset in a thread, unit by unit."""

    def work() -> None:
        store = open_store(root)
        write_plan(store, plan)
        for unit in units or range(plan.units):
            go.wait(30)
            write_unit(store, plan, unit)
        if units is None:
            seal(store, plan)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("world", [1, 2])
def test_a_follower_sees_the_batches_it_would_see_later(tmp_path, world):
    plan, root, go = make_plan(units=8), str(tmp_path), threading.Event()
    thread = harvest(root, plan, go)
    store = ActivationStore.open(root, follow=True, timeout_seconds=30)
    assert store.dataset_sha256 is None
    with pytest.raises(ConfigError, match="not sealed"):
        _ = store.manifest
    streams = [store.stream(HOOK, **OPTIONS, epochs=2, rank=rank, world=world) for rank in range(world)]
    go.set()
    early = [[(b.rows[HOOK], b.weights) for b in stream] for stream in streams]
    thread.join()
    later = ActivationStore.open(root)
    assert store.dataset_sha256 == later.manifest.dataset_sha256
    for rank in range(world):
        with later.stream(HOOK, **OPTIONS, epochs=2, rank=rank, world=world) as stream:
            for (rows, weights), batch in zip(early[rank], stream, strict=True):
                assert torch.equal(rows, batch.rows[HOOK])
                assert torch.equal(weights, batch.weights)


def test_whatever_is_read_waits_for_its_unit(tmp_path):
    plan, root, go = make_plan(units=3), str(tmp_path), threading.Event()
    go.set()
    thread = harvest(root, plan, go, units=[0, 1])
    store = ActivationStore.open(root, follow=True, timeout_seconds=0.3)
    size = plan.rows_per_unit
    assert np.array_equal(store.read_rows(HOOK, size, 2 * size), synthetic_rows(plan, 1, HOOK))
    assert store.weights([HOOK], 0, 2 * size).all()
    thread.join()
    with pytest.raises(
        MissingObject, match=r"unit 2 has no receipt.*2 of 3 units committed.*Start the harvest"
    ):
        store.read_rows(HOOK, 0, 3 * size)
    with store.stream(HOOK, **OPTIONS) as stream, pytest.raises(MissingObject, match="unit 2 has no receipt"):
        next(stream)


def test_a_plan_that_never_comes(tmp_path):
    with pytest.raises(ConfigError, match=r"no plan appeared.*Start `winnow harvest`"):
        ActivationStore.open(str(tmp_path), follow=True, timeout_seconds=0.05)


def test_closing_ends_a_wait_at_once(tmp_path):
    plan = make_plan(units=4)
    write_dataset(open_store(str(tmp_path)), plan, units=[0])
    store = ActivationStore.open(str(tmp_path), follow=True, timeout_seconds=600)
    stream = store.stream(HOOK, **OPTIONS)
    stream.close()
    ended = threading.Event()
    ended.set()
    with pytest.raises(StoreError, match="interrupted"):
        store.arrivals.wait(3, ended)


def test_training_while_harvesting_gives_the_same_weights(tmp_path):
    """Bit for bit, and the dataset's digest is filled in once it is known."""
    from winnow.common.config_file import load_config
    from winnow.sae.model import Sae
    from winnow.trainer.run.loop import train

    config = planted_config(tmp_path, epochs=1, checkpoint_seconds=3600)
    settings = load_config(config)
    whole = train(settings)

    done, early = open_store(settings.root), open_store(str(tmp_path / "early"))
    plan = ActivationStore.open(settings.root).plan
    keys = [key for key, _ in done.list()]
    units = {
        unit: [k for k in keys if k.endswith((f"/c/{unit}/0", f"/{unit:08d}.json"))]
        for unit in range(plan.units)
    }
    later = {key for found in units.values() for key in found if not key.startswith("tokens/")}
    for key in keys:
        if key not in later and not key.startswith("manifest"):
            early.put(key, done.get(key))

    def copy() -> None:
        for unit in range(plan.units):
            for key in sorted(set(units[unit]) & later):  # activations before receipts
                early.put(key, done.get(key))

    thread = threading.Thread(target=copy)
    sets = [f"root={early.uri}", f"train.out={tmp_path / 'following'}", "train.follow=true"]
    thread.start()
    summary = train(load_config(config, sets))
    thread.join()
    assert summary["sae_sha256"] == whole["sae_sha256"]
    (position,) = read_followers(early, plan)
    assert (position.finished, position.units_passed) == (True, plan.units)
    assert Sae.load(str(tmp_path / "following")) is not None
    seal(early, plan)
    assert train(load_config(config, sets))["sae_sha256"] == whole["sae_sha256"]  # finished: recognised
    assert not verify(early, "full")


def test_a_follower_that_waits_heeds_a_stop_and_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    from winnow.common.config_file import load_config
    from winnow.trainer.run.loop import train
    from winnow.trainer.run.status import ask_to_stop, read_status

    monkeypatch.setattr("winnow.trainer.run.status.BEAT_SECONDS", 0.0)
    monkeypatch.setattr("winnow.trainer.mesh.rows.IDLE_SECONDS", 0.05)
    config = planted_config(tmp_path, epochs=1, group_units=4, checkpoint_seconds=3600)
    whole = train(load_config(config))
    plan = ActivationStore.open(load_config(config).root).plan
    late, out = open_store(str(tmp_path / "late")), tmp_path / "following"
    write_plan(late, plan)
    for unit in range(5):  # the validation unit and the first of two groups
        write_unit(late, plan, unit, planted_rows)
    sets = [f"root={late.uri}", f"train.out={out}", "train.follow=true"]

    def stop() -> None:
        while not list(out.glob("checkpoints/*/index.json")):
            time.sleep(0.01)
        ask_to_stop(open_store(str(out)))

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        train(load_config(config, sets))
    thread.join()
    status = read_status(open_store(str(out)))
    assert status is not None
    assert (status.state, status.step) == ("stopped", 8)
    for unit in range(5, plan.units):
        write_unit(late, plan, unit, planted_rows)
    assert train(load_config(config, sets))["sae_sha256"] == whole["sae_sha256"]


# Marks and ring


def position(plan, passed: int, beat: int, **facts) -> FollowerPosition:
    known = {"name": "t", "plan_fingerprint": plan.fingerprint, "step": 0, "units_ahead": 2, "epochs": 1.0}
    return FollowerPosition(**{**known, "units_passed": passed, "beat": beat, **facts})


def test_marks_hold_the_harvest_back(tmp_path):
    plan = make_plan(units=12)
    store, size = open_store(str(tmp_path)), plan.shard_bytes(HOOK)
    limits = FollowLimits(high_water_bytes=4 * size, low_water_bytes=2 * size)
    brake = Brake(limits, store, plan, committed=[])

    def hand_out(units) -> list[int]:
        done = []
        for unit in units:
            if not brake.may_begin(unit):
                break
            brake.begin(unit)
            done.append(unit)
        return done

    assert hand_out(range(12)) == [0, 1, 2, 3, 4]  # the validation unit is not counted
    assert brake.paused
    store.put(follower_key("t"), position(plan, 2, 1).to_json())
    assert hand_out([5]) == []  # 3 held: above the low mark
    assert brake.may_begin(3)  # a unit that failed is tried again, or its follower would wait for ever
    store.put(follower_key("t"), position(plan, 3, 2).to_json())
    assert hand_out(range(5, 12)) == [5, 6]
    store.put(follower_key("u"), position(plan, 1, 1, name="u").to_json())
    assert hand_out([7]) == []  # the slower one counts
    store.put(follower_key("u"), position(plan, 12, 2, name="u", finished=True).to_json())
    store.put(follower_key("t"), position(plan, 7, 3).to_json())
    assert hand_out(range(7, 12)) == [7, 8, 9, 10]
    store.put(follower_key("t"), position(plan, 7, 4, units_ahead=5).to_json())
    assert Brake(limits, store, plan, range(11)).may_begin(11)  # raised to what the follower needs


def test_silent_followers_park_the_harvest(tmp_path):
    plan = make_plan(units=6)
    store = open_store(str(tmp_path))
    limits = FollowLimits(high_water_bytes=plan.shard_bytes(HOOK), silence_seconds=1e-6)
    brake = Brake(limits, store, plan, committed=[0, 1])
    assert brake.may_begin(1)
    with pytest.raises(WorkerError, match=r"parked.*none has ever come.*Start the training again"):
        _ = brake.may_begin(2) or brake.may_begin(2)
    store.put(follower_key("t"), position(make_plan(units=6, seed=1), 0, 0).to_json())
    with pytest.raises(IntegrityError, match="plan_fingerprint"):
        Brake(limits, store, plan, committed=[0, 1]).may_begin(2)


def test_the_ring_deletes_what_was_passed_and_says_so(tmp_path):
    plan = make_plan(units=6)
    store = open_store(str(tmp_path))
    write_dataset(store, plan)
    limits = FollowLimits(high_water_bytes=4 * plan.shard_bytes(HOOK), ring=True)
    store.put(follower_key("t"), position(plan, 3, 0).to_json())
    Brake(limits, store, plan, committed=range(6)).may_begin(6)
    assert deleted_units(store, plan) == {1, 2}
    assert [int(key.split("/")[-2]) for key, _ in store.list(f"activations/{HOOK}/c")] == [0, 3, 4, 5]
    assert not verify(store, "full")
    sealed = ActivationStore.over(store)
    size = plan.rows_per_unit
    assert sealed.read_rows(HOOK, 3 * size, 6 * size).any()
    with pytest.raises(MissingObject, match=r"unit 1.*ring has deleted"):
        sealed.read_rows(HOOK, 0, 2 * size)
    (tmp_path / "activations" / HOOK / "c" / "4" / "0").unlink()
    assert [problem.unit for problem in verify(store, "list")] == [4]
    store.put(follower_key("t"), position(plan, 3, 1, epochs=2.0).to_json())
    with pytest.raises(ConfigError, match="at most one"):
        Brake(limits, store, plan, committed=range(6)).may_begin(6)


def test_a_followers_position(tmp_path):
    plan = make_plan(units=8)
    store = open_store(str(tmp_path))
    made = order_module.LaneOrder.for_plan(plan, **OPTIONS)
    edge = made.steps_in(0)
    assert [units_passed(plan, made, step) for step in (0, edge - 1, edge, made.steps_per_epoch)] == [
        1,
        1,
        3,
        8,
    ]
    with Follower(store, plan, made, out="runs/x", epochs=1, sample_steps=edge + 1, step=0) as follower:
        (first,) = read_followers(store, plan)
        assert (first.units_passed, first.units_ahead) == (1, 6)
        follower.at(edge)
    (second,) = read_followers(store, plan)
    assert (second.step, second.units_passed, second.beat > first.beat) == (edge, 3, True)
