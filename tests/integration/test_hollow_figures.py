"""A figure whose sample is empty says so in words; it is no zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.evaluated import HOOK, random_sae, save_sae, toy_config, zero_sae
from winnow.evaluator import heldout, kept_losses
from winnow.evaluator.families import ablation, compute, downstream
from winnow.evaluator.heldout import measure_in_subject
from winnow.evaluator.n2g import family as n2g
from winnow.evaluator.report import evaluate_setting, list_notes, load_evaluation, tabulate
from winnow.evaluator.setting import Setting
from winnow.explorer.site.monitor import monitor
from winnow.sae import Sae
from winnow.schemas.errors import ConfigError, Unmeasurable
from winnow.schemas.evaluation import LOSSES_KEY, ComputeLaw, EvaluateSpec
from winnow.store.objects import open_store

NO_PREDICTION = "64 of 64 windows left out: no prediction follows a replaced position"
LAW = ComputeLaw(floor=1.0, scale=1e15, power=0.1, training_flop=1e18, source="made up")
SPEC = EvaluateSpec(
    metrics=("downstream", "compute", "n2g"), law=LAW, n2g_latents=4, n2g_examples=2, n2g_train_rows=64
)


@pytest.fixture(scope="module")
def last_only(tmp_path_factory):
    """A dataset of the last position of each window."""
    return toy_config(tmp_path_factory.mktemp("last"), units=1, plan={"drop_leading": 16})


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_config(tmp_path_factory.mktemp("toy"), units=1)


def test_a_splice_that_no_prediction_follows_is_not_measurable(last_only, tmp_path, told):
    uri = save_sae(last_only, tmp_path / "sae", random_sae())
    found = evaluate_setting(Setting.open(uri, last_only.root, SPEC))
    hollow = {"ce_clean", "ce_patched", "delta_ce", "kl", "loss_recovered_zero", "loss_recovered_mean"}
    hollow |= {"n2g_simulated_delta_ce", "n2g_zeroed_delta_ce", "n2g_recovered"}
    hollow |= {"compute_equivalent", "compute_equivalent_anchored"}
    for id in hollow:
        figure = found.figure(id)
        assert (figure.value, figure.low, figure.samples) == (None, None, 0)
        assert figure.note == NO_PREDICTION
    shown = {row[0]: row[1:3] for row in tabulate(found)}
    assert shown["delta_ce"] == ["none", ""]
    (line,) = [line for line in list_notes(found) if line.endswith(NO_PREDICTION)]
    assert "delta_ce, kl" in line
    summary = measure_in_subject(last_only, Sae.load(uri), Setting.open(uri, last_only.root).dataset, HOOK)
    assert "delta_ce" not in summary
    assert f"delta CE: {NO_PREDICTION}" in told


def test_windows_that_a_splice_does_not_reach_are_no_samples():
    losses = {name: np.array([3.0, 1.0, 2.0]) for name in ("clean", "sae", "zero", "mean", "kl.sae")}
    losses |= {"sae": np.array([3.0, 2.0, 2.0]), "zero": np.array([3.0, 5.0, 2.0])}
    reached = downstream.Reached(np.array([False, True, False]))
    found = {figure.id: figure for figure in downstream.figures_of(losses, reached)}
    assert (found["delta_ce"].value, found["delta_ce"].samples) == (1.0, 1)
    assert found["loss_recovered_zero"].value == 0.75
    assert found["kl"].note.startswith("2 of 3 windows left out")
    assert compute.measure(LAW, list(found.values())).figures[0].note == found["kl"].note


def test_nothing_to_simulate_is_said(toy, tmp_path, monkeypatch):
    uri = save_sae(toy, tmp_path / "sae", random_sae())
    setting = Setting.open(uri, toy.root, SPEC)
    gathered = n2g.gather

    def silent_when_held_out(*arguments, **options):
        found = gathered(*arguments, **options)
        if options["top"] == 0:
            found.firings[:] = 0
        return found

    monkeypatch.setattr(n2g, "gather", silent_when_held_out)
    # stand-ins: no trie, and no activation on the held-out windows
    monkeypatch.setattr(n2g, "learn", lambda *given: ([n2g.Trie()] * given[2], [0] * given[2]))
    found = {figure.id: figure for figure in n2g.measure(setting).figures}
    assert found["n2g_zeroed_delta_ce"].value is None
    assert "no explained latent is active" in found["n2g_zeroed_delta_ce"].note


def test_an_ablation_that_moves_nothing_is_said(toy, tmp_path):
    uri = save_sae(toy, tmp_path / "sae", zero_sae())
    spec = EvaluateSpec(ablation_tokens=4, ablation_rows=3, ablation_latents=2)
    found = {figure.id: figure for figure in ablation.measure(Setting.open(uri, toy.root, spec)).figures}
    for id in ("ablation_sparsity", "ablation_sparsity_ratio"):
        assert found[id].value is None
        assert found[id].note.startswith("3 of 3 rows left out")
    assert found["ablation_sparsity_channels"].samples == 3


def test_a_family_without_anything_to_measure_does_not_end_the_evaluation(last_only, tmp_path, told):
    dead = random_sae()
    dead.b_enc.data.fill_(-100.0)
    uri = save_sae(last_only, tmp_path / "sae", dead)
    spec = EvaluateSpec(windows=8, n2g_train_rows=64, probe_train=8, probe_test=4)
    found = evaluate_setting(Setting.open(uri, last_only.root, spec))
    assert set(found.families) == {"reconstruction", "downstream", "probes"}
    assert any(line.startswith("left out: ablation: evaluate.ablation_tokens") for line in told)
    assert any(line.startswith("left out: n2g: evaluate.n2g_examples: expected a latent") for line in told)
    # asked for by name it is an error, but only once the others are measured
    named = spec.model_copy(update={"metrics": ("ablation", "reconstruction", "n2g"), "seed": 1})
    with pytest.raises(Unmeasurable, match=r"evaluate\.ablation_tokens"):
        evaluate_setting(Setting.open(uri, last_only.root, named), out=str(tmp_path / "named"))
    assert set(load_evaluation(open_store(str(tmp_path / "named"))).families) == {"reconstruction"}


def test_a_row_is_one_sample_however_many_are_asked_for(toy, tmp_path):
    uri = save_sae(toy, tmp_path / "sae", random_sae())
    for windows, tokens, rows in ((1, 16, 1), (2, 14, 6), (2, 14, 4)):
        spec = EvaluateSpec(windows=windows, ablation_tokens=tokens, ablation_rows=max(rows, 2))
        setting = Setting.open(uri, toy.root, spec)
        drawn = ablation.sample_rows(setting, np.random.default_rng(0))
        assert len(drawn) == len(set(drawn)) == rows
        assert len({window for window, _ in drawn[:windows]}) == windows
    found = ablation.measure(Setting.open(uri, toy.root, EvaluateSpec(windows=1))).figures[0]
    assert (found.samples, found.low, found.high) == (1, None, None)


def test_a_text_without_a_position_that_is_read_is_refused(toy, tmp_path):
    setting = Setting.open(save_sae(toy, tmp_path / "sae", random_sae()), toy.root)
    ids = setting.subject.tokenizer.encode("two words", add_special_tokens=False)
    with pytest.raises(ConfigError, match=rf"more than {len(ids)} tokens"):
        monitor("two words", setting.sae, [3], setting.subject, drop_leading=len(ids))
    with torch.no_grad():
        assert monitor("two words", setting.sae, [3], setting.subject, drop_leading=0).read[0]


def test_a_measurement_that_was_stopped_resumes_with_the_same_bits(toy, tmp_path, monkeypatch, told):
    uri = save_sae(toy, tmp_path / "sae", random_sae())
    sae, out, store = Sae.load(uri), open_store(uri), Setting.open(uri, toy.root).dataset
    whole = measure_in_subject(toy, sae, store, HOOK)
    monkeypatch.setattr(kept_losses, "WRITE_SECONDS", 0)
    run, seen = downstream.AtHook.clean, []

    def clean(self, store, windows, *, logits):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(windows))
        return run(self, store, windows, logits=logits)

    with monkeypatch.context() as stopped:
        stopped.setattr(downstream.AtHook, "clean", clean)
        with pytest.raises(KeyboardInterrupt):
            measure_in_subject(toy, sae, store, HOOK, out)
    told.clear()
    assert measure_in_subject(toy, sae, store, HOOK, out) == whole
    assert f"delta CE: resuming after {sum(seen)} windows of 64" in told
    # those of another version, of another SAE, and what is no document, are measured again
    with monkeypatch.context() as later:
        later.setattr(heldout.metadata, "version", lambda _: "99.0")
        told.clear()
        measure_in_subject(toy, sae, store, HOOK, out)
        assert not any("resuming" in line for line in told)
    other = random_sae(seed=1)
    save_sae(toy, tmp_path / "other", other)
    for found in (out.get(LOSSES_KEY), b"{"):
        there = open_store(str(tmp_path / "other"))
        there.put(LOSSES_KEY, found)
        told.clear()
        measure_in_subject(toy, Sae.load(there.uri), store, HOOK, there)
        assert not any("resuming" in line for line in told)
