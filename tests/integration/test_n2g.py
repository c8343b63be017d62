"""N2G on a tiny subject whose SAE holds latents with known explanations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.support.evaluated import D_MODEL, HOOK, random_sae, save_sae, toy_config
from winnow.evaluator import explanations
from winnow.evaluator.activations import gather
from winnow.evaluator.n2g import family as n2g
from winnow.evaluator.n2g import learn as n2g_learn
from winnow.evaluator.n2g.tries import WILDCARD
from winnow.evaluator.report import evaluate_setting
from winnow.evaluator.setting import Setting
from winnow.sae import Sae
from winnow.schemas.errors import ConfigError
from winnow.schemas.evaluation import EvaluateSpec
from winnow.store import ActivationStore
from winnow.subject import Subject

SPEC = {"n2g_latents": 6, "n2g_examples": 4, "n2g_train_rows": 1000, "n2g_positives": 8, "windows": 24}
KNOWN = 3
"""The latent that stands for one token."""


def token_sae(config) -> tuple[Sae, int]:
    """A random SAE, but latent KNOWN is a steep linear detector of the commonest token."""
    dataset = ActivationStore.open(config.root)
    subject = Subject.load(config.subject)
    tokens = np.concatenate([dataset.unit_tokens(unit) for unit in range(2)]).astype(np.int64)
    rows = subject.activations(tokens, [HOOK])[HOOK][:, 1:].reshape(-1, D_MODEL)
    flat = torch.from_numpy(tokens[:, 1:].reshape(-1))
    token = int(flat.mode().values)
    x = torch.nn.functional.normalize(rows - rows.mean(1, keepdim=True), dim=1)
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    target = (flat == token).float()[:, None]
    weight = torch.linalg.lstsq(design.T @ design + 1e-3 * torch.eye(17), design.T @ target).solution[:, 0]
    sae = random_sae()
    with torch.no_grad():
        sae.b_pre.zero_()
        sae.W_enc[KNOWN] = 40 * weight[:-1]
        sae.b_enc[KNOWN] = 40 * (weight[-1] - 0.5)
    return sae, token


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    config = toy_config(folder, units=2)
    sae, token = token_sae(config)
    uri = save_sae(config, folder / "sae", sae)
    return lambda **more: Setting.open(uri, config.root, EvaluateSpec(**{**SPEC, **more})), token


@pytest.fixture(scope="module")
def explained(made):
    setting = made[0]()
    units = n2g.train_units(setting)
    found = gather(setting.codes(units), 48, top=4, positives=0, context=17)
    return setting, n2g.explain(setting, found, np.array([KNOWN, 7]))


def test_a_latent_that_stands_for_a_token_is_explained_by_it(made, explained):
    setting, result = explained
    patterns = result.tries[0].patterns()
    assert made[1] in {pattern[-1] for pattern, _, _ in patterns}
    tokens = setting.tokens(setting.windows)
    fired = n2g.fire(result.tries, tokens, setting.dataset.window_weights([HOOK], list(setting.windows)) > 0)
    lookup = n2g.Lookup(setting.held_out_codes(), result.latents, 48, 17)
    held_out = gather(setting.held_out_codes(), 48, top=0, positives=8, context=17)
    recall, precision, facts = n2g.score_tries(result, fired, lookup, held_out, tokens)
    assert facts[0]["positives"] == 8
    places = {(int(w), int(p)) for w, p, slot in zip(*fired[:3], strict=True) if slot == 0}
    positives = {(w, p) for _, w, p in held_out.positives.of(KNOWN)}
    assert recall[0] == len(positives & places) / 8
    mine = fired.slots == 0
    rows = {
        (int(w), int(p)): KNOWN in row[value > 0].tolist()
        for codes in setting.held_out_codes()
        for w, p, row, value in zip(codes.windows, codes.positions, codes.indices, codes.values, strict=True)
    }
    right = [rows[int(w), int(p)] for w, p in zip(fired.windows[mine], fired.positions[mine], strict=True)]
    assert precision[0] == pytest.approx(np.mean(right))
    assert facts[0]["firings"] == len(right)


def test_the_scale_minimises_the_squared_error_on_the_training_rows(explained):
    setting, result = explained
    units = n2g.train_units(setting)
    windows = n2g.unit_windows(setting, units)
    dense = np.zeros((len(windows), 17, 2))
    for codes in setting.codes(units):
        for slot, latent in enumerate(result.latents):
            hit = torch.where(codes.indices == latent, codes.values, 0).sum(1).numpy()
            dense[codes.windows - windows.start, codes.positions, slot] = hit
    tokens = setting.tokens(windows)
    for slot in range(2):
        s = np.zeros(tokens.shape)
        for w in range(len(tokens)):
            for p in range(1, 17):
                s[w, p] = result.tries[slot].predict(tokens[w].tolist(), p) or 0
        expected = (s * dense[..., slot]).sum() / np.square(s).sum()
        assert result.scales[slot] == pytest.approx(expected, rel=1e-4)


def test_truncation_and_wildcards_follow_a_made_up_latent(made, monkeypatch):
    setting, _ = made[0](), None
    calls = []

    def values(_, trials, label):  # active where 11 stands two before a 13
        calls.append(label)
        return [float(len(ids) >= 3 and ids[-3] == 11 and ids[-1] == 13) for _, ids in trials]

    monkeypatch.setattr(n2g_learn, "trial_values", values)
    example = n2g_learn.Example(0, 5, [9, 9, 11, 12, 13], 1.5)
    hopeless = n2g_learn.Example(1, 6, [1, 2, 3], 1.0)
    tokens = np.array([[20, 21, 22]])
    tries, used = n2g_learn.learn(setting, [example, hopeless], 3, tokens)
    assert tries[0].patterns() == [((11, WILDCARD, 13), 1.0, 1)]
    assert used == [1, 0, 0]
    assert [trie.patterns() for trie in tries[1:]] == [[], []]
    assert {label.partition(",")[0] for label in calls} == {
        "n2g truncation", "n2g wildcards", "n2g substitution"
    }  # fmt: skip
    assert not any("length 8" in label for label in calls), "no more is run than the examples are long"


def test_neighbours_are_the_nearest_other_tokens_of_the_corpus(made):
    setting = made[0]()
    vocabulary = np.arange(10, 60)
    found = n2g_learn.neighbours(setting, [12], vocabulary)[12]
    weight = torch.nn.functional.normalize(setting.subject.model.get_input_embeddings().weight, dim=1)
    scores = (weight[10:60] @ weight[12]).detach()
    scores[2] = -2
    assert set(found) == set((scores.topk(4).indices + 10).tolist())


def test_simulating_with_the_truth_costs_nothing_and_zeroing_is_no_simulation(made):
    setting = made[0]()
    latents = np.array([KNOWN, 7])
    lookup = n2g.Lookup(setting.held_out_codes(), latents, 48, 17)
    places = np.array([(w, p, s) for w in range(24) for p in range(1, 17) for s in range(2)]).T
    true = lookup.at(*places)
    on = true > 0
    fired = n2g.Firings(*places[:, on], true[on].astype(float))
    perfect = n2g.Explained(latents, [n2g.Trie(), n2g.Trie()], np.ones(2), [0, 0])
    figures, losses = n2g.simulate(setting, perfect, fired)
    found = {figure.id: figure.value for figure in figures}
    # stored rows are bfloat16, the subject's are float32: the same latents, about the same values
    assert abs(found["n2g_simulated_delta_ce"]) < 0.05 * abs(found["n2g_zeroed_delta_ce"]) + 1e-3
    assert losses["zeroed"] != losses["sae"]


def test_the_family_end_to_end(made):
    measured = n2g.measure(made[0]())
    found = {figure.id: figure for figure in measured.figures}
    assert 0 <= found["n2g_recall"].value <= 1
    assert 0 <= found["n2g_precision"].value <= 1
    assert found["n2g_recall"].samples == 6
    assert len(measured.details["latents"]) == 6
    shown = measured.details["latents"][0]
    assert {"patterns", "top", "density", "recall", "precision"} <= set(shown)
    assert "of the" in measured.notes[0]


def test_the_page_shows_explanations_beside_windows_and_remarks(made, tmp_path):
    setting = made[0](metrics=("n2g",))
    evaluation = evaluate_setting(setting, out=str(tmp_path / "evaluated"))
    first = evaluation.families["n2g"].details["latents"][0]
    (tmp_path / "remarks.yaml").write_text(f"{first['latent']}: Reads like grain.\nsummary: All of it.\n")
    arguments = [str(tmp_path / "evaluated"), "--root", setting.dataset.store.uri, "--latents", "3"]
    arguments += ["--out", str(tmp_path / "page.md"), "--remarks", str(tmp_path / "remarks.yaml")]
    app = typer.Typer()
    app.command()(explanations.main)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "page.md").read_text()
    assert text.count("\n## Latent ") == 3
    assert "Reads like grain." in text
    assert "All of it." in text
    value, window, position = (first["top"][0][name] for name in ("value", "window", "position"))
    token = setting.subject.tokenizer.decode([int(setting.dataset.tokens(window)[position])]).strip()
    assert f"- {value:.3f}, window {window}: " in text
    assert f"**{explanations._plain(token) or '␣'}**" in text
    result = CliRunner().invoke(app, [str(tmp_path), "--root", setting.dataset.store.uri])
    assert result.exit_code == 2


def test_all_latents_can_be_asked_for_and_none_that_is_often_active_is_refused(made):
    setting = made[0](n2g_latents=None)
    found = gather(setting.codes(n2g.train_units(setting)), 48, top=4, positives=0, context=17)
    often = n2g.choose(found, None, 4, 0)
    assert len(often) == ((found.top.windows >= 0).sum(1) == 4).sum() > 6
    with pytest.raises(ConfigError, match="n2g_examples"):
        n2g.choose(found, 6, 500, 0)
