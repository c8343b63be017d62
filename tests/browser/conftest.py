"""A real Chromium before a real server. Skipped, with a word, where no Chromium is installed.

`--saes URI URI` and `--set URI` with `--root ROOT` show others than the toy ones;
`--screenshots DIR` keeps pictures.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from winnow.explorer.place import Place
from winnow.explorer.site.desk import Desk, open_desk
from winnow.explorer.site.serve import listen, make_app, server
from winnow.schemas.config import StorageSpec

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_addoption(parser):
    group = parser.getgroup("browser")
    group.addoption("--saes", nargs=2, help="two indexed SAEs to show in place of the toy ones")
    group.addoption("--set", help="an indexed transcoder set to show in place of the toy one")
    group.addoption("--root", help="their dataset")
    group.addoption("--screenshots", type=Path, help="folder for pictures of every page")


@dataclass
class Served:
    """A site that is being served."""

    url: str
    latents: int
    pictures: Path | None = None
    complaints: list[str] = field(default_factory=list)
    """Console errors, page errors and requests to other hosts."""


@contextmanager
def serving(desk: Desk, pictures: Path | None) -> Iterator[Served]:
    """Serve a desk on a free port."""
    with listen("127.0.0.1", 0) as listener:
        site = server(make_app(desk))
        thread = threading.Thread(target=site.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        try:
            yield Served(url, desk.exhibits[0].table.meta.latents, pictures)
        finally:
            site.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def served(request, tmp_path_factory) -> Iterator[Served]:
    option = request.config.getoption
    saes, root, pictures = (option(name, default=None) for name in ("--saes", "--root", "--screenshots"))
    place = Place(root, None, StorageSpec())
    if not saes:
        from tests.support.explorer_site import make_site

        made = make_site(tmp_path_factory.mktemp("site"))
        saes, place = list(made.saes), Place.of(made.config_path, None)
    with serving(open_desk(saes, None, place, seats=8), pictures) as site:
        yield site


@pytest.fixture(scope="module")
def chromium():
    """The browser.

    Its driver keeps an event loop running in this thread, so it must end with this module: any later
    test that calls `asyncio.run` would be refused.
    """
    found = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if found is None:
        pytest.skip(f"no Chromium on the PATH ({', '.join(CHROMIUMS)}); Debian: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # a container has no user namespaces for Chromium's own sandbox; it sees our server only
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, served) -> Iterator:
    """A fresh page that notes every complaint; a test that leaves one fails."""
    context = chromium.new_context(viewport={"width": 1280, "height": 860}, accept_downloads=True)
    page = context.new_page()
    served.complaints.clear()
    page.on(
        "console",
        lambda message: message.type in ("error", "warning") and served.complaints.append(message.text),
    )
    page.on("pageerror", lambda error: served.complaints.append(str(error)))
    page.on(
        "request",
        lambda asked: (
            served.complaints.append(asked.url) if not asked.url.startswith((served.url, "blob:")) else None
        ),
    )
    page.set_default_timeout(60_000)
    yield page
    written = page.inner_text("body") if page.url.startswith(served.url) else ""
    context.close()
    assert served.complaints == []
    assert not re.search(r"\b(null|undefined|NaN)\b|\[object ", written), "a value that is no words"
