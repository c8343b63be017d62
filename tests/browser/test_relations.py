"""The latents of other layers of a set, on a latent's page, in a real Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.browser.conftest import Served, serving
from tests.browser.test_pages import no_serious_violation, open_page, picture, reach
from winnow.explorer.place import Place
from winnow.explorer.site.desk import open_desk
from winnow.schemas.config import StorageSpec

PAGE = "?page=feature&sae=1&latent=5"


@pytest.fixture(scope="module")
def served(request, tmp_path_factory) -> Iterator[Served]:
    option = request.config.getoption
    uri, place = option("--set", default=None), Place(option("--root", default=None), None, StorageSpec())
    if uri is None:
        from tests.support.set_site import indexed_set, layers_dataset, place_of

        folder = tmp_path_factory.mktemp("set")
        config = layers_dataset(folder)
        uri, place = indexed_set(config, folder / "set", cross=True), place_of(config)
    with serving(open_desk([uri], None, place, seats=8), option("--screenshots", default=None)) as site:
        yield site


def test_latents_that_feed_a_latent_are_looked_up_and_opened(page, served):
    open_page(page, served, PAGE, "#across")
    page.get_by_role("button", name="Look up").click()
    page.wait_for_selector("#across table")
    page.wait_for_url(re.compile("across=expected"))
    card = page.locator("#across")
    assert card.locator("h3").all_text_contents() == ["Feed it", "Are fed by it"]
    first, last = card.locator("table").first, card.locator("table").last
    layers = [
        {int(text) for text in each.locator("tbody tr td:first-child").all_text_contents()}
        for each in (first, last)
    ]
    assert max(layers[0]) < min(layers[1])
    expected = first.locator("tbody tr").first.text_content()
    card.scroll_into_view_if_needed()
    picture(page, served, "across")
    no_serious_violation(page)
    page.get_by_label("Order by").select_option("by_weight")
    page.wait_for_url(re.compile("across=by_weight"))
    assert first.locator("tbody tr").first.text_content() != expected
    page.reload()  # the address is the state
    page.wait_for_selector("#across table")
    assert page.get_by_label("Order by").input_value() == "by_weight"
    number = page.locator("#across table a").first.text_content().lstrip("#")
    page.locator("#across table a").first.click()
    page.wait_for_selector(f"h1:has-text('Latent {number}')")
    assert "sae=0" in page.url


def test_the_first_layer_is_fed_by_none_by_keyboard_and_narrow(page, served):
    page.set_viewport_size({"width": 380, "height": 800})
    open_page(page, served, PAGE.replace("sae=1", "sae=0"), "#across")
    reach(page, "#across button")
    page.keyboard.press("Enter")
    page.wait_for_selector("#across table")
    assert "No earlier latent does." in page.locator("#across").text_content()
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    page.locator("#across").scroll_into_view_if_needed()
    picture(page, served, "across-phone")
    no_serious_violation(page)
    page.get_by_role("button", name="Switch between light and dark").click()
    no_serious_violation(page)
