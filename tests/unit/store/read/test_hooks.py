"""Hooks that a dataset lacks, and the harvest that would hold them."""

from __future__ import annotations

import pytest

from winnow.schemas.errors import ConfigError
from winnow.schemas.harvest import row_bytes
from winnow.store.read.hooks import harvest_bytes, listed, require_hooks
from winnow.store.testing import make_plan

PLAN = make_plan(units=3, hooks={"mlp_in.0": 64, "mlp_out.0": 64}, dtype="int8")


def test_all_there_is_no_error() -> None:
    require_hooks(PLAN, ["mlp_out.0", "mlp_in.0"], what="a set")


def test_what_is_missing_is_named_with_the_harvest_that_would_hold_it_and_its_size() -> None:
    wanted = [f"{site}.{layer}" for layer in range(3) for site in ("mlp_in", "mlp_out")]
    with pytest.raises(ConfigError) as caught:
        require_hooks(PLAN, wanted, what="train.set")
    said = str(caught.value)
    assert (
        "train.set reads hooks that the dataset lacks: mlp_in.1 to mlp_in.2, mlp_out.1 to mlp_out.2" in said
    )
    assert "plan.hooks = mlp_in.0 to mlp_in.2, mlp_out.0 to mlp_out.2" in said
    size = harvest_bytes(PLAN, wanted)
    assert size == PLAN.rows * 6 * row_bytes("int8", 64)
    assert f"{size / 1024:.1f} KiB in int8 for this plan's {PLAN.rows:,} rows" in said


def test_a_width_that_is_not_known_leaves_the_size_out() -> None:
    plan = make_plan(units=3, hooks={"model.norm": 8})
    assert harvest_bytes(plan, ["mlp_in.0"]) is None
    assert harvest_bytes(plan, ["mlp_in.0"], d_model=16) == plan.rows * row_bytes(plan.spec.dtype, 16)
    with pytest.raises(ConfigError, match=r"plan\.hooks = mlp_in\.0\.$"):
        require_hooks(plan, ["mlp_in.0"], what="a set")


@pytest.mark.parametrize(
    ("hooks", "words"),
    [
        (["mlp_in.2", "mlp_in.1", "lm_head"], "lm_head, mlp_in.1 to mlp_in.2"),
        (["mlp_in.9", "mlp_in.10", "mlp_in.12"], "mlp_in.9 to mlp_in.10, mlp_in.12"),
        ([], ""),
    ],
)
def test_neighbouring_layers_are_listed_as_one(hooks: list[str], words: str) -> None:
    assert listed(hooks) == words
