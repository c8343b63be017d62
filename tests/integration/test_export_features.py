"""Exported latents: a page that needs nothing but itself, and JSON in the shapes that other viewers read."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from explorer.exhibit import Exhibit
from explorer.export import export, html_page, parse_latents
from explorer.table import FeatureTable
from schemas.errors import ConfigError
from tests.explorer_site import LATENTS, Site, make_site
from winnow import app


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def exhibit(site) -> Exhibit:
    return Exhibit("sae-0", site.saes[0], FeatureTable.open(f"{site.saes[0]}/features"))


class Outline(HTMLParser):
    """Tags that were opened, and the addresses they name."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]


def test_the_page_is_self_contained_and_escapes_the_corpus(exhibit):
    row = exhibit.table.latent(7) | {"latent": 7}
    number = row["examples"][0]["tokens"][0]
    kept = exhibit.table.texts[number]
    exhibit.table.texts[number] = "<script src=x>\"'&"
    try:
        page = html_page(exhibit, [row])
    finally:
        exhibit.table.texts[number] = kept
    outline = Outline()
    outline.feed(page)
    assert "script" not in outline.tags
    assert outline.addresses == ["#l7"]
    assert "&lt;script src=x&gt;&quot;&#x27;&amp;" in page
    assert "url(" not in page
    assert (
        f"{row['examples'][0]['values'][row['examples'][0]['position'] - row['examples'][0]['first']]:.3g}"
        in page
    )


def test_the_command_writes_all_three_forms(site, exhibit, tmp_path):
    result = CliRunner().invoke(
        app, ["export-features", site.saes[0], "--latents", "3,5-6", "--out", str(tmp_path), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["files"] == 5
    page = (tmp_path / "features.html").read_text()
    assert re.findall(r'id="l(\d+)"', page) == ["3", "5", "6"]
    row = exhibit.table.latent(5)
    atom = json.loads((tmp_path / "openai" / "atoms" / "5.json").read_text())
    assert set(atom) == {"density", "mean_act", "mean_act_squared", "hist", "random", "top"}
    assert sum(atom["hist"].values()) == row["fires"]
    for each in atom["top"] + atom["random"]:
        assert len(each["acts"]) == len(each["tokens"]) == len(each["token_ints"])
        assert each["acts"][each["idx"]] == each["act"] > 0
    batch = json.loads((tmp_path / "neuronpedia" / "batch-0.json").read_text())
    assert batch["layer"] == 1
    assert [each["feature_index"] for each in batch["features"]] == [3, 5, 6]
    dashboard = batch["features"][1]
    assert dashboard["pos_str"] == [exhibit.table.texts[number] for number in row["promoted_ids"]]
    heights, values = dashboard["freq_hist_data_bar_heights"], dashboard["freq_hist_data_bar_values"]
    assert len(heights) == len(values)
    for each in dashboard["activations"]:
        assert each["values"][each["qualifying_token_index"]] > 0
        if each["bin_min"] != -1:
            assert each["bin_min"] <= each["values"][each["qualifying_token_index"]] <= each["bin_max"] + 1e-6


@pytest.mark.parametrize("text", ["", "x", "5-3", "1,,2", f"{LATENTS}", "-1", "1-"])
def test_a_wrong_list_is_refused(text):
    with pytest.raises(ConfigError, match="--latents"):
        parse_latents(text, LATENTS)


def test_lists_are_read(exhibit, tmp_path):
    assert parse_latents("3,10-12", LATENTS) == [3, 10, 11, 12]
    assert parse_latents("all", LATENTS) == list(range(LATENTS))
    assert len(export(exhibit, [0], tmp_path)) == 3
