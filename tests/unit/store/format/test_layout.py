"""Keys, the permutation inside units (pinned), and the way from a stored row back to its token."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from pydantic import TypeAdapter

from winnow.schemas.base import RelativeKey
from winnow.schemas.errors import ConfigError
from winnow.schemas.harvest import SLICES
from winnow.store.format import layout
from winnow.store.testing import make_plan, planned_rows, synthetic_rows


def test_keys() -> None:
    assert layout.manifest_key() == "manifest.json"
    assert layout.manifest_key(2) == "manifest.r2.json"
    assert layout.receipt_key(7) == "receipts/00000007.json"
    assert layout.receipt_key(123456789, 1) == "receipts/123456789.r1.json"
    assert layout.shard_key("resid_post.9", 3) == "activations/resid_post.9/c/3/0"
    assert layout.tokens_key(3) == "tokens/c/3/0"


@given(
    st.integers(0, 2**40),
    st.integers(0, 9),
    st.from_regex(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", fullmatch=True),
)
def test_every_key_is_a_relative_key(unit: int, revision: int, hook: str) -> None:
    check = TypeAdapter(RelativeKey).validate_python
    for key in (
        layout.receipt_key(unit, revision),
        layout.manifest_key(revision),
        layout.shard_key(hook, unit),
        layout.tokens_key(unit),
    ):
        assert check(key) == key


# Golden vectors: a change here makes every dataset written before unreadable.


def test_golden_permutations() -> None:
    assert hex(layout.philox_key("a", 1)) == "0xad9a7ee6fd56db28be70d321a4119e83"
    golden = [5, 10, 3, 13, 11, 14, 6, 9, 15, 8, 7, 0, 2, 12, 1, 4]
    assert layout.keyed_permutation(16, "a", 1).tolist() == golden
    rows = layout.row_permutation(make_plan(), 1)
    assert rows[:12].tolist() == [342, 151, 158, 393, 358, 106, 162, 484, 334, 448, 16, 424]
    assert hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest() == (
        "016e58550073b22d0aa5fbbbc0ceef30dfb975af4e4f964fc33e1baaec0b48ba"
    )


@given(st.integers(1, 5000), st.integers(0, 2**63), st.integers(0, 2**40))
def test_permutations_are_permutations(length: int, seed: int, unit: int) -> None:
    found = layout.keyed_permutation(length, seed, unit)
    assert np.array_equal(np.sort(found), np.arange(length))


def test_permutations_differ_by_unit_and_seed_and_not_by_hook() -> None:
    plan, other = make_plan(), make_plan(seed=1)
    first = layout.row_permutation(plan, 0)
    assert not np.array_equal(first, layout.row_permutation(plan, 1))
    assert not np.array_equal(first, layout.row_permutation(other, 0))
    several = make_plan(hooks={"resid_post.1": 8, "mlp_out.2": 4})
    assert np.array_equal(first, layout.row_permutation(several, 0))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(9, 20), st.integers(0, 8), st.data())
def test_locate_inverts_the_permutation(units: int, length: int, dropped: int, data: st.DataObject) -> None:
    plan = make_plan(units=units + 1, context_length=length, drop_leading=dropped)
    rows = np.array(data.draw(st.lists(st.integers(0, plan.rows - 1), min_size=1, max_size=20)))
    windows, positions = layout.locate(plan, rows)
    assert ((positions >= dropped) & (positions < length)).all()
    for row, window, position in zip(rows, windows, positions, strict=True):
        unit, stored = divmod(int(row), plan.rows_per_unit)
        planned = (window - unit * plan.spec.windows_per_unit) * plan.rows_per_window + position - dropped
        assert layout.row_permutation(plan, unit)[stored] == planned


def test_locate_finds_the_row_that_was_stored() -> None:
    plan = make_plan()
    stored, planned = synthetic_rows(plan, 1, "resid_post.1"), planned_rows(plan, 1, "resid_post.1")
    windows, positions = layout.locate(plan, np.arange(plan.rows_per_unit, 2 * plan.rows_per_unit))
    grid = planned.reshape(plan.spec.windows_per_unit, plan.rows_per_window, -1)
    assert np.array_equal(grid[windows - plan.spec.windows_per_unit, positions - 1], stored)


@pytest.mark.parametrize("row", [-1, 3 * 512])
def test_locate_refuses_rows_outside(row: int) -> None:
    with pytest.raises(IndexError, match="rows must lie"):
        layout.locate(make_plan(), np.array([0, row]))


def test_locate_of_nothing() -> None:
    windows, positions = layout.locate(make_plan(), np.zeros((0, 2), np.int64))
    assert windows.shape == positions.shape == (0, 2)


def test_slices_tile_the_shard() -> None:
    plan = make_plan(hooks={"a": 5}, dtype="float32")
    ends = [layout.slice_range(plan, "a", number, number + 1) for number in range(SLICES)]
    assert all(first[1] == second[0] for first, second in pairwise(ends))
    assert ends[-1][1] + SLICES * 16 + 4 == plan.shard_bytes("a")
    assert layout.slice_range(plan, "a", 3, 9) == (ends[3][0], ends[8][1])
    for first, stop in ((0, 0), (3, 2), (-1, 2), (0, 65)):
        with pytest.raises(IndexError):
            layout.slice_range(plan, "a", first, stop)
    with pytest.raises(ConfigError, match="one of a"):
        layout.slice_range(plan, "b", 0, 1)
