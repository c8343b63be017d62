"""The page of one latent, for an iframe."""

from __future__ import annotations

import re

import pytest
from starlette.testclient import TestClient

from tests.support.explorer_site import LATENTS, make_site
from winnow.explorer.place import Place
from winnow.explorer.site.card import Card
from winnow.explorer.site.desk import Desk, open_desk
from winnow.explorer.site.serve import make_app


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Desk:
    site = make_site(tmp_path_factory.mktemp("site"))
    return open_desk(list(site.saes), None, Place.of(site.config_path, None), seats=4)


@pytest.fixture(scope="module")
def client(desk) -> TestClient:
    return TestClient(make_app(desk), base_url="http://127.0.0.1:8517")


def test_a_latent_is_a_page_that_pages_of_this_machine_may_frame(client):
    reply = client.get("/embed/0/7")
    assert reply.status_code == 200
    policy = reply.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'self' http://127.0.0.1:* http://localhost:*" in policy
    assert "script" not in policy
    assert "Latent 7 of sae-0" in reply.text
    assert not re.search(r"<script|<link|<img| src=", reply.text)
    assert 'href="/?page=feature&amp;sae=0&amp;latent=7"' in reply.text
    for other in ("/", "/api/site", "/embed"):
        assert "frame-ancestors 'none'" in client.get(other).headers["Content-Security-Policy"]
    for missing in (f"/embed/0/{LATENTS}", "/embed/9/7"):
        refused = client.get(missing)
        assert refused.status_code == 400
        assert "expected" in refused.json()["error"]
    assert client.get("/embed/0/x").status_code == 404


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/nothing", 404, "nothing at this address"),
        ("/docs/explorer.md", 404, "nothing at this address"),
        ("/embed/0/x", 404, "nothing at this address"),
        ("/embed/0/99999", 400, "expected"),
        ("/<b>x</b>", 404, "nothing at this address"),
    ],
)
def test_what_is_not_there_is_a_page_to_a_browser_and_json_to_a_program(client, path, status, said):
    for accept in ("*/*", "application/json"):
        reply = client.get(path, headers={"Accept": accept})
        assert reply.status_code == status
        assert said in reply.json()["error"]
    page = client.get(path, headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.status_code == status
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert said in page.text
    assert '<a class="button" href="/">To the explorer</a>' in page.text
    assert "<script" not in page.text
    assert "<b>" not in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


def test_the_api_answers_in_json_whatever_is_accepted(client):
    browser = {"Accept": "text/html"}
    for path, status in (("/api/nothing", 404), ("/api/saes/9/features/0", 400)):
        reply = client.get(path, headers=browser)
        assert reply.status_code == status
        assert reply.json()["error"]
    assert client.get("/api/saes/x/features/0", headers=browser).json()["detail"]
    refused = client.post("/nothing", headers={"Accept": "application/json"})
    assert (refused.status_code, refused.json()) == (405, {"error": "Method Not Allowed: POST"})


def test_a_browser_without_the_token_reads_a_page_that_leads_nowhere_else(desk):
    client = TestClient(make_app(desk, "secret"), base_url="http://192.0.2.1:8517")
    page = client.get("/", headers={"Accept": "text/html"})
    assert page.status_code == 401
    assert "open the address that it printed" in page.text
    assert "To the explorer" not in page.text
    assert client.get("/").json()["error"].startswith("This server needs its token")


def test_texts_of_the_corpus_are_no_markup_of_the_page(desk):
    exhibit = desk.exhibits[0]
    texts, exhibit.table.texts = exhibit.table.texts, ["<b>x</b>"] * len(exhibit.table.texts)
    try:
        page = Card.of(exhibit, 7, 2).page("/?a=1&b=2")
    finally:
        exhibit.table.texts = texts
    assert "<b>" not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
