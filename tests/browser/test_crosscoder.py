"""The explorer on a crosscoder of two subjects, in a real Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.browser.conftest import Served, serving
from tests.browser.test_pages import no_serious_violation, open_page, picture
from tests.support.crosscoders import CHAT_ONLY, SHARED, make_pair, random_crosscoder, save_crosscoder
from tests.support.explorer_site import SPEC
from winnow.explorer.index.make import make_index
from winnow.explorer.place import Place
from winnow.explorer.site.desk import open_desk


@pytest.fixture(scope="module")
def served(request, tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("crosscoder")
    config, uri = save_crosscoder(make_pair(folder, units=1), folder / "sae", random_crosscoder())
    place = Place.in_config(config)
    make_index(uri, place, f"{uri}/features", None, SPEC)
    pictures = request.config.getoption("--screenshots", default=None)
    with serving(open_desk([uri], None, place, seats=4), pictures) as site:
        yield site


def test_the_page_of_a_latent_has_both_subjects_side_by_side(page, served):
    open_page(page, served, f"?page=feature&latent={SHARED}", ".strip span")
    first = page.locator(".example").first
    assert first.locator(".part").count() == 3
    names = first.locator(".part > .small").all_text_contents()
    assert [re.sub(r"[-0-9.]+$", "", name) for name in names] == ["together", "base", "chat"]
    for name in ("base", "chat"):
        assert first.get_by_label(f"What {name} contributes to it; arrow keys read the values").count() == 1
        assert page.get_by_role("heading", name=f"Promotes in {name}").count() == 1
    first.locator(".strip").first.locator("span.peak").hover()
    assert re.search(r"= .* base [+−] .* chat [+−] .* bias", page.locator("#tip").text_content())
    owner = page.locator("#owner")
    assert "Whose: shared" in owner.text_content()
    assert owner.locator("tbody tr").count() == 2
    first.get_by_role("button", name="Ablate in chat").click()
    first.locator(".effect h2").wait_for()
    assert first.get_by_role("button", name="Ablate in chat").get_attribute("aria-expanded") == "true"
    assert first.get_by_role("button", name="Ablate in base").get_attribute("aria-expanded") == "false"
    steered = page.locator("#steered")
    steered.get_by_role("button", name="Measure in base").click()
    steered.get_by_text("More likely in base").wait_for()
    picture(page, served, "crosscoder")
    no_serious_violation(page)
    page.set_viewport_size({"width": 380, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    no_serious_violation(page)


def test_latents_are_sorted_and_filtered_by_whose_they_are(page, served):
    open_page(page, served, "", "main table a")
    page.get_by_label("List by").select_option("relative_norm.chat")
    page.wait_for_url(re.compile("sort=relative_norm.chat"))
    page.wait_for_selector(f"main tbody tr:first-child a:has-text('#{CHAT_ONLY}')")
    page.get_by_label("Whose").select_option("chat")
    page.wait_for_url(re.compile("of=chat"))
    page.wait_for_selector("text=1 to 1 of 1")
    assert "chat only" in page.locator("main tbody tr").first.text_content()
    page.reload()  # the address is the state
    page.wait_for_selector("text=1 to 1 of 1")
    picture(page, served, "crosscoder-map")
    no_serious_violation(page)
    page.set_viewport_size({"width": 380, "height": 800})
    open_page(page, served, "?page=map", "main table a")
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    no_serious_violation(page)


def test_a_text_is_read_by_both(page, served):
    open_page(page, served, "?page=text", "textarea")
    page.locator("main textarea").fill("the brown fox leaps over a sparse harvest of grain")
    page.get_by_role("button", name="Read").click()
    page.wait_for_selector(".strip.pick")
    page.get_by_text("steer", exact=True).first.click()
    page.wait_for_url(re.compile("page=steer"))
    no_serious_violation(page)


def test_a_part_is_steered_in_its_own_subject(page, served):
    open_page(page, served, f"?page=feature&latent={CHAT_ONLY}", ".strip span")
    page.get_by_role("link", name="Steer with it").click()
    page.wait_for_url(
        re.compile(f"edits=0.{CHAT_ONLY}.add.[-0-9.e]+.chat|edits=0%3A{CHAT_ONLY}%3Aadd%3A[-0-9.e]+%3Achat")
    )
    assert page.get_by_label("Part").input_value() == "chat"
    assert page.get_by_label("Do").locator("option").all_text_contents() == ["add"]
    page.get_by_label("Tokens").fill("3")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("3 clean and 3 steered tokens").wait_for()
    page.get_by_label("Part").select_option("base")
    page.wait_for_url(re.compile("base"))
    no_serious_violation(page)
