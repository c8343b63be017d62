"""Every causal language model is right or refused, as docs/subjects.md says (`make test-subjects`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.subjects.catalogue import SUBJECTS
from tests.subjects.table import INTRODUCTION, PAGE, check


@pytest.mark.parametrize("name", SUBJECTS)
def test_right_or_refused(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


def test_the_page_has_a_line_for_every_subject() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.startswith(INTRODUCTION)
    names = [text.split("`")[1] for text in page.removeprefix(INTRODUCTION).splitlines()]
    assert names == list(SUBJECTS)
