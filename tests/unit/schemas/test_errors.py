"""What errors and pages tell a user to install is this project's distribution, with an extra it has."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from winnow.schemas.errors import DISTRIBUTION, Extra, install_command

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRA = re.compile(r"\b(winnow(?:[-_]\w+)?)\\?\[([a-z, ]+|\{\w+\})\\?\]")
"""A distribution with extras, as pip is given it, or as a program fills them in; patterns escape brackets."""


def texts() -> list[Path]:
    """Every page and program of the repository."""
    names = ("**/*.py", "**/*.md", "**/*.sh", "**/*.yaml", "**/Dockerfile", "Makefile")
    found = [path for name in names for path in ROOT.glob(name)]
    return [path for path in found if not any(part[0] == "." for part in path.relative_to(ROOT).parts)]


def test_the_command_names_the_distribution_of_this_project():
    assert PROJECT["name"] == DISTRIBUTION
    assert install_command("wandb") == "pip install 'winnow-sae[wandb]'"


@pytest.mark.parametrize("extra", get_args(Extra))
def test_an_extra_that_is_named_exists(extra):
    assert extra in PROJECT["optional-dependencies"]


def test_no_page_and_no_program_names_another_projects_extras():
    named = [
        (path.relative_to(ROOT), distribution, extra)
        for path in texts()
        for distribution, extras in EXTRA.findall(path.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    ]
    assert len(named) >= 3  # docs/trainer.md names two, a test of the corpus one
    assert [hint for hint in named if hint[1] != DISTRIBUTION] == []
    known = {*PROJECT["optional-dependencies"], "{package}"}  # what tests fill in is parametrised
    assert [hint for hint in named if hint[2].strip() not in known] == []
