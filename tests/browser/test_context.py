"""More text around an example, in a real Chromium."""

from __future__ import annotations

import pytest

from tests.browser.test_pages import no_serious_violation, open_page, picture, reach

PAGE = "?page=feature&latent=5"


def test_an_example_is_widened_to_the_rest_of_its_document(page, served):
    open_page(page, served, PAGE, ".example .strip")
    example = page.locator(".example").first
    shown = example.locator("> .strip span").all_text_contents()
    assert page.locator(".example").count() > 1
    example.get_by_role("button", name="More text").click()
    page.wait_for_selector(".wider .strip")
    wider = example.locator(".wider")
    text = wider.locator(".strip span").all_text_contents()
    assert len(text) > len(shown)
    peak = example.locator("> .strip .peak").text_content()
    assert wider.locator(".strip .peak").text_content().strip("↵\n") == peak.strip("↵")
    assert wider.locator(".strip span[style]").count() == example.locator("> .strip span[style]").count()
    assert "document" in wider.text_content()
    picture(page, served, "more-text")
    no_serious_violation(page)
    example.get_by_role("button", name="More text").click()
    assert not wider.is_visible()
    assert page.locator(".wider:visible").count() == 0


def test_more_text_by_keyboard_and_narrow(page, served):
    page.set_viewport_size({"width": 380, "height": 800})
    open_page(page, served, PAGE, ".example .strip")
    reach(page, ".example .acts button")
    page.keyboard.press("Enter")
    page.wait_for_selector(".wider .strip")
    reach(page, ".wider .strip")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    no_serious_violation(page)


def test_earlier_text_is_added_step_by_step(page, served):
    # Short steps, as of a document of many thousand tokens.
    page.route("**/context.js", lambda route: stepped(route))
    open_page(page, served, PAGE, ".example .strip")
    for at in range(page.locator(".example").count()):
        example = page.locator(".example").nth(at)
        example.get_by_role("button", name="More text").click()
        example.locator(".wider .strip").wait_for()
        if example.get_by_role("button", name="Earlier").count():
            break
    else:
        pytest.fail("no example has earlier text")
    before = example.locator(".wider .strip span").count()
    example.get_by_role("button", name="Earlier").click()
    example.locator(f".wider .strip span:nth-child({before + 1})").wait_for()
    page.wait_for_function("document.activeElement.matches('.wider .strip')")


def stepped(route) -> None:
    reply = route.fetch()
    assert "STEP = 200" in reply.text()
    route.fulfill(response=reply, body=reply.text().replace("STEP = 200", "STEP = 4"))
