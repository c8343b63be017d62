"""Hooks that a dataset lacks, and the harvest that would hold them."""

from __future__ import annotations

import pytest

from winnow.schemas.errors import SaeMismatch
from winnow.schemas.fit import harvest_bytes, ranges, require_hooks
from winnow.schemas.harvest import row_bytes
from winnow.schemas.subject import expand_hooks
from winnow.store.testing import make_plan

PLAN = make_plan(units=3, hooks={"mlp_in.0": 64, "mlp_out.0": 64}, dtype="int8")


def test_all_there_is_no_error() -> None:
    require_hooks("a set", ["mlp_out.0", "mlp_in.0"], PLAN)


def test_what_is_missing_is_named_with_the_harvest_that_would_hold_it_and_its_size() -> None:
    wanted = [f"{site}.{layer}" for layer in range(3) for site in ("mlp_in", "mlp_out")]
    with pytest.raises(SaeMismatch) as caught:
        require_hooks("train.set", wanted, PLAN)
    said = str(caught.value)
    assert "the hooks of train.set: expected hooks among mlp_in.0, mlp_out.0" in said
    assert "got also mlp_in.1-2, mlp_out.1-2" in said
    assert "plan.hooks = [mlp_in.0-2, mlp_out.0-2]" in said
    size = harvest_bytes(PLAN, wanted)
    assert size == PLAN.rows * 6 * row_bytes("int8", 64)
    assert f"{size:,} bytes as int8 for this plan's {PLAN.rows:,} rows" in said


def test_a_width_that_is_not_known_leaves_the_size_out() -> None:
    plan = make_plan(units=3, hooks={"model.norm": 8})
    assert harvest_bytes(plan, ["mlp_in.0"]) is None
    with pytest.raises(SaeMismatch, match=r"plan\.hooks = \[mlp_in\.0\]\.$"):
        require_hooks("a set", ["mlp_in.0"], plan)


@pytest.mark.parametrize(
    ("hooks", "named"),
    [
        (["mlp_in.2", "mlp_in.1", "lm_head"], ["mlp_in.1-2", "lm_head"]),
        (["mlp_in.9", "mlp_in.10", "mlp_in.12"], ["mlp_in.9-10", "mlp_in.12"]),
        ([], []),
    ],
)
def test_neighbouring_layers_are_named_as_a_plan_takes_them(hooks: list[str], named: list[str]) -> None:
    assert ranges(hooks) == named
    assert sorted(expand_hooks(named)) == sorted(hooks)
