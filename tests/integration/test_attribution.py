"""Attribution against finite differences, ablation against rows without the latent, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from tests.support.evaluated import HOOK, random_sae, save_sae, toy_config
from winnow.cli.main import app
from winnow.evaluator.attribution import attribute, logit_difference, spliced, without
from winnow.evaluator.families.ablation import without_latents
from winnow.evaluator.setting import Setting
from winnow.sae import Sae
from winnow.schemas.errors import ConfigError, SaeMismatch
from winnow.schemas.training import SaeParts

LOWER = "resid_post.0"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    config = toy_config(folder, units=1)
    uri = save_sae(config, folder / "sae", random_sae())
    return Setting.open(uri, config.root), uri, config.root


@pytest.fixture(scope="module")
def tokens(toy):
    return torch.from_numpy(toy[0].tokens([0])[0, :12])


def unchanged(values, _):
    return values


def test_a_splice_that_changes_nothing_changes_no_bit(toy, tokens):
    setting = toy[0]
    clean = setting.subject.logits(tokens[None])
    assert torch.equal(setting.subject.logits(tokens[None], {HOOK: spliced(setting.sae, unchanged)}), clean)


def test_effects_are_the_slope_of_the_metric_along_each_code(toy, tokens):
    setting, metric = toy[0], logit_difference(5, 9)
    sae = setting.sae
    found = attribute(setting.subject, {HOOK: sae}, tokens[None], metric)[HOOK]
    places = found.top(6, skip=1)
    assert len(places) == 6
    assert all(position > 0 for _, position, _ in places)
    for _, position, slot in places:

        def scaled(values, _, by, position=position, slot=slot):
            changed = values.clone()
            changed[position, slot] *= 1 + by
            return changed

        told = [
            metric(
                setting.subject.logits(
                    tokens[None], {HOOK: spliced(sae, lambda v, i, by=by: scaled(v, i, by))}
                )
            )
            for by in (0.02, -0.02)
        ]
        slope = (told[0] - told[1]) / 0.04
        torch.testing.assert_close(found.effects[0, position, slot], slope, rtol=0.03, atol=2e-5)
    assert sae.W_dec.grad is None
    assert sae.W_enc.grad is None


def test_the_effects_of_all_parts_of_a_row_add_up(toy, tokens):
    """They make up the row, but for what decode holds beside the latents: so do their slopes."""
    setting, metric = toy[0], logit_difference(5)
    sae = setting.sae
    found = attribute(setting.subject, {HOOK: sae}, tokens[None], metric)[HOOK]
    rows = setting.subject.activations(tokens[None], [HOOK])[HOOK][0]
    constant = sae.decode(torch.zeros(len(rows), 1), torch.zeros(len(rows), 1, dtype=torch.int64), like=rows)

    def moved(by):
        def replace(x):
            return x + by * (x - constant)

        return metric(setting.subject.logits(tokens[None], {HOOK: replace}))

    whole = (moved(0.01) - moved(-0.01)) / 0.02
    torch.testing.assert_close(found.effects.sum() + found.error.sum(), whole, rtol=0.02, atol=1e-4)


def test_a_lower_latent_counts_what_it_does_by_way_of_a_higher_one(toy, tokens):
    setting, metric = toy[0], logit_difference(5, 9)
    both = {LOWER: random_sae(seed=3), HOOK: setting.sae}
    alone = attribute(setting.subject, {LOWER: both[LOWER]}, tokens[None], metric)
    found = attribute(setting.subject, both, tokens[None], metric)
    assert set(found) == {LOWER, HOOK}
    torch.testing.assert_close(found[LOWER].effects, alone[LOWER].effects, rtol=1e-4, atol=1e-6)


def test_what_is_lost_without_a_latent_is_found_by_running_without_it(toy, tokens):
    setting, metric = toy[0], logit_difference(5)
    places = [(2, 0), (7, 3), (7, 0)]
    found = without(setting.subject, HOOK, setting.sae, tokens, places, metric, batch=2)
    clean = metric(setting.subject.logits(tokens[None]))
    for (position, slot), lost in zip(places, found, strict=True):

        def replace(rows, position=position, slot=slot):
            rows = rows.clone()
            rows[position] = without_latents(setting.sae, rows[position], torch.tensor([slot]))[0]
            return rows

        expected = clean - metric(setting.subject.logits(tokens[None], {HOOK: replace}))
        assert float(lost) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)


def test_what_cannot_be_spliced_in_is_refused(toy, tokens):
    subject, metric = toy[0].subject, logit_difference(5)
    joined = Sae(32, 32, 4, "none", SaeParts(widths=(16, 16)))
    unknown = Sae(16, 32, 4, "none", SaeParts(d_out=16, target_normalize="dataset"))
    with pytest.raises(SaeMismatch, match="spliced_hooks"):
        spliced(unknown, unchanged)
    with pytest.raises(SaeMismatch, match="without a card"):
        attribute(subject, {HOOK: unknown}, tokens[None], metric)
    with pytest.raises(SaeMismatch, match=r"width D .*expected 16"):
        attribute(subject, {HOOK: joined}, tokens[None], metric)
    with pytest.raises(SaeMismatch, match=r"width D .*expected 16"):
        attribute(subject, {HOOK: Sae(8, 32, 4, "none")}, tokens[None], metric)
    with pytest.raises(ConfigError, match="scalar"):
        attribute(subject, {HOOK: toy[0].sae}, tokens[None], lambda logits: logits[:, -1])
    with pytest.raises(ConfigError, match="one or more"):
        attribute(subject, {}, tokens[None], metric)


def test_the_command_prints_effects_and_names_bad_tokens(toy):
    _, uri, root = toy
    runner = CliRunner()
    line = ["attribute", uri, "--root", root, "--prompt", "the quick brown fox jumps", "--top", "4"]
    done = runner.invoke(app, [*line, "--answer", " the", "--against", " a", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["effects"]) == 4
    sizes = [abs(effect["first_order"]) for effect in found["effects"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 0
    assert runner.invoke(app, [*line, "--answer", " the"]).exit_code == 0
    for wrong in (["--answer", " wherefore art thou"], ["--answer", " the", "--skip", "99"]):
        refused = runner.invoke(app, [*line, *wrong])
        assert refused.exit_code == 2
        assert "expected" in refused.output
