"""A transcoder of one target in every command that takes an SAE, against what is known beforehand."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from tests.support.evaluated import D_MODEL, toy_config
from tests.support.transcoders import LATER, READ, TARGET, random_transcoder, save_transcoder
from winnow.cli.main import app
from winnow.evaluator.attribution import attribute, logit_difference, spliced_hooks, without
from winnow.evaluator.families import ablation, downstream, reconstruction, stability
from winnow.evaluator.n2g import family as n2g
from winnow.evaluator.report import evaluate_setting
from winnow.evaluator.setting import Setting
from winnow.sae import Sae
from winnow.schemas.errors import ConfigError, SaeMismatch
from winnow.schemas.evaluation import EvaluateSpec
from winnow.subject import Subject
from winnow.subject.generate import Steer, steered, steered_hooks


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_config(tmp_path_factory.mktemp("toy"), plan={"hooks": [READ, TARGET, LATER]})


def values(measured) -> dict[str, float]:
    return {figure.id: figure.value for figure in measured.figures}


def test_fvu_is_that_of_the_target(toy, tmp_path):
    uri = save_transcoder(toy, tmp_path / "sae", random_transcoder(skip=True))
    setting = Setting.open(uri, toy.root, EvaluateSpec())
    found = values(reconstruction.measure(setting))
    size = setting.dataset.plan.rows_per_unit
    x, y = (torch.from_numpy(setting.dataset.read_rows(hook, 0, size)) for hook in (READ, TARGET))
    keep = torch.from_numpy(setting.dataset.weights([READ, TARGET], 0, size)) > 0
    x, y = x[keep].double(), y[keep].double()
    guess = setting.sae.double()(x)
    fvu = (y - guess).square().sum() / (y - y.mean(0)).square().sum()
    assert found["fvu_raw"] == pytest.approx(fvu.item(), rel=1e-5)
    assert found["fvu_normalised"] == pytest.approx(fvu.item(), rel=1e-5)  # of one scale for all dimensions


def test_the_target_is_replaced_and_the_rest_is_left(toy, tmp_path):
    setting = Setting.open(
        save_transcoder(toy, tmp_path / "sae", random_transcoder()),
        toy.root,
        EvaluateSpec(windows=3, batch_windows=2),
    )
    found = values(downstream.measure(setting))
    losses = []
    for window in range(3):
        tokens = setting.tokens([window])
        rows = setting.subject.activations(tokens, [READ])[READ].flatten(0, 1)
        keep = torch.from_numpy(setting.dataset.window_weights([READ, TARGET], [window]) > 0).reshape(-1, 1)
        put = torch.where(keep, setting.sae(rows), 0.0)
        losses.append(setting.subject.loss(tokens, {TARGET: lambda y, k=keep, p=put: torch.where(k, p, y)}))
    assert found["ce_patched"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    assert found["delta_ce"] != pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("targets", [1, 2])
def test_an_ablation_takes_a_latent_out_of_every_target(toy, tmp_path, targets):
    more = {"with_targets": (LATER,)} if targets == 2 else {}
    uri = save_transcoder(toy, tmp_path / "sae", random_transcoder(targets), **more)
    spec = EvaluateSpec(windows=4, ablation_tokens=4, ablation_rows=3, ablation_latents=2)
    setting = Setting.open(uri, toy.root, spec)
    run = ablation._Passes(setting, 1, 5)
    variants = ablation.without_latents(setting.sae, run.row, torch.tensor([0]), run.written)
    found = run.logits(torch.cat([run.written[None], variants]))
    tokens = setting.tokens([1])[:, :9]
    torch.testing.assert_close(found[0], setting.subject.logits(tokens)[0, 5:], rtol=1e-4, atol=1e-4)
    rows = setting.subject.activations(tokens, [READ])[READ][0]
    code, latent = setting.sae.encode(rows)
    gone = code[5, 0] * setting.sae.W_dec[latent[5, 0]] * setting.sae.target_norm
    hooks = (TARGET, LATER)[:targets]

    def without(rows, part):
        rows = rows.clone()
        rows[5] -= part
        return rows

    parts = zip(hooks, gone.split(D_MODEL), strict=True)
    replace = {hook: lambda rows, part=part: without(rows, part) for hook, part in parts}
    expected = setting.subject.logits(tokens, replace)[0, 5:]
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-4)
    assert 0 < values(ablation.measure(setting))["ablation_sparsity"] <= 1


def test_every_family_measures_a_transcoder(toy, tmp_path):
    other = save_transcoder(toy, tmp_path / "other", random_transcoder(seed=1))
    uri = save_transcoder(toy, tmp_path / "sae", random_transcoder())
    families = ("reconstruction", "downstream", "stability", "n2g")
    spec = EvaluateSpec(metrics=families, windows=8, against=(other,), n2g_latents=4, n2g_examples=3)
    found = evaluate_setting(Setting.open(uri, toy.root, spec))
    assert tuple(found.families) == families
    assert found.figure("n2g_simulated_delta_ce").value is not None
    assert found.figure("stability_matched_cosine").value < 0.9


def test_a_layer_of_a_cross_layer_set_leaves_out_what_its_set_measures(toy, tmp_path, capsys):
    uri = save_transcoder(toy, tmp_path / "sae", random_transcoder(2), with_targets=(LATER,))
    spec = EvaluateSpec(windows=8, n2g_latents=3, n2g_examples=3, ablation_rows=2, ablation_tokens=4)
    setting = Setting.open(uri, toy.root, spec)
    assert set(values(reconstruction.measure(setting))) == {"l0", "dead_share", "dead_share_trainer"}
    measured = n2g.measure(setting)
    assert set(values(measured)) == {"n2g_recall", "n2g_precision"}
    assert "not simulated" in measured.notes[1]
    code, _, err = winnow("evaluate", uri, "--root", toy.root, "--metrics", "downstream")
    assert code == 2
    assert "predicted by several layers together" in err
    assert not (tmp_path / "sae" / "evaluation.json").exists()


def test_a_transcoder_of_other_targets_is_refused(toy, tmp_path):
    uri = save_transcoder(toy, tmp_path / "sae", random_transcoder())
    lacking = save_transcoder(toy, tmp_path / "lacking", random_transcoder(), target_hook="mlp_out.2")
    with pytest.raises(SaeMismatch, match=r"also mlp_out.2.*hooks = .mlp_out.2, resid_pre.0.: "):
        Setting.open(lacking, toy.root)
    spec = EvaluateSpec(
        against=(save_transcoder(toy, tmp_path / "b", random_transcoder(), target_hook=LATER),)
    )
    setting = Setting.open(uri, toy.root, spec)
    with pytest.raises(SaeMismatch, match=r"targets of .*expected mlp_out.0"):
        stability.measure(setting)


def winnow(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.mark.parametrize("targets", [1, 2])
def test_a_steered_transcoder_is_read_at_its_hook_and_written_at_its_targets(toy, tmp_path, targets):
    more = {"with_targets": (LATER,)} if targets == 2 else {}
    sae = Sae.load(save_transcoder(toy, tmp_path / "sae", random_transcoder(targets), **more))
    subject = Subject.load(toy.subject)
    ids = list(range(3, 12))
    rows = subject.activations([ids], [READ])[READ][0]
    codes, latents = sae.encode(rows)
    latent = int(latents[4, 0])
    steers = [Steer(sae, latent, "scale", 3.0)]
    code = torch.where(latents == latent, codes, 0.0).sum(1)
    code[0] = 0  # the first position is skipped
    added = 2 * code[:, None] * sae.W_dec[latent] * sae.target_norm
    parts = zip((TARGET, LATER)[:targets], added.split(D_MODEL, 1), strict=True)
    expected = subject.logits([ids], {hook: lambda y, part=part: y + part for hook, part in parts})
    found = subject.logits([ids], steered_hooks({READ: steers}, len(ids)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, subject.logits([ids]), atol=1e-3)
    # Token by token, with a cache.
    token = next(iter(subject.generate(ids, steer={READ: steers}, max_new_tokens=1)))
    torch.testing.assert_close(token.logits, expected[0, -1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="steered_hooks"):
        steered(steers, len(ids))
    same = subject.logits([ids], steered_hooks({READ: [Steer(sae, latent, "scale", 1.0)]}, len(ids)))
    assert torch.equal(same, subject.logits([ids]))


def test_a_transcoder_without_a_card_cannot_steer():
    with pytest.raises(ConfigError, match="without a card"):
        Steer(random_transcoder(), 0, "ablate")


@pytest.mark.parametrize("targets", [1, 2])
def test_effects_of_a_transcoder_are_slopes_along_what_it_writes(toy, tmp_path, targets):
    more = {"with_targets": (LATER,)} if targets == 2 else {}
    sae = Sae.load(save_transcoder(toy, tmp_path / "sae", random_transcoder(targets, skip=True), **more))
    subject, metric = Subject.load(toy.subject), logit_difference(5, 9)
    tokens = torch.arange(3, 12)
    clean = subject.logits(tokens[None])
    same = spliced_hooks({READ: sae}, {READ: lambda values, _: values})
    assert torch.equal(subject.logits(tokens[None], same), clean)
    found = attribute(subject, {READ: sae}, tokens[None], metric)[READ]
    places = [(position, slot) for _, position, slot in found.top(3, skip=1)]
    rows = subject.activations(tokens[None], [READ, TARGET])
    codes, latents = sae.encode(rows[READ][0])
    hooks = (TARGET, LATER)[:targets]

    def moved(position, slot, by):
        gone = by * codes[position, slot] * sae.W_dec[latents[position, slot]] * sae.target_norm

        def add(y, part):
            y = y.clone()
            y[position] += part
            return y

        parts = zip(hooks, gone.split(D_MODEL), strict=True)
        replace = {hook: lambda y, part=part: add(y, part) for hook, part in parts}
        return float(metric(subject.logits(tokens[None], replace)))

    for position, slot in places:
        slope = (moved(position, slot, 0.02) - moved(position, slot, -0.02)) / 0.04
        assert float(found.effects[0, position, slot]) == pytest.approx(slope, rel=0.03, abs=1e-4)
    lost = without(subject, READ, sae, tokens, places, metric)
    expected = [float(metric(clean)) - moved(*place, -1.0) for place in places]
    assert lost.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    if targets == 1:
        # The error is what the transcoder misses of its target.
        miss = rows[TARGET][0] - sae(rows[READ][0])
        by = [
            float(metric(subject.logits(tokens[None], {TARGET: lambda y, by=by: y + by * miss})))
            for by in (0.01, -0.01)
        ]
        slope = (by[0] - by[1]) / 0.02
        assert float(found.error.sum()) == pytest.approx(slope, rel=0.05, abs=1e-3)


def test_the_command_attributes_a_transcoder(toy, tmp_path):
    uri = save_transcoder(toy, tmp_path / "sae", random_transcoder())
    line = ("attribute", uri, "--root", toy.root, "--prompt", "the quick brown fox", "--answer", " the")
    code, out, err = winnow(*line, "--top", 3, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [effect["hook"] for effect in found["effects"]] == [READ] * 3
