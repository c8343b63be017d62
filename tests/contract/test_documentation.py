"""The documentation names what exists: links, paths of the repository, names that are imported, options."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from winnow.cli.main import COMMANDS, load_command

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "docker/*.md", "findings/*.md")
    for path in ROOT.glob(pattern)
)
# The part of the changelog on earlier versions names their files.
TEXTS = {path: path.read_text(encoding="utf-8").split("## [0.1.0]")[0] for path in PAGES}
FOLDERS = sorted(path.parent.name for path in ROOT.glob("[a-z]*/__init__.py"))
FOLDERS += ["configs", "docker", "docs", "findings"]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@each_page
def test_paths_in_backticks_exist(page: Path) -> None:
    # A name in capitals, or a star, stands for something of the reader's.
    paths = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[a-z0-9_/.\-]*)`", TEXTS[page])
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


@each_page
def test_names_that_a_page_imports_exist(page: Path) -> None:
    if page.parent.name == "extend":  # the page itself adds the modules, and its code is run by other tests
        return
    for module, names in re.findall(r"^from (winnow[\w.]*) import ([\w, ]+)", TEXTS[page], re.MULTILINE):
        for name in names.split(","):
            assert hasattr(import_module(module), name.strip()), (module, name)


@each_page
def test_commands_of_a_page_exist_with_their_options(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for fence in re.findall(r"^```(?:sh)?\n(.*?)^```", TEXTS[page], re.DOTALL | re.MULTILINE):
        for line in fence.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.startswith("winnow ") else []
            if len(words) < 2 or words[1] not in COMMANDS or "--help" in words:
                continue
            # Some options want a file that exists.
            for word in words:
                if re.fullmatch(r"[\w.-]+\.(json|txt)", word):
                    (tmp_path / word).touch()
            load_command(words[1]).make_context(words[1], words[2:])
