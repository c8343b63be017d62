"""Exported latents: a page that needs nothing but itself, and JSON in the shapes that other viewers read."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator
from typer.testing import CliRunner

from tests.support.explorer_site import LATENTS, Site, make_site
from winnow.cli.main import app
from winnow.explorer.index.table import FeatureTable
from winnow.explorer.site.exhibit import Exhibit
from winnow.explorer.site.export import export, html_page, openai_bins, openai_feature, parse_latents
from winnow.schemas.errors import ConfigError


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def exhibit(site) -> Exhibit:
    return Exhibit("sae-0", site.saes[0], FeatureTable.open(f"{site.saes[0]}/features"))


class Layout(BaseModel):
    """Nothing but the fields named, each of its own kind: a float in an integer's place is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    def same_length(self, *names: str) -> None:
        assert len({len(getattr(self, name)) for name in names}) == 1, names


class OpenAISequence(Layout):
    """`SequenceInfo` of openai/sparse_autoencoder, sae-viewer/src/types.ts, without what is optional."""

    density: Annotated[float, Field(gt=0, le=1)]
    doc_id: int
    idx: Annotated[int, Field(ge=0)]
    acts: list[float]
    act: float
    tokens: list[str]
    token_ints: list[int]

    @model_validator(mode="after")
    def coherent(self):
        self.same_length("acts", "tokens", "token_ints")
        assert self.acts[self.idx] == self.act > 0
        return self


class OpenAIFeature(Layout):
    """`FeatureInfo` there; the keys of `hist` are whole numbers (components/histogram.tsx)."""

    density: float
    mean_act: float
    mean_act_squared: float
    hist: dict[Annotated[str, Field(pattern="^[1-9][0-9]*$")], float]
    random: list[OpenAISequence]
    top: list[OpenAISequence]


class NeuronpediaActivation(Layout):
    """`NeuronpediaDashboardActivation` of jbloomAus/SAEDashboard; the `dfa_` fields are optional there."""

    bin_min: float
    bin_max: float
    bin_contains: float
    tokens: list[str]
    values: Annotated[list[float], Field(min_length=1)]
    qualifying_token_index: int

    @model_validator(mode="after")
    def coherent(self):
        self.same_length("tokens", "values")
        assert self.values[self.qualifying_token_index] > 0
        return self


class NeuronpediaFeature(Layout):
    """`NeuronpediaDashboardFeature` there: the converter reads every field by name, empty lists included."""

    feature_index: int
    neuron_alignment_indices: list[int]
    neuron_alignment_values: list[float]
    neuron_alignment_l1: list[float]
    correlated_neurons_indices: list[int]
    correlated_neurons_pearson: list[float]
    correlated_neurons_l1: list[float]
    correlated_features_indices: list[int]
    correlated_features_pearson: list[float]
    correlated_features_l1: list[float]
    neg_str: list[str]
    neg_values: list[float]
    pos_str: list[str]
    pos_values: list[float]
    frac_nonzero: Annotated[float, Field(ge=0, le=1)]
    freq_hist_data_bar_values: list[float]
    freq_hist_data_bar_heights: list[float]
    logits_hist_data_bar_values: list[float]
    logits_hist_data_bar_heights: list[float]
    n_prompts_total: int
    n_tokens_in_prompt: int
    dataset: str
    decoder_weights_dist: list[float]
    activations: list[NeuronpediaActivation]

    @model_validator(mode="after")
    def coherent(self):
        self.same_length("neg_str", "neg_values")
        self.same_length("pos_str", "pos_values")
        self.same_length("freq_hist_data_bar_values", "freq_hist_data_bar_heights")
        return self


class NeuronpediaBatch(Layout):
    """`batch-N.json`: Neuronpedia's converter wants `sae_id_suffix`, which may be null."""

    model_id: str
    layer: int
    sae_set: str
    sae_id_suffix: str | None
    features: list[NeuronpediaFeature]


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
    atom = OpenAIFeature.model_validate_json((tmp_path / "openai" / "atoms" / "5.json").read_bytes())
    assert sum(atom.hist.values()) == pytest.approx(row["fires"])
    assert max(map(int, atom.hist)) == -(-row["largest"] // 0.2)
    assert [each.act for each in atom.top] == sorted((each.act for each in atom.top), reverse=True)
    found = (tmp_path / "neuronpedia" / "batch-0.json").read_bytes()
    batch = NeuronpediaBatch.model_validate_json(found)
    assert batch.layer == 1
    assert [each.feature_index for each in batch.features] == [3, 5, 6]
    dashboard = batch.features[1]
    assert dashboard.pos_str == [exhibit.table.texts[number] for number in row["promoted_ids"]]
    top, drawn = (
        [each for each in dashboard.activations if (each.bin_contains == -1) == wanted]
        for wanted in (True, False)
    )
    assert {(each.bin_min, each.bin_max) for each in top} == {(-1, row["largest"])}
    for each in drawn:
        assert each.bin_min <= each.values[each.qualifying_token_index] <= each.bin_max + 1e-6
        assert each.bin_contains == pytest.approx(dashboard.frac_nonzero / (len(row["quantiles"]) - 1))


def test_a_silent_latent_is_exported_too(exhibit):
    silent: dict[str, Any] = exhibit.table.latent(5) | {
        "latent": 5,
        "fires": 0,
        "largest": 0.0,
        "examples": [],
    }
    silent |= {"mean": 0.0, "mean_square": 0.0, "histogram": [0] * 40}
    atom = OpenAIFeature.model_validate(openai_feature(exhibit, silent))
    assert atom.hist == {}
    assert atom.top == atom.random == []


def test_counts_are_shared_between_the_viewers_bins():
    assert openai_bins([4, 2], 0.2) == [(1, pytest.approx(6))]
    assert openai_bins([3, 0, 5], 0.9) == [
        (1, pytest.approx(2)), (2, pytest.approx(1)), (4, pytest.approx(10 / 3)), (5, pytest.approx(5 / 3))
    ]  # fmt: skip
    assert sum(count for _, count in openai_bins(list(range(40)), 7.3)) == pytest.approx(780)


@pytest.mark.parametrize("text", ["", "x", "5-3", "1,,2", f"{LATENTS}", "-1", "1-"])
def test_a_wrong_list_is_refused(text):
    with pytest.raises(ConfigError, match="--latents"):
        parse_latents(text, LATENTS)


def test_lists_are_read(exhibit, tmp_path):
    assert parse_latents("3,10-12", LATENTS) == [3, 10, 11, 12]
    assert parse_latents("all", LATENTS) == list(range(LATENTS))
    assert len(export(exhibit, [0], tmp_path)) == 3
