"""Every command and every block of Python on the site's guides and on its pages about extending runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.snippets import REPO, Workspace, blocks

PAGES = sorted([*(REPO / "docs" / "guides").glob("*.md"), *(REPO / "docs" / "extend").glob("*.md")])
ELSEWHERE = ("store.md",)
"""Its code runs in tests/contract/test_documented_store.py."""
LAYERS = {"circuits.md": 3, "own.md": 15}
"""Blocks of the tiny subject, where a page needs others than ten."""


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in ELSEWHERE], ids=lambda page: page.stem
)
def test_a_page_runs_as_it_is_written(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    written = blocks(page)
    # A server only for the pages that need one.
    bucket = request.getfixturevalue("s3_uri") if any("s3://" in block.text for block in written) else ""
    place = Workspace(tmp_path, monkeypatch, layers=LAYERS.get(page.name, 10), bucket=bucket)
    if page.parent.name == "extend":
        place.command("winnow harvest configs/quickstart.yaml")
    if page.stem == "metric":
        place.command("winnow train configs/quickstart.yaml")
    if page.stem == "sweep":
        place.command("winnow harvest configs/quickstart.yaml")
    for block in written:
        place.run(block)
    assert place.ran
