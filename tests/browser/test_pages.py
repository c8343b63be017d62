"""Every page in a real Chromium: it works, by keyboard too, asks no other host, and axe is content."""

from __future__ import annotations

import json
import re

import pytest
from axe_playwright_python.sync_playwright import Axe

TEXT = "In the beginning was the Word. To be, or not to be, that is the question."
STRONGEST = """async (text) => {
  const headers = {"Content-Type": "application/json"};
  const reply = await fetch("/api/saes/0/text", {method: "POST", headers, body: JSON.stringify({text})});
  return (await reply.json()).latents.slice(0, 4).map((one) => one.latent);
}"""
SERIOUS = ("serious", "critical")


def picture(page, served, name: str) -> None:
    if served.pictures is not None:
        served.pictures.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(served.pictures / f"{name}.png"))


def open_page(page, served, address: str, settled: str) -> None:
    page.goto(served.url + address)
    page.wait_for_selector(settled)


def no_serious_violation(page) -> None:
    found = Axe().run(page).response["violations"]
    bad = [
        (each["id"], [node["html"][:120] for node in each["nodes"][:3]])
        for each in found
        if each["impact"] in SERIOUS
    ]
    assert bad == []


def test_map_filters_searches_and_opens_a_latent(page, served):
    open_page(page, served, "", "main canvas")
    page.wait_for_selector("main table a")
    picture(page, served, "map")
    no_serious_violation(page)
    first = page.locator("main tbody tr").first
    word = first.locator("td .token").first.text_content()
    page.locator("main input[name=q]").fill(word.strip("↵ ") or "e")
    page.wait_for_url(re.compile("[?&]q="))
    page.locator("select[name=down]").select_option("0")
    page.wait_for_url(re.compile("down=0"))
    page.reload()  # the address is the state
    page.wait_for_selector("main table a")
    assert page.locator("select[name=down]").input_value() == "0"
    page.locator("select[name=y]").select_option("largest")
    page.wait_for_url(re.compile("y=largest"))
    page.locator("main table a").first.click()
    page.wait_for_selector("h1:has-text('Latent')")


def test_map_by_direction(page, served):
    open_page(page, served, "?page=map", "main canvas")
    page.get_by_role("link", name="By direction").click()
    page.wait_for_url(re.compile("x=direction_1&y=direction_2"))
    page.wait_for_selector("text=along the first principal component")
    assert page.locator("select[name=x]").input_value() == "direction_1"
    picture(page, served, "map-direction")
    no_serious_violation(page)
    page.get_by_role("link", name="By density").click()
    page.wait_for_selector("text=share of tokens on which it fires")


def test_map_names_the_latent_below_the_pointer_and_opens_it(page, served):
    open_page(page, served, "?page=map", "main canvas")
    data = page.evaluate("fetch('/api/saes/0/map').then((reply) => reply.json())")
    assert len(data["latents"]) == served.latents
    box = page.locator("main canvas").bounding_box()
    for step in range(40):  # sweep until a latent is near
        page.mouse.move(
            box["x"] + 60 + step * (box["width"] - 80) / 40,
            box["y"] + box["height"] * (0.3 + 0.5 * (step % 5) / 5),
        )
        if page.locator("#tip").is_visible():
            break
    assert re.match(r"#\d+", page.locator("#tip").text_content())
    page.mouse.down()
    page.mouse.up()
    page.wait_for_url(re.compile("page=feature"))


def test_feature_page_and_ablation(page, served):
    open_page(page, served, "?page=feature&latent=5", ".strip span")
    picture(page, served, "feature")
    no_serious_violation(page)
    page.locator(".strip").first.locator("span").first.hover()
    assert page.locator("#tip").is_visible()
    tabs = page.get_by_role("tab")
    if tabs.count() > 1:
        tabs.nth(1).click()
        assert tabs.nth(1).get_attribute("aria-selected") == "true"
        assert "band=" in page.url
        tabs.nth(0).click()
    page.get_by_role("button", name="Ablate").first.click()
    page.wait_for_selector(".effect .strip")
    picture(page, served, "ablation")
    no_serious_violation(page)
    page.get_by_role("link", name="Next →").click()
    page.wait_for_selector("h1:has-text('Latent 6')")
    page.go_back()
    page.wait_for_selector("h1:has-text('Latent 5')")


def test_examples_by_the_source_of_their_tokens(page, served):
    open_page(page, served, "?page=feature&latent=5", ".strip span")
    if not page.evaluate("fetch('/api/site').then((reply) => reply.json()).then((site) => site.labels)"):
        pytest.skip("these SAEs' dataset has no labels")
    chosen = page.get_by_label("On tokens of")
    chosen.wait_for()
    sources = page.locator(".example .of").all_text_contents()
    name = sources[0]
    kind = chosen.locator("option", has_text=name).get_attribute("value")
    chosen.select_option(kind)
    page.wait_for_url(re.compile("kind=source"))
    assert page.locator(".example").count() == sources.count(name)
    no_serious_violation(page)
    page.reload()
    page.get_by_label("On tokens of").wait_for()
    assert page.get_by_label("On tokens of").input_value() == kind
    assert set(page.locator(".example .of").all_text_contents()) == {name}


def test_what_steering_promotes_is_measured_beside_the_direct_path(page, served):
    open_page(page, served, "?page=feature&latent=5", ".strip span")
    assert page.get_by_role("heading", name="Promotes, by its direction").count() == 1
    card = page.locator("#steered")
    card.get_by_role("button", name="Measure").click()
    card.locator("table").first.wait_for()
    assert card.locator("table").count() == 2
    assert re.search(r"\d+ of the \d+ tokens that its direction alone promotes", card.text_content())
    assert "nats" in card.text_content()
    card.scroll_into_view_if_needed()
    picture(page, served, "steered")
    no_serious_violation(page)


def test_text_page_says_what_fires(page, served):
    open_page(page, served, "?page=text", "textarea")
    page.locator("main textarea").fill(TEXT)
    page.get_by_role("button", name="Read").click()
    page.wait_for_selector(".strip.pick")
    page.locator(".strip.pick span").nth(4).click()
    page.wait_for_selector("ul.plain li")
    picture(page, served, "text")
    no_serious_violation(page)
    page.reload()
    page.wait_for_selector("ul.plain li")  # text and token stand in the address


def test_two_saes_side_by_side(page, served):
    open_page(page, served, "?page=compare", ".chart canvas")
    page.wait_for_selector("main table a")
    picture(page, served, "compare")
    no_serious_violation(page)
    page.locator("section", has_text="Matches, from best").locator("a[href*='page=compare']").first.click()
    page.wait_for_selector("h2:has-text('Nearest directions')")
    picture(page, served, "compare-latent")


def test_a_change_begins_at_a_strength_of_its_latent(page, served):
    open_page(page, served, "?page=steer", "text=largest seen")

    def largest(latent: int) -> float:
        return page.evaluate(f"fetch('/api/saes/0/brief/{latent}').then((r) => r.json())")["largest"]

    def settled(strength: float) -> None:
        page.wait_for_function(
            "(value) => Math.abs(document.querySelectorAll('.edit input')[1].value / value - 1) < 0.01",
            arg=strength,
        )

    settled(2 * largest(0))
    latent, strength = (page.locator(".edit input").nth(n) for n in (0, 1))
    latent.fill("5")
    latent.blur()
    settled(2 * largest(5))
    # One that somebody chose stays, also by its address.
    strength.fill("0.7")
    strength.blur()
    latent.fill("6")
    latent.blur()
    page.wait_for_selector(".says a:has-text('#6')")
    settled(0.7)
    page.reload()
    page.wait_for_selector(".says a:has-text('#6')")
    settled(0.7)


def test_steering_streams_both_runs(page, served):
    open_page(page, served, "?page=feature&latent=5", ".strip span")
    page.get_by_role("link", name="Steer with it").click()
    page.wait_for_selector("textarea")
    page.locator("input[name=tokens]").fill("12")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector("text=steered tokens; mean log-probability")
    picture(page, served, "steering")
    no_serious_violation(page)
    assert "edits=0%3A5%3Aclamp" in page.url
    prompt = page.locator("textarea").input_value()
    for which in ("Clean", "Steered"):
        assert len(page.get_by_label(which, exact=True).text_content()) > len(prompt)
    page.get_by_role("button", name="Add a change").click()
    page.get_by_role("button", name="Remove the change of latent 5").click()
    page.wait_for_url(re.compile("edits=0%3A0%3Aclamp"))


def test_monitor_exports_what_it_shows(page, served):
    open_page(page, served, "?page=monitor", "textarea")
    page.locator("main textarea").fill(TEXT)
    strongest = page.evaluate(STRONGEST, TEXT)
    page.locator("input[name=latents]").fill(", ".join(map(str, strongest)))
    page.get_by_role("button", name="Watch").click()
    page.wait_for_selector("text=Export JSON")
    picture(page, served, "monitor")
    no_serious_violation(page)
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export JSON").click()
    report = json.loads(saved.value.path().read_text())
    assert report["kind"] == "winnow.monitor"
    assert [each["latent"] for each in report["latents"]] == strongest
    assert "".join(report["tokens"]) == TEXT


def test_lists_are_kept_shared_by_link_and_by_file(page, served, chromium, tmp_path):
    for latent in (5, 7):
        open_page(page, served, f"?page=feature&latent={latent}", ".keeper input")
        page.get_by_label("Name of a list").fill("Old words <b>")
        page.get_by_role("button", name="Keep").click()
        page.wait_for_selector("a:has-text('in Old words <b>')")
    page.get_by_role("link", name="in Old words <b>").click()
    page.wait_for_selector("#list table a")
    assert page.locator("#list tbody tr").count() == 2
    picture(page, served, "lists")
    no_serious_violation(page)
    link = page.get_by_label("Link to this list").input_value()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download").click()
    path = tmp_path / "list.json"
    saved.value.save_as(path)
    assert json.loads(path.read_text())["latents"] == [5, 7]

    page.get_by_label("Name", exact=True).fill("Older words")
    page.get_by_role("button", name="Rename").click()
    page.wait_for_selector("h2:has-text('Older words')")
    page.get_by_label("Take out").select_option("5")
    page.wait_for_url(re.compile(r"latents=7$"))
    page.wait_for_selector("#list table a")
    assert page.locator("#list tbody tr").count() == 1
    page.reload()
    page.wait_for_selector("li:has-text('1 latent of')")
    page.get_by_role("button", name="Delete").click()
    page.wait_for_selector("text=No list is kept yet")

    # Somebody else: nothing is kept until they ask for it.
    other = chromium.new_context()
    theirs = other.new_page()
    theirs.goto(link)
    theirs.wait_for_selector("#list table a")
    assert theirs.evaluate("localStorage.getItem('lists')") is None
    theirs.get_by_role("button", name="Keep this list").click()
    theirs.wait_for_selector("li:has-text('Old words <b>')")
    assert theirs.locator("main b").count() == 0
    other.close()
    page.get_by_label("A file with a list").set_input_files(path)
    page.wait_for_selector("h2:has-text('Old words <b>')")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[", "This file is no JSON."),
        ('{"kind": "winnow.monitor"}', "This file is no list of latents."),
        ('{"kind": "winnow.latents", "name": "a", "sae": "b", "latents": [1]}', "does not say to which SAE"),
        (
            f'{{"kind": "winnow.latents", "name": "a", "sae": "{"0" * 64}", "latents": ["1"]}}',
            "not all numbers",
        ),
    ],
)
def test_a_file_that_is_no_list_is_refused(page, served, content, says, tmp_path):
    path = tmp_path / "list.json"
    path.write_text(content)
    open_page(page, served, "?page=lists", "input[type=file]")
    page.get_by_label("A file with a list").set_input_files(path)
    page.wait_for_selector(f".error:has-text('{says}')")
    assert page.evaluate("localStorage.getItem('lists')") is None


def test_a_list_of_another_sae_is_shown_as_that(page, served):
    open_page(page, served, f"?page=lists&name=Theirs&of={'0' * 64}&latents=3,900000", "#list")
    assert "an SAE that is not shown here" in page.locator("#list").text_content()
    open_page(page, served, f"?page=lists&name=Theirs&of={'0' * 64}&latents=3,x", ".error")
    assert "not all numbers" in page.locator(".error").text_content()


def test_dark_and_narrow(page, served):
    open_page(page, served, "?page=feature&latent=5", ".strip span")
    page.get_by_role("button", name="Switch between light and dark").click()
    assert page.locator("html").get_attribute("data-theme") == "dark"
    picture(page, served, "dark")
    no_serious_violation(page)
    page.set_viewport_size({"width": 380, "height": 800})
    for address in (
        "?page=map",
        "?page=feature&latent=5",
        "?page=text",
        "?page=compare",
        "?page=steer",
        "?page=monitor",
        "?page=lists",
    ):
        open_page(page, served, address, "main h1")
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= 380, address
        no_serious_violation(page)
    page.get_by_role("button", name="Switch between light and dark").click()
    open_page(page, served, "?page=feature&latent=5", ".strip span")
    picture(page, served, "phone")


def test_keyboard_only(page, served):
    open_page(page, served, "", "main table a")
    page.keyboard.press("/")
    page.keyboard.type("7")
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:has-text('Latent 7')")
    page.keyboard.press("]")
    page.wait_for_selector("h1:has-text('Latent 8')")
    page.keyboard.press("[")
    page.wait_for_selector("h1:has-text('Latent 7')")
    reach(page, "[role=tab][aria-selected=true]")
    page.keyboard.press("ArrowRight")
    page.wait_for_url(re.compile("band="))
    reach(page, ".strip")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    reach(page, "nav a[href*='page=text']")
    page.keyboard.press("Enter")
    page.wait_for_selector("textarea")
    reach(page, "main textarea")
    page.keyboard.press("Control+a")
    page.keyboard.type("Alas, poor Yorick")
    reach(page, "main form button")
    page.keyboard.press("Enter")
    page.wait_for_selector(".strip.pick")
    reach(page, ".strip.pick")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("at=1"))


def reach(page, selector: str, most: int = 120) -> None:
    """Press Tab until the element that is focused fits."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            return
    pytest.fail(f"Tab does not reach {selector}")


def test_words_of_the_corpus_are_never_markup(page, served):
    open_page(page, served, "?page=monitor", "textarea")
    page.locator("main textarea").fill("<img src=x onerror=alert(1)> <script>alert(2)</script>")
    page.locator("input[name=latents]").fill("1")
    page.get_by_role("button", name="Watch").click()
    page.wait_for_selector("text=Export JSON")
    assert page.locator("main img, main script").count() == 0
    assert "<script>" in page.locator(".strip").text_content()


def test_refusals_are_sentences(page, served):
    open_page(page, served, f"?page=feature&latent={served.latents}", ".error")
    assert f"0 to {served.latents - 1}" in page.locator(".error").text_content()
    assert any("400" in complaint for complaint in served.complaints)  # Chromium notes the status itself
    served.complaints.clear()


def test_the_two_ends_of_the_density_are_side_by_side_on_a_phone(page, served):
    page.set_viewport_size({"width": 390, "height": 844})
    open_page(page, served, "?page=map", "main table a")
    low, high = (page.locator(f"input[name={name}]").bounding_box() for name in ("low", "high"))
    assert low["y"] == high["y"]
    assert low["x"] + low["width"] < high["x"]


# Vocabularies have such tokens, of dashes or of an address, and none of them has a place to break.
@pytest.mark.parametrize("width", [1280, 380])
def test_a_token_of_sixty_letters_widens_no_page(page, served, width):
    page.set_viewport_size({"width": width, "height": 844})
    for address in ("?page=map", "?page=feature&latent=3", "embed/0/3"):
        open_page(page, served, address, "code")
        page.evaluate(
            """() => document.querySelectorAll(".token, code").forEach((token) => {
                token.textContent = " #" + "-".repeat(63);
            })"""
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width, address
        past = page.evaluate(
            """() => [...document.querySelectorAll("table")].filter(
                (table) => table.scrollWidth > table.parentElement.clientWidth + 1
            ).map((table) => table.textContent.slice(0, 80))"""
        )
        assert past == [], address
