"""The count of public SAEs in docs/formats.md, against the registry of the pinned SAELens."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import registry
from benchmarks.peers import installed
from winnow.sae.formats.convert import READERS
from winnow.sae.formats.sets import SET_READERS

PAGE = Path(__file__).parents[2] / "docs/formats.md"


def test_the_page_states_the_counts_of_the_pinned_registry():
    if not installed():
        pytest.skip("the peers are not installed: `make peers`")
    found = registry.entries(registry.load())
    assert registry.table(found) in PAGE.read_text(encoding="utf-8")
    assert {entry.loader for entry in found} <= set(registry.FROM)


def test_every_format_that_the_count_names_can_be_imported():
    assert {name for name in registry.FROM.values() if name} <= {*READERS, *SET_READERS}
