"""`winnow.Latents`: what a notebook asks of an SAE gives what the explorer and the parts below give."""

from __future__ import annotations

import re

import pytest
import torch

from tests.support.explorer_site import HOOK, LATENTS, Site, make_site
from winnow import Latents, index
from winnow.explorer.site.monitor import monitor
from winnow.schemas.errors import ConfigError
from winnow.subject.generate import Steer

TEXT = "harvest grain wind chaff row order kept"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def latents(site) -> Latents:
    return Latents.open(site.saes[0], site.config_path)


def test_a_text_is_read_as_the_monitor_reads_it(latents):
    read = latents.read(TEXT, top=2)
    numbers = read.strongest(4)
    report = monitor(TEXT, latents.sae, numbers, latents.subject)
    assert read.tokens == list(report.tokens)
    for watched in report.latents:
        assert read.reading.of(watched.latent).tolist() == list(watched.values)
    totals = [sum(watched.values) for watched in report.latents]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] > 0
    # A line per token and a header; the first token is not read, and has no latents.
    lines = repr(read).splitlines()
    assert len(lines) == 1 + len(read.tokens)
    assert read.top(0) == []
    best, value = read.top(3, 1)[0]
    assert f"{best} ({value:.2f})" in lines[4]
    assert read._repr_html_().count("<tr>") == len(lines)


def test_an_ablation_lowers_what_it_says(latents):
    latent = latents.read(TEXT).strongest(1)[0]
    found = latents.ablate(TEXT, latent)
    ids = torch.tensor([latents.read(TEXT).reading.ids])
    clean = latents.subject.logits(ids)[0].softmax(1)
    assert found.rows
    at = next(at for at, pairs in enumerate(found.effect.down) if pairs)
    token, change = found.effect.down[at][0]
    assert change < 0
    assert float(clean[at, token]) >= -change


def test_a_steer_is_a_clamp_in_multiples_of_the_largest_activation(latents):
    latent = latents.read(TEXT).strongest(1)[0]
    found = latents.steer(TEXT, {latent: 3.0}, tokens=6, temperature=0)
    largest = latents.brief(latent).largest
    ids = latents.read(TEXT).reading.ids
    runs = [
        latents.subject.generate(ids, steer=steer, max_new_tokens=6, temperature=0)
        for steer in ({}, {HOOK: [Steer(latents.sae, latent, "clamp", 3.0 * largest)]})
    ]
    assert [found.clean, found.steered] == ["".join(token.text for token in run) for run in runs]
    assert repr(found.clean) in repr(found)


def test_a_card_shows_what_the_index_holds_and_escapes_it(latents):
    brief = latents.sample(1)[0]
    card = latents.show(brief.latent, examples=2)
    row = latents.exhibit.table.latent(brief.latent)
    strongest = [each for each in row["examples"] if each["band"] == -1][:2]
    assert len(re.findall(r"\n  \d", repr(card))) == len(strongest)
    assert f"up to {row['largest']:.3g}" in card.html
    assert card.html == card._repr_html_()
    assert "<script" not in card.html
    # Every tag is one of ours: the corpus and the vocabulary contain `<` and `&`.
    assert set(re.findall(r"<(/?\w+)", card.html)) <= {
        "div", "/div", "span", "/span", "strong", "/strong", "code", "/code",
    }  # fmt: skip
    promoted = latents.exhibit.words(row["promoted_ids"])
    assert len(promoted) == 5


def test_latents_are_found_by_their_tokens(latents):
    word = next(word for each in latents.sample(LATENTS) for word in each.fires_on if word.strip())
    found = latents.find(word)
    assert found
    for each in found:
        row = latents.exhibit.table.latent(each.latent)
        words = latents.exhibit.words([*row["token_ids"], *row["promoted_ids"]])
        assert any(word.lower() in text.lower() for text in words)
    assert repr(latents.table(found)).count("\n") == len(found)
    assert len(latents) == LATENTS
    assert HOOK in repr(latents)


def test_an_index_is_made_from_a_config(site, tmp_path):
    import shutil

    from winnow.schemas.features import IndexSpec

    copy = tmp_path / "sae"
    shutil.copytree(site.saes[0], copy, ignore=shutil.ignore_patterns("features"))
    with pytest.raises(ConfigError, match="holds no finished index"):
        Latents.open(copy)
    meta = index(copy, site.config, IndexSpec(top=2, logits=0))
    assert meta.latents == LATENTS
    assert Latents.open(copy).brief(3).promotes == ()


@pytest.mark.parametrize("latent", [-1, LATENTS])
def test_a_latent_that_does_not_exist_is_refused(latents, latent):
    for ask in (latents.brief, latents.show, lambda each: latents.ablate(TEXT, each),
                lambda each: latents.steer(TEXT, {each: 1.0})):  # fmt: skip
        with pytest.raises(ConfigError, match=f"0 to {LATENTS - 1}"):
            ask(latent)
