"""Parts of a harvest."""

from __future__ import annotations

import pytest

from winnow.harvester.run.part import ALL, Part
from winnow.schemas.errors import ConfigError
from winnow.store.testing import make_plan


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_parts_hold_every_unit_once(count):
    plan = make_plan(11)
    parts = [Part(index, count).units(plan) for index in range(count)]
    assert sorted(unit for part in parts for unit in part) == [*range(plan.units)]
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert [*ALL.units(plan)] == [*range(plan.units)]


def test_parts_are_read_as_they_are_written():
    assert Part.parse("0/1") == ALL
    assert Part.parse("3/8") == Part(3, 8)


@pytest.mark.parametrize("text", ["", "1", "8/8", "1/0", "-1/8", "1/8/2", "a/b", "1.0/8", "0/ 8"])
def test_other_words_are_refused(text):
    with pytest.raises(ConfigError, match="I from 0 to N - 1"):
        Part.parse(text)
