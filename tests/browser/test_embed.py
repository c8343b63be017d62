"""A latent in an iframe of another page, in a real Chromium."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.browser.test_pages import no_serious_violation, open_page, picture

PAGE = "?page=feature&latent=5"


def test_a_latent_is_shown_in_the_iframe_that_its_page_names(page, served, tmp_path):
    open_page(page, served, PAGE, ".example .strip")
    page.get_by_text("Show it on another page").click()
    code = page.get_by_label("An iframe").input_value()
    assert f'src="{served.url}embed/0/5"' in code
    no_serious_violation(page)

    # Another server of this machine, as a notebook's.
    (tmp_path / "notebook.html").write_text(
        f"<!doctype html><html lang='en'><title>Mine</title>{code}</html>"
    )
    (tmp_path / "favicon.ico").write_bytes(b"")
    with pages_of(tmp_path) as address:
        page.goto(f"{address}notebook.html")
        frame = page.frame_locator("iframe")
        frame.get_by_text("Latent 5 of").wait_for(timeout=15000)
        assert frame.get_by_role("link", name="All about latent 5").get_attribute("target") == "_blank"
    served.complaints[:] = [each for each in served.complaints if not each.startswith(address)]


@contextmanager
def pages_of(folder: Path) -> Iterator[str]:
    """Serve a folder's files; yields the address."""
    handler = partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        yield f"http://localhost:{other.server_port}/"
        other.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    """Logs nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_one_latent_alone(page, served, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{served.url}embed/0/5")
    for width in (900, 380):
        page.set_viewport_size({"width": width, "height": 480})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        no_serious_violation(page)
        if scheme == "light":
            picture(page, served, "embed" if width == 900 else "embed-phone")
