"""The quality table's search for a learning rate, and its page; the table itself is in tests/formats."""

from __future__ import annotations

import math

import pytest

from benchmarks.quality import MOST_RATES, search
from benchmarks.quality_page import draw, page_of


@pytest.mark.parametrize("best", [0.001, 0.004, 0.03])
def test_a_search_ends_with_its_best_rate_between_two_others(best):
    asked = []

    def fvu_at(lr: float) -> float:
        asked.append(lr)
        return 1 + abs(math.log(lr / best))

    found = search(0.004, fvu_at)
    rates = list(found)
    assert rates == sorted(asked)
    assert len(asked) == len(set(asked)) <= MOST_RATES
    at = rates.index(min(found, key=found.__getitem__))
    assert 0 < at < len(rates) - 1
    assert abs(math.log2(rates[at] / best)) < 0.51


def test_a_search_without_an_end_stops_and_a_rate_that_fails_is_the_worst():
    assert len(search(0.004, lambda lr: -lr)) == MOST_RATES
    found = search(0.004, lambda lr: math.nan if lr > 0.004 else 1 / lr)
    assert found[0.008] == math.inf
    assert min(found, key=found.__getitem__) == 0.004


def test_the_page_has_every_trainer_and_what_a_person_says():
    row = {"lr": 0.01, "fvu_by_lr": {"0.01": 0.2, "0.02": 0.3}, "fvu_raw": [0.2, 0.4]}
    row |= {"delta_ce": [0.1, 0.1], "dead_share": [0.01, 0.03]}
    text = page_of({"ours": row, "theirs": row}, "Intro.", "Notes.", "Remarks.\n", "make it", "x.png")
    assert "| theirs | 0.01 | 0.3000 (0.2000 to 0.4000) | 0.1000 (0.1000 to 0.1000) | 2.00% (1.00% to" in text
    assert text.index("![FVU by learning rate](x.png)") < text.index("Remarks.") < text.index("make it")
    assert draw({"ours": row}).startswith(b"\x89PNG")
