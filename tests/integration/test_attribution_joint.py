"""Attribution by crosscoders of one subject and of two, and by the chosen rows of a window."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.support.crosscoders import HOOKS, WIDTHS, make_pair, random_crosscoder, save_crosscoder
from tests.support.evaluated import random_sae, save_sae
from winnow.cli.main import app
from winnow.evaluator.attribution import attribute, logit_difference
from winnow.evaluator.attribution_joint import JointCode, attribute_joint, without_joint
from winnow.evaluator.setting import Setting
from winnow.sae import Sae
from winnow.schemas.base import sha256_hex
from winnow.schemas.derived import DeriveRule
from winnow.schemas.errors import ConfigError, SaeMismatch
from winnow.schemas.training import SaeIdentity

METRIC = logit_difference(5, 9)
NAMES = ("base", "chat")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    plan = {"hooks": ["resid_post.1", "mlp_out.0"]}
    return make_pair(tmp_path_factory.mktemp("pair"), units=1, plan=plan)


@pytest.fixture(scope="module")
def setting(pair, tmp_path_factory) -> Setting:
    config, uri = save_crosscoder(pair, tmp_path_factory.mktemp("sae"), random_crosscoder())
    return Setting.open(uri, config.root)


@pytest.fixture(scope="module")
def tokens(setting):
    return torch.from_numpy(setting.tokens([0])[0, :12])


@pytest.mark.parametrize("name", NAMES)
def test_a_code_that_is_not_changed_changes_no_bit(setting, tokens, name):
    code = JointCode(setting.subjects, setting.sae, tokens[None])
    replace = code.replacements(name, lambda values, _: values)
    assert list(replace) == ["resid_post.1"]
    subject = setting.subjects[name]
    assert torch.equal(subject.logits(tokens[None], replace), subject.logits(tokens[None]))


@pytest.mark.parametrize("name", NAMES)
def test_effects_are_the_slope_of_each_subjects_metric_along_each_code(setting, tokens, name):
    found = attribute_joint(setting.subjects, setting.sae, tokens[None], METRIC, name=name)
    code = JointCode(setting.subjects, setting.sae, tokens[None])
    for _, position, slot in found.top(4, skip=1):

        def told(by, position=position, slot=slot):
            def scaled(values, _):
                changed = values.clone()
                changed[position, slot] *= 1 + by
                return changed

            return METRIC(setting.subjects[name].logits(tokens[None], code.replacements(name, scaled)))

        slope = (told(0.002) - told(-0.002)) / 0.004
        torch.testing.assert_close(found.effects[0, position, slot], slope, rtol=0.03, atol=2e-4)


def test_what_is_lost_is_found_by_taking_the_direction_from_the_row(setting, tokens):
    subject, sae = setting.subjects["chat"], setting.sae
    rows = [setting.subjects[name].activations(tokens[None], ["resid_post.1"]) for name in NAMES]
    x = torch.cat([each["resid_post.1"][0] for each in rows], dim=1)
    values, indices = sae.encode(x)
    places = [(3, 0), (7, 2)]
    found = without_joint(setting.subjects, sae, tokens, places, METRIC, name="chat")
    for (position, slot), lost in zip(places, found, strict=True):
        direction = sae.W_dec[indices[position, slot], WIDTHS[0] :]

        def cut(rows, position=position, taken=values[position, slot] * direction):
            rows = rows.clone()
            rows[position] -= taken
            return rows

        expected = METRIC(subject.logits(tokens[None])) - METRIC(
            subject.logits(tokens[None], {"resid_post.1": cut})
        )
        assert float(lost) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)


def test_a_hook_is_set_to_what_the_crosscoder_says_of_it_whatever_happened_below(pair, tokens, tmp_path):
    config, hooks = pair[0], ("mlp_out.0", "resid_post.1")
    sae = random_crosscoder((16, 16))
    uri = save_sae(config, tmp_path / "sae", sae, hook=hooks[0], with_hooks=hooks[1:])
    setting = Setting.open(uri, config.root)
    subjects = {"": setting.subject}
    found = attribute_joint(subjects, Sae.load(uri), tokens[None], METRIC)
    # The lower hook's direction is overwritten at the higher one: effects are those of the higher alone.
    with torch.no_grad():
        sae.W_dec[:, :16] = 0
    alone = save_sae(config, tmp_path / "alone", sae, hook=hooks[0], with_hooks=hooks[1:])
    other = attribute_joint(subjects, Sae.load(alone), tokens[None], METRIC)
    assert found.effects.abs().max() > 1e-3
    torch.testing.assert_close(found.effects, other.effects, rtol=1e-4, atol=1e-6)


def test_a_subject_that_it_does_not_write_to_is_refused(setting, tokens):
    code = JointCode(setting.subjects, setting.sae, tokens[None])
    with pytest.raises(ConfigError, match="one that the SAE writes to"):
        code.replacements("other", lambda values, _: values)


def test_an_sae_of_differences_in_one_subject_is_run_on_neither(setting, tokens):
    sae = Sae.load(setting.uri)
    plans = {name: part.plan for name, part in setting.dataset.parts.items()}
    minus = DeriveRule(minus=sha256_hex(b"another dataset"))

    def identity(name: str, *rules: DeriveRule) -> dict[str, object]:
        subject = plans[name].subject
        return {
            "plan_fingerprint": plans[name].fingerprint,
            "dataset_sha256": None,
            "subject_model": subject.model,
            "subject_weights_sha256": subject.weights_sha256,
            "derived": rules,
        }

    roots = {"base": identity("base"), "chat": identity("chat", minus)}
    of_both = SaeIdentity.model_validate(identity("base") | {"roots": roots})
    sae.card = sae.card.model_copy(update={"identity": of_both})
    for name in NAMES:
        with pytest.raises(SaeMismatch, match="expected the subject's own rows"):
            attribute_joint(setting.subjects, sae, tokens[None], METRIC, name=name)
        with pytest.raises(SaeMismatch, match="expected the subject's own rows"):
            without_joint(setting.subjects, sae, tokens, [(3, 0)], METRIC, name=name)


# ---- the command ---------------------------------------------------------------------------------


def ask(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["attribute", *map(str, words)])
    return done.exit_code, done.stdout, " ".join(done.stderr.split())


def test_the_command_has_a_table_for_each_subject(setting):
    words = (setting.uri, "--prompt", "the quick brown fox jumps", "--answer", " the", "--top", 4)
    code, out, err = ask(*words, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["hooks"] == list(HOOKS)
    # the plan drops the first position of every window
    assert found["rows"] == "every position of the prompt but for the first 1"
    assert set(found["subjects"]) == set(NAMES)
    base, chat = (found["subjects"][name] for name in NAMES)
    assert len(base["effects"]) == len(chat["effects"]) == 4
    assert base["metric"] != chat["metric"]
    code, out, err = ask(*words)
    assert code == 0, err
    assert "base: log P(' the')" in out + err
    assert "counted: every position of the prompt but for the first 1" in err
    assert ask(*words, "--skip", 0)[2].endswith("counted: every position of the prompt")


def test_rows_choose_the_positions_of_a_window_that_count(pair, tmp_path):
    config = pair[0]
    uri = save_sae(config, tmp_path / "sae", random_sae())
    setting = Setting.open(uri, config.root)
    window, at = 3, 14
    ids = torch.from_numpy(setting.tokens([window])[0])
    metric = logit_difference(int(ids[at]))
    every = attribute(setting.subject, {"resid_post.1": setting.sae}, ids[None, :at], metric)["resid_post.1"]
    labels = setting.dataset.unit_labels(0)["offset"][window, :at].astype(np.int64)
    read = setting.dataset.window_weights(["resid_post.1"], [window])[0, :at] > 0
    words = (uri, "--root", config.root, "--window", window, "--at", at)
    for rows, counted in (("{}", read), ("{min_offset: 9}", read & (labels >= 9))):
        assert counted.any()
        code, out, err = ask(*words, "--rows", rows, "--json")
        assert code == 0, err
        found = json.loads(out)
        assert found["rows"] == ("all rows" if rows == "{}" else "min_offset=9")
        keep = torch.from_numpy(counted)
        assert found["latents"] == pytest.approx(float(every.effects[0][keep].sum()), rel=1e-3, abs=1e-5)
        assert found["error"] == pytest.approx(float(every.error[0][keep].sum()), rel=1e-3, abs=1e-5)
        assert {effect["position"] for effect in found["effects"]} <= set(np.flatnonzero(counted).tolist())
    assert ask(*words, "--rows", "{}")[0] == 0
    found = json.loads(ask(*words, "--rows", "{min_offset: 9}", "--skip", 5, "--json")[1])
    assert found["rows"] == "min_offset=9 but for the first 5"
    assert all(effect["position"] >= 5 for effect in found["effects"])


def test_a_crosscoder_reads_windows_too(setting):
    code, out, err = ask(setting.uri, "--window", 0, "--at", 9, "--rows", "{min_offset: 1}", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["at"], found["rows"]) == (9, "min_offset=1")
    assert set(found["subjects"]) == set(NAMES)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--prompt TEXT or --window N, one of them"),
        (("--prompt", "the", "--window", 1), "one of them"),
        (("--prompt", "the fox"), "--answer: expected a token"),
        (("--prompt", "the fox", "--answer", " the", "--rows", "{}"), "whose tokens have no labels"),
        (("--window", 99_999), "--window: expected 0 to"),
        (("--window", 0, "--at", 99), "--at: expected 1 to"),
        (
            ("--window", 0, "--at", 9, "--rows", "{roles: [assistant]}"),
            "of those with roles=assistant, got none",
        ),
        (("--window", 0, "--at", 1, "--rows", "{}"), "a row before position 1, got none"),
        (("--window", 0, "--rows", "{roles: [nobody]}"), "rows.roles"),
    ],
)
def test_what_cannot_be_attributed_is_refused_in_words(pair, setting, words, says):
    code, _, err = ask(setting.uri, *words)
    assert code == 2
    assert says in err
