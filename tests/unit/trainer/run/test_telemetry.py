"""The picture is a PNG whatever the run's length; figures that cannot be drawn do not stop it."""

from __future__ import annotations

import pytest

from winnow.trainer.run.telemetry import draw_curves


def record(step: int, **fields) -> dict:
    facts = {"step": step, "tokens": step * 1000, "loss": 1 / step, "fvu": 0.9 / step, "l0": 3.0}
    return facts | {"dead_share": 0.1, "lr": 1e-3} | fields


@pytest.mark.parametrize("steps", [1, 2, 400])
def test_the_curves_are_a_png(steps):
    picture = draw_curves([record(step) for step in range(1, steps + 1)], "resid_post.9: N = 4,096")
    assert picture.startswith(b"\x89PNG")


def test_figures_that_are_not_numbers_are_gaps():
    nan = float("nan")
    assert draw_curves([record(1), record(2, fvu=nan, loss=nan), record(3)], "gap").startswith(b"\x89PNG")
