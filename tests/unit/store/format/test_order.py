"""The lanes order: laws that hold for every spec, pinned vectors, and the mixing it claims."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.schemas.errors import ConfigError
from winnow.store.format import order as order_module
from winnow.store.format.order import LARGEST_DESIGN_EFFECT, LaneOrder, group_units_for
from winnow.store.testing import make_plan


def make(units=range(2, 9), slice_rows=6, windows=64, batch=32, seed=1, lanes=16, group=3, check=True):
    """An order; with `check=False` the limit on mixing, which tiny sizes can't meet, is lifted."""
    with pytest.MonkeyPatch.context() as patch:
        if not check:
            patch.setattr(order_module, "LARGEST_DESIGN_EFFECT", float("inf"))
        return LaneOrder(units, slice_rows, windows, batch, seed, lanes, group)


@st.composite
def orders(draw):
    lanes = draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
    first, count = draw(st.integers(0, 5)), draw(st.integers(1, 7))
    slice_rows = draw(st.integers(1, 5))
    most = slice_rows * 64 // lanes  # a lane's rows of one unit: a step always fits the last group
    return make(
        units=range(first, first + count),
        slice_rows=slice_rows,
        batch=lanes * draw(st.integers(1, most)),
        seed=draw(st.integers(0, 2**63 - 1)),
        lanes=lanes,
        group=draw(st.integers(1, 8)),
        check=False,
    )


@given(orders(), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_row_comes_at_most_once_an_epoch_and_drops_are_counted(order, epoch):
    steps = order.steps_per_epoch
    rows = np.concatenate([order.rows_at(epoch * steps + step) for step in range(steps)])
    assert len(np.unique(rows)) == len(rows) == order.rows_per_epoch
    assert set(np.unique(rows // order.rows_per_unit)) <= set(order.units)
    assert order.rows_per_epoch + order.dropped_rows == len(order.units) * order.rows_per_unit
    assert order.dropped_rows < order.groups * order.batch_rows


@given(orders(), st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_every_world_sees_the_same_global_batch_and_ranks_own_whole_slices(order, step):
    whole = order.rows_at(step)
    world = 1
    while world <= order.lanes:
        parts = [order.rows_at(step, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(parts), whole)
        for rank, rows in enumerate(parts):
            slices = rows % order.rows_per_unit // order.rows_per_slice
            assert slices.min() >= rank * 64 // world
            assert slices.max() < (rank + 1) * 64 // world
        world *= 2


@given(orders())
@settings(max_examples=40, deadline=None)
def test_a_step_is_found_without_counting(order):
    place = [
        (epoch, group, step)
        for epoch in range(3)
        for group in range(order.groups)
        for step in range(order.steps_in(group))
    ]
    for number, expected in enumerate(place):
        found = order.locate(number)
        assert (found.epoch, found.group, found.step_in_group) == expected
        assert order.first_step(found.epoch, found.group) == number - found.step_in_group


@given(orders())
@settings(max_examples=20, deadline=None)
def test_each_epoch_takes_every_unit_once_the_first_in_plan_order(order):
    for epoch in range(3):
        units = [unit for group in range(order.groups) for unit in order.units_of(epoch, group)]
        assert sorted(units) == list(order.units)
        if epoch == 0:
            assert units == list(order.units)


def test_epochs_lanes_groups_and_seeds_have_shuffles_of_their_own():
    first = make()
    seen = [
        first.lane_permutation(e, g, lane).tobytes() for e in range(3) for g in range(2) for lane in range(4)
    ]
    assert len(set(seen)) == len(seen)
    assert not np.array_equal(first.rows_at(0), make(seed=2).rows_at(0))
    assert first.units_of(1, 0) != first.units_of(2, 0)


GOLDEN = {  # step: (first six rows, start of the SHA-256 of the whole batch as little-endian int64)
    0: ([782, 1559, 1566, 1581, 1604, 1206], "d713c45cd6af3f04"),
    5: ([770, 775, 812, 1177, 1211, 1205], "f54d52f4f0d4b7c4"),
    83: ([3088, 3087, 3115, 3103, 3126, 3140], "188525cf9c1d416c"),
    84: ([2324, 1152, 2338, 3101, 2355, 3125], "0812b48c54a04f96"),
    1000: ([1173, 1174, 1186, 1182, 1200, 1202], "79e95e6e17ef041d"),
}


@pytest.mark.parametrize("step", GOLDEN)
def test_golden_rows(step):
    """What `lanes.v2` yields may never change: a checkpoint resumed later would see other rows."""
    order = make(check=False)
    rows = order.rows_at(step)
    digest = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16]
    assert (rows[:6].tolist(), digest) == GOLDEN[step]


def test_golden_unit_order():
    assert LaneOrder(range(22), 127, 64, 64, 7, 64, 22).units_of(1, 0)[:8] == (16, 1, 0, 11, 10, 15, 7, 9)


# Mixing


def test_mixing_figures():
    plan = make_plan(units=23, context_length=9)
    order = LaneOrder.for_plan(plan, batch_rows=64, seed=0, group_units=11)
    assert order.groups == 2
    assert order.same_window == pytest.approx(1 / (11 * 64))
    assert order.excess == pytest.approx(1 / (11 * 64) - 1 / (22 * 64))
    assert order.design_effect == pytest.approx(1 + 63 * 0.1 * order.excess)
    whole = LaneOrder.for_plan(plan, batch_rows=2048, seed=0, group_units=100)
    assert (whole.group_units, whole.excess, whole.design_effect) == (22, 0, 1)


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([64, 1024]), st.integers(1, 500))
@settings(max_examples=200, deadline=None)
def test_a_refused_spec_names_a_group_that_would_do(units, group, windows, batch):
    def order(group_units, check=False):
        return make(
            units=range(units),
            slice_rows=600,
            windows=windows,
            batch=batch * 64,
            lanes=64,
            group=group_units,
            check=check,
        )

    made = order(group)
    if made.design_effect <= LARGEST_DESIGN_EFFECT:
        assert order(group, check=True) == made
        return
    needed = made.group_units_needed
    with pytest.raises(ConfigError, match=f"group_units to {needed} or more"):
        order(group, check=True)
    assert needed > group
    assert order(needed).design_effect <= LARGEST_DESIGN_EFFECT
    assert order(needed - 1).design_effect > LARGEST_DESIGN_EFFECT


def test_two_rows_of_a_batch_share_a_window_as_often_as_claimed():
    """Rows through the plan's own shuffle to windows: the measured rate over 1/(U*W), in standard errors."""
    plan = make_plan(units=9, context_length=17, hooks={"resid_post.1": 1})
    units, windows = 4, plan.spec.windows_per_unit
    order = make(
        units=range(1, 9), slice_rows=plan.rows_per_slice, windows=windows, batch=256, lanes=16, group=units,
        check=False,
    )  # fmt: skip
    from winnow.store.format.layout import row_permutation

    planned = np.concatenate([row_permutation(plan, unit) for unit in range(plan.units)])
    window_of = planned // plan.rows_per_window + np.repeat(
        np.arange(plan.units) * windows, plan.rows_per_unit
    )
    pairs, same = 0, 0
    for step in range(2 * order.steps_per_epoch):
        counts = np.unique(window_of[order.rows_at(step)], return_counts=True)[1]
        same += int((counts * (counts - 1) // 2).sum())
        pairs += 256 * 255 // 2
    per_window = plan.rows_per_window
    exact = (per_window - 1) / (units * windows * per_window - 1)  # drawn without replacement
    assert order.same_window == pytest.approx(exact, rel=1.1 / per_window)
    assert abs(same - pairs * exact) < 5 * np.sqrt(pairs * exact)
    assert 0.85 < same / pairs / order.same_window < 1.05


def test_rows_of_a_batch_come_evenly_from_the_units_and_slots_of_a_group():
    """Chi-square of (unit, place in the lane) counts at the first step of many epochs."""
    order = make(units=range(4), slice_rows=4, batch=64, lanes=16, group=4, check=False)
    counts = np.zeros(4 * order.rows_per_unit)
    epochs = 400
    for epoch in range(epochs):
        np.add.at(counts, order.rows_at(epoch * order.steps_per_epoch), 1)
    mean = counts.sum() / counts.size
    statistic = ((counts - mean) ** 2 / mean).sum()
    free = counts.size - order.lanes  # each lane's total is fixed
    assert abs(statistic - free) < 6 * np.sqrt(2 * free)


# Sizes


def test_ten_to_the_twelve_rows_cost_nothing():
    order = LaneOrder(range(8_000_000), 2000, 1024, 16384, 0, 64, 64)
    assert len(order.units) * order.rows_per_unit > 10**12
    started = time.process_time()
    for step in range(0, order.steps_per_epoch, order.steps_per_epoch // 1000):
        place = order.locate(step)
        assert len(set(order.units_of(3, place.group))) == 64
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("room", "units", "expected"),
    [(16, 22, 11), (22, 22, 22), (21, 22, 11), (7, 22, 6), (0, 22, 1), (1, 5, 1), (1000, 3, 3), (2, 3, 2)],
)
def test_group_units_for(room, units, expected):
    assert group_units_for(room * 100, unit_bytes=100, units=units) == expected


@given(st.integers(0, 10**6), st.integers(1, 10**4), st.integers(1, 500))
def test_group_units_keep_to_the_budget_and_are_even(budget, unit, units):
    chosen = group_units_for(budget, unit_bytes=unit, units=units)
    assert 1 <= chosen <= units
    assert chosen == 1 or chosen * unit <= budget
    groups = -(-units // chosen)
    assert groups == -(-units // min(max(budget // unit, 1), units))


# What is refused


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"lanes": 3}, "lanes"),
        ({"lanes": 0}, "lanes"),
        ({"lanes": 128}, "lanes"),
        ({"batch": 33}, "batch_rows"),
        ({"batch": 0}, "batch_rows"),
        ({"group": 0}, "group_units"),
        ({"units": range(0)}, "units"),
        ({"batch": 16 * 1000}, "batch_rows"),
        ({"units": range(4), "batch": 16 * 48}, "last group"),
    ],
)
def test_what_cannot_be_is_refused(change, field):
    with pytest.raises(ConfigError, match=field):
        make(**{"check": False, **change})


@pytest.mark.parametrize(("rank", "world"), [(0, 3), (0, 0), (2, 2), (-1, 2), (0, 32)])
def test_worlds_that_cannot_be_are_refused(rank, world):
    with pytest.raises(ConfigError, match=r"world|rank"):
        make(check=False).lanes_of(rank, world)


def test_a_step_before_the_first_is_refused():
    with pytest.raises(ConfigError, match="step"):
        make(check=False).locate(-1)


def test_the_state_is_integers():
    state = make(check=False).state("0" * 64, "train", ["a.1"], 17)
    assert (state.algorithm, state.step, state.lanes, state.group_units) == ("lanes.v2", 17, 16, 3)
