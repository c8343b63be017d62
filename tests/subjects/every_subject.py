"""Every causal language model is right or refused, as docs/subjects.md says (`make test-subjects`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.subjects.catalogue import SUBJECTS
from tests.subjects.table import check


@pytest.mark.parametrize("name", SUBJECTS)
def test_right_or_refused(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)
