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
    assert client.get("/embed/0/x").status_code == 422


def test_texts_of_the_corpus_are_no_markup_of_the_page(desk):
    exhibit = desk.exhibits[0]
    texts, exhibit.table.texts = exhibit.table.texts, ["<b>x</b>"] * len(exhibit.table.texts)
    try:
        page = Card.of(exhibit, 7, 2).page("/?a=1&b=2")
    finally:
        exhibit.table.texts = texts
    assert "<b>" not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
