"""The files that the repository's host reads: they parse, and agree on the version."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
CITATION: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def releases() -> list[tuple[str, str]]:
    """Version and date of each release in the changelog, newest first."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return re.findall(r"^## \[(\d[^]]*)\] - (\d{4}-\d\d-\d\d)$", text, re.MULTILINE)


def test_pyproject_citation_and_changelog_name_the_same_version() -> None:
    assert releases()[0] == (VERSION, str(CITATION["date-released"]))
    assert CITATION["version"] == VERSION


def test_releases_are_listed_newest_first() -> None:
    found = [(tuple(map(int, version.split("."))), date) for version, date in releases()]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found) >= 2


def test_the_newest_minor_version_is_supported() -> None:
    minor = ".".join(VERSION.split(".")[:2])
    assert f"| {minor}.x | yes |" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_the_citation_has_what_cff_requires() -> None:
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys()
    assert (CITATION["cff-version"], CITATION["type"]) == ("1.2.0", "software")
    assert CITATION["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    for entry in [CITATION, *CITATION["references"]]:
        assert entry["title"]
        assert all("name" in author or "family-names" in author for author in entry["authors"])


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_can_be_filled_in(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"]
    assert form["description"]
    questions = [item for item in form["body"] if item["type"] != "markdown"]
    ids = [item["id"] for item in questions]
    assert len(set(ids)) == len(ids) >= 3
    assert all(item["attributes"]["label"] for item in questions)
    assert all(item["attributes"]["options"] for item in questions if item["type"] == "dropdown")
    assert any(item.get("validations", {}).get("required") for item in questions)


def test_there_are_forms_for_bugs_and_features() -> None:
    assert {path.stem for path in FORMS} == {"bug_report", "feature_request"}
    chooser = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/config.yml").read_text())
    assert chooser == {"blank_issues_enabled": False}
