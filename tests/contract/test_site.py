"""The documentation site: it builds without a warning, is complete, and every link leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote

import pytest
import yaml
from pydantic import BaseModel
from typer.core import TyperArgument

import winnow
from docs.generate.__main__ import GENERATED, gather
from docs.generate.pages import Pages, separate_lists
from winnow.cli.main import COMMANDS, load_command
from winnow.schemas.config import Config

ROOT = Path(__file__).parents[2]
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
"""Tags that make a browser fetch something, and by which attribute."""
DOORS = (
    "winnow",
    "winnow.sae",
    "winnow.store",
    "winnow.subject",
    "winnow.evaluator.circuits",
    "winnow.sae.activations",
)
"""Packages whose `__all__` is public."""


class Page(HTMLParser):
    """Anchors, links and fetched files of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {name for name in (found.get("id"), found.get("name")) if name}
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        if tag in LOADED and found.get(LOADED[tag]):
            self.fetched.append(str(found[LOADED[tag]]))

    @property
    def prose(self) -> str:
        """Its text, without tags."""
        return unescape(re.sub(r"<[^>]+>", "", self.text))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; the build is strict, as `make docs` is."""
    folder = tmp_path_factory.mktemp("site")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    changed = config.replace("docs_dir: build/docs", "docs_dir: docs").replace(
        "paths: [.]", f"paths: [{ROOT}]"
    )
    assert changed.count("docs_dir: docs") == changed.count(f"paths: [{ROOT}]") == 1
    (folder / "mkdocs.yml").write_text(changed, encoding="utf-8")
    zensical = Path(sys.executable).parent / "zensical"
    for command, place in (
        ([sys.executable, "-m", "docs.generate", "--out", str(folder / "docs")], ROOT),
        ([str(zensical), "build", "--clean", "--strict"], folder),
    ):
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {
        path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8"))
        for path in site.rglob("*.html")
    }


def fields(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Paths of all fields of a config, by pydantic's models (the page is made from the JSON schema)."""
    for name, field in model.model_fields.items():
        below = [found for found in models(field.annotation) if issubclass(found, BaseModel)]
        yield f"{path}{name}"
        for found in below:
            yield from fields(found, f"{path}{name}.")


def models(annotation: Any) -> Iterator[type]:
    """The classes in an annotation."""
    if isinstance(annotation, type):
        yield annotation
    for part in get_args(annotation):
        yield from models(part)


def test_every_field_of_a_config_has_an_anchor(pages: dict[str, Page]) -> None:
    wanted = set(fields(Config))
    assert len(wanted) > 120
    assert not wanted - pages["reference/config.html"].anchors


def test_every_field_has_a_docstring_and_says_whether_it_may_be_left_out(pages: dict[str, Page]) -> None:
    entries = re.findall(
        r'<h4 id="([^"]+)">.*?</h4>\s*<p>(.*?)</p>\s*<p>(.*?)</p>', pages["reference/config.html"].text, re.S
    )
    assert len(entries) == sum("." in path or path == "root" for path in fields(Config))
    for path, facts, said in entries:
        assert "required" in facts or "default" in facts, path
        assert len(said) > 10, path


def test_every_command_and_option_is_listed(pages: dict[str, Page]) -> None:
    page = pages["reference/commands.html"]
    assert set(COMMANDS) <= page.anchors
    sections = dict(re.findall(r'<h2 id="([\w-]+)">(.*?)(?=<h2 |</article>)', page.text, re.DOTALL))
    for name in COMMANDS:
        listed = unescape(re.sub(r"<[^>]+>", "", sections[name]))
        command: Any = load_command(name)
        for parameter in command.params:
            shown = parameter.opts
            # The word that stands for an argument is not among its options.
            if isinstance(parameter, TyperArgument):
                shown = [parameter.metavar or str(parameter.name)]
            assert all(word in listed for word in shown), (name, shown)


def test_every_public_name_is_described(pages: dict[str, Page]) -> None:
    anchors = pages["reference/python.html"].anchors
    for door in DOORS:
        for name in set(import_module(door).__all__) - {"__version__"}:
            value = getattr(import_module(door), name)
            assert f"{value.__module__}.{name}" in anchors, (door, name)
    assert "winnow.__version__" in pages["reference/python.html"].prose
    assert set(winnow.__all__) <= set(dir(winnow))


def test_every_error_and_every_kind_of_document_is_listed(pages: dict[str, Page]) -> None:
    source = (ROOT / "schemas" / "errors.py").read_text(encoding="utf-8")
    errors = re.findall(r"^class (\w+)\(", source, re.MULTILINE)
    assert len(errors) > 10
    assert all(name in pages["reference/errors.html"].prose for name in errors)
    kinds = re.findall(
        r'kind: Literal\["(winnow\.[\w.-]+)"\]',
        "".join(p.read_text() for p in (ROOT / "schemas").glob("*.py")),
    )
    assert len(kinds) > 10
    assert all(kind in pages["reference/files.html"].prose for kind in kinds)


def test_every_figure_of_the_evaluator_is_listed(pages: dict[str, Page]) -> None:
    sources = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "evaluator" / "families").glob("*.py")
    )
    ids = set(re.findall(r'(?:figure\(\s*|Figure\(\s*id=)"(\w+)"', sources))
    assert len(ids) > 10
    missing = {name for name in ids if name not in pages["reference/metrics.html"].prose}
    assert not missing


def test_every_link_leads_to_a_page_and_an_anchor_that_exist(site: Path, pages: dict[str, Page]) -> None:
    checked = 0
    for path, page in pages.items():
        # The page for unknown addresses is shown at any of them; its links are of a server's root.
        for link in [] if path == "404.html" else [*page.links, *page.fetched]:
            name, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:", name):
                continue
            target = (site / path).parent / name if name else site / path
            assert target.resolve().is_file(), (path, link)
            found = target.resolve().relative_to(site.resolve()).as_posix()
            if anchor and found in pages:
                assert anchor in pages[found].anchors, (path, link)
            checked += 1
    assert checked > 1000


def test_a_page_fetches_nothing_from_elsewhere(site: Path, pages: dict[str, Page]) -> None:
    for path, page in pages.items():
        assert not [url for url in page.fetched if url.startswith(("http:", "https:", "//"))], path
    assert "url(http" not in "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))


def test_tables_and_lists_are_set_as_such(pages: dict[str, Page]) -> None:
    for path, page in pages.items():
        prose = re.sub(r"<pre.*?</pre>", "", page.text, flags=re.DOTALL)
        assert not re.search(r"<p>[^<]*\|\s*-{3}|\n- \*\*", prose), path


def test_every_page_of_the_docs_is_in_the_navigation() -> None:
    # The one tag that YAML's safe loader does not know names a function.
    config = re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(re.findall(r"[\w/.-]+\.md", str(yaml.safe_load(config)["nav"])))
    there = {path for path in gather().files if path.endswith(".md")}
    assert not {path for path in there if not path.startswith("repository/")} - listed
    assert not listed - there


def test_a_list_after_a_line_is_set_apart() -> None:
    assert separate_lists("a:\n- b\n  c\n- d\n\n- e") == "a:\n\n- b\n  c\n- d\n\n- e"
    assert separate_lists("2024\n- 1. x") == "2024\n\n- 1. x"


def test_a_link_to_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("[b](b.md)\n")
    with pytest.raises(FileNotFoundError, match=re.escape("docs/a.md links to docs/b.md")):
        Pages(tmp_path, also=()).collect()


def test_what_is_no_longer_made_is_removed_and_what_is_the_same_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text(
        "See [the code](../x.py), [here](#here), [away](https://example.org).\n"
    )
    (tmp_path / "x.py").write_text('"""A file."""\n')
    found, out = Pages(tmp_path, also=()), tmp_path / "out"
    found.collect()
    assert (
        found.files["a.md"]
        == b"See [the code](repository/x.py.md), [here](#here), [away](https://example.org).\n"
    )
    assert b"````python" in found.files["repository/x.py.md"]
    (out / "old").mkdir(parents=True)
    (out / "old" / "b.md").write_text("old")
    found.write(out)
    assert sorted(path.name for path in out.rglob("*.md")) == ["a.md", "x.py.md"]
    os.utime(out / "a.md", (1, 1))
    found.write(out)
    assert (out / "a.md").stat().st_mtime == 1


def test_the_overview_leads_to_every_page_that_only_the_site_has(pages: dict[str, Page]) -> None:
    links = {link.partition("#")[0] for link in pages["reference.html"].links}
    assert {name.replace(".md", ".html") for name in GENERATED} <= links
