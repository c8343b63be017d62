"""`winnow evaluate` and `winnow compare` on SAEs whose figures are known beforehand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.support.evaluated import (
    HOOK,
    identity_sae,
    permuted,
    random_sae,
    save_sae,
    stop_after,
    toy_config,
    zero_sae,
)
from winnow.cli.main import app
from winnow.evaluator.bootstrap import figure, mean_figure
from winnow.evaluator.families import compute, downstream, reconstruction, stability
from winnow.evaluator.report import evaluate_setting, list_notes
from winnow.evaluator.setting import Setting
from winnow.sae import Sae
from winnow.schemas.errors import ConfigError, SaeMismatch
from winnow.schemas.evaluation import ComputeLaw, EvaluateSpec, Evaluation
from winnow.subject import Subject
from winnow.trainer.mesh.shard import Shard
from winnow.trainer.run.heldout import heldout_figures


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_config(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def setting_of(toy, tmp_path):
    def make(sae: Sae, name: str = "sae", **spec) -> Setting:
        uri = save_sae(toy, tmp_path / name, sae)
        return Setting.open(uri, toy.root, EvaluateSpec(**spec), subject=toy.subject)

    return make


def values(measured) -> dict[str, float]:
    return {figure.id: figure.value for figure in measured.figures}


def test_clean_loss_is_the_models_own(setting_of):
    setting = setting_of(random_sae(), windows=12)
    found = values(downstream.measure(setting))["ce_clean"]
    subject = Subject.load(setting.subject_spec)
    ids = torch.from_numpy(setting.tokens(setting.windows))
    with torch.no_grad():
        own = subject.model(input_ids=ids, labels=ids).loss.item()
    assert found == pytest.approx(own, abs=1e-4)


def test_an_identity_loses_nothing(setting_of):
    setting = setting_of(identity_sae(), windows=8)
    rebuilt = values(reconstruction.measure(setting))
    assert rebuilt["fvu_normalised"] == rebuilt["fvu_raw"] == pytest.approx(0, abs=1e-12)
    assert 0 < rebuilt["l0"] <= 16  # x or -x of each dimension, never both
    spliced = values(downstream.measure(setting))
    assert spliced["delta_ce"] == pytest.approx(0, abs=1e-6)
    assert spliced["kl"] == pytest.approx(0, abs=1e-6)
    assert spliced["loss_recovered_zero"] == pytest.approx(1, abs=1e-5)


def test_zeros_recover_nothing_by_definition(setting_of):
    spliced = values(downstream.measure(setting_of(zero_sae(), windows=8)))
    assert spliced["loss_recovered_zero"] == 0
    assert spliced["delta_ce"] != 0


def test_the_order_of_latents_does_not_matter(setting_of):
    sae = random_sae()
    found = [
        values(reconstruction.measure(setting)) | values(downstream.measure(setting))
        for setting in (setting_of(sae, windows=16), setting_of(permuted(sae), "permuted", windows=16))
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_figures_agree_with_the_trainers_and_with_plain_code(setting_of):
    setting = setting_of(random_sae())
    measured = reconstruction.measure(setting)
    found = values(measured)
    trainers = heldout_figures([Shard.alone(setting.sae)], setting.dataset, HOOK)[0]
    for name in ("fvu_normalised", "fvu_raw", "l0"):
        assert found[name] == pytest.approx(trainers[name], rel=1e-6)
    rows = torch.from_numpy(setting.dataset.read_rows(HOOK, 0, setting.dataset.plan.rows_per_unit))
    codes, chosen = setting.sae.encode(rows)
    fired = torch.bincount(chosen[codes > 0], minlength=setting.sae.latents).numpy()
    assert found["dead_share"] == (fired == 0).mean()
    assert found["dead_share_trainer"] == 0.25
    assert sum(measured.details["density_latents"]) + measured.details["density_silent"] == len(fired)
    for each in measured.figures[:3]:
        assert each.low <= each.value <= each.high
        assert each.samples == 64


def test_the_bootstrap_covers_a_known_mean_and_a_ratio_of_sums():
    draw = np.random.default_rng(0)
    inside = 0
    for seed in range(40):
        made = mean_figure("x", draw.normal(3.0, 1.0, 50), seed=seed)
        inside += made.low <= 3.0 <= made.high
    assert inside >= 33
    sizes = draw.uniform(1, 2, 400)
    ratio = figure("r", lambda a, b: a / b, 0.25 * sizes, sizes)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.25, 0.25, 0.25))
    assert figure("e", lambda a: a, np.array([])).value is None
    assert figure("z", lambda a, b: a / b, np.ones(3), np.zeros(3)).value is None


def test_fewer_windows_are_the_first_ones(setting_of):
    setting = setting_of(random_sae(), windows=5)
    windows = {int(w) for codes in setting.held_out_codes() for w in codes.windows}
    assert windows == set(range(5))
    assert values(reconstruction.measure(setting))["fvu_raw"] > 0


LAW = {"floor": 1.0, "scale": 1e15, "power": 0.1, "training_flop": 1e18, "source": "made up for a test"}


def test_compute_equivalent_inverts_the_law_and_refuses_to_guess():
    law = ComputeLaw(**LAW)
    own = compute.law_loss(law, 1e18)
    assert compute.law_compute(law, own) == pytest.approx(1e18)
    half = compute.law_loss(law, 0.5e18)
    downstream_figures = [
        mean_figure(name, np.array([v - 0.01, v, v + 0.01]))
        for name, v in (("ce_clean", own), ("ce_patched", half), ("delta_ce", half - own))
    ]
    measured = compute.measure(law, downstream_figures)
    for each in measured.figures:
        assert each.value == pytest.approx(0.5)
        assert each.low < 0.5 < each.high
    assert "made up for a test" in measured.notes[0]
    with pytest.raises(ConfigError, match="no law is guessed"):
        compute.measure(None, downstream_figures)
    hopeless = [mean_figure(f.id, np.array([0.5, 0.5])) for f in downstream_figures]
    assert compute.measure(law, hopeless).figures[0].value is None


def test_stability_is_one_for_a_permutation_and_finds_planted_pairs(setting_of, toy, tmp_path):
    sae = random_sae()
    same = save_sae(toy, tmp_path / "same", permuted(sae))
    found = values(stability.measure(setting_of(sae, against=[same])))
    assert found["stability_matched_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["stability_matched_over_0_9"] == 1
    half = permuted(sae)
    with torch.no_grad():
        half.W_dec[:24] = random_sae(seed=9).W_dec[:24]
    matched = stability.matched_cosines(sae.W_dec, half.W_dec)
    assert (matched > 0.999).sum() == 24
    assert matched.mean() < stability.cosines(sae.W_dec, half.W_dec).max(1).values.mean().item()


def winnow(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def config_file(toy, path, **evaluate):
    tree = {"root": toy.root, "subject": {"model": toy.subject.model, "device": "cpu"}, "evaluate": evaluate}
    path.write_text(yaml.safe_dump(tree))
    return path


def test_the_command_writes_resumes_and_compares(toy, tmp_path, monkeypatch):
    config = config_file(toy, tmp_path / "c.yaml", windows=8, law=LAW)
    uris = [save_sae(toy, tmp_path / name, random_sae(seed=i)) for i, name in enumerate(("one", "two"))]
    quick = ("--config", config, "--metrics", "reconstruction,compute")
    code, out, err = winnow("evaluate", uris[0], *quick)
    assert code == 0, err
    assert "fvu_normalised" in out
    assert "made up for a test" in err
    found = Evaluation.from_json((tmp_path / "one" / "evaluation.json").read_bytes(), origin="test")
    assert list(found.families) == ["reconstruction", "downstream", "compute"]
    assert found.trained_on_this
    with monkeypatch.context() as patch:
        patch.setattr("winnow.evaluator.report.MEASURES", {})  # anything measured again would fail
        code, out, err = winnow("evaluate", uris[0], *quick, "--json")
        assert code == 0, err
        assert "kept from" in err
        assert Evaluation.model_validate(json.loads(out)) == found
        for more in (("--again",), ("--windows", 4)):
            with pytest.raises(KeyError):
                evaluate_again(uris[0], toy, more)
    code, _, err = winnow("compare", *uris, "--out", tmp_path / "cmp")
    assert code == 2
    assert "winnow evaluate" in err
    assert winnow("evaluate", uris[1], *quick)[0] == 0
    code, out, err = winnow("compare", *uris, "--out", tmp_path / "cmp")
    assert code == 0, err
    assert "one" in out
    assert "loss_recovered_mean" in out
    assert (tmp_path / "cmp" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "cmp" / "frontier.svg").read_bytes()
    compared = json.loads((tmp_path / "cmp" / "compare.json").read_text())["figures"]
    assert compared["l0"][0] == found.figure("l0").model_dump(mode="json")


def evaluate_again(uri, toy, more):
    spec = EvaluateSpec(metrics=("reconstruction",), windows=4 if "--windows" in more else 8, law=LAW)
    evaluate_setting(Setting.open(uri, toy.root, spec, subject=toy.subject), again="--again" in more)


def test_a_killed_evaluation_keeps_what_was_finished(toy, tmp_path, monkeypatch):
    uri = save_sae(toy, tmp_path / "sae", random_sae())
    setting = Setting.open(uri, toy.root, EvaluateSpec(metrics=("reconstruction", "downstream"), windows=4))

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(__import__("winnow.evaluator.report", fromlist=["x"]).MEASURES, "downstream", die)
        with pytest.raises(KeyboardInterrupt):
            evaluate_setting(setting)
    kept = Evaluation.from_json((tmp_path / "sae" / "evaluation.json").read_bytes(), origin="test")
    assert list(kept.families) == ["reconstruction"]
    found = evaluate_setting(setting)
    assert found.families["reconstruction"] == kept.families["reconstruction"]
    assert "downstream" in found.families


def test_a_killed_delta_ce_resumes_with_the_window_after_the_last(toy, tmp_path, monkeypatch, told):
    uri = save_sae(toy, tmp_path / "sae", random_sae())
    setting = Setting.open(uri, toy.root, EvaluateSpec(metrics=("downstream",), windows=6, batch_windows=2))
    whole = downstream.measure(setting).figures
    stop_after(monkeypatch, downstream.AtHook, "clean", 2)
    with pytest.raises(KeyboardInterrupt):
        evaluate_setting(setting)
    assert not (tmp_path / "sae" / "evaluation.json").exists()
    told.clear()
    assert list(evaluate_setting(setting).families["downstream"].figures) == whole
    assert "downstream: resuming after 4 windows of 6" in told
    assert not (tmp_path / "sae" / "losses.json").exists()


def stored(folder) -> Evaluation:
    return Evaluation.from_json((folder / "evaluation.json").read_bytes(), origin="test")


def test_a_second_dataset_keeps_the_figures_of_the_first(toy, tmp_path, monkeypatch):
    other = toy_config(tmp_path / "other", units=1, plan={"seed": 5})
    uri = save_sae(toy, tmp_path / "sae", random_sae())
    first = ("evaluate", uri, "--root", toy.root, "--windows", 4)
    assert winnow(*first, "--metrics", "reconstruction,downstream")[0] == 0
    before = stored(tmp_path / "sae")
    code, out, err = winnow(*first[:2], "--root", other.root, "--windows", 4, "--metrics", "reconstruction")
    assert code == 0, err
    after = stored(tmp_path / "sae")
    assert list(after.families) == ["reconstruction"]
    assert after.plan_fingerprint != before.plan_fingerprint
    assert after.others == (before,)
    assert after.on(before.plan_fingerprint) == before
    shown = "".join(out.split())  # both tables, the one that was asked for last
    assert 0 < shown.index("".join(toy.root.split())) < shown.index("".join(other.root.split()))
    assert out.index("delta_ce") < out.rindex("fvu_raw")
    with monkeypatch.context() as patch:
        patch.setattr("winnow.evaluator.report.MEASURES", {})  # anything measured again would fail
        code, out, err = winnow(*first, "--metrics", "reconstruction,downstream", "--json")
    assert code == 0, err
    assert json.loads(out)["families"] == before.model_dump(mode="json")["families"]
    assert json.loads(out)["others"][0]["plan_fingerprint"] == after.plan_fingerprint


def test_other_settings_and_other_weights_keep_what_was_measured(toy, tmp_path, monkeypatch):
    uri = save_sae(toy, tmp_path / "sae", random_sae())
    command = ("evaluate", uri, "--root", toy.root, "--metrics", "reconstruction")
    assert winnow(*command, "--windows", 4)[0] == 0
    four = stored(tmp_path / "sae").families["reconstruction"]
    code, _, err = winnow(*command, "--windows", 8)
    assert code == 0
    assert "reconstruction: also measured with windows = 4" in err
    found = stored(tmp_path / "sae")
    assert found.families["reconstruction"].settings["windows"] == 8
    assert found.earlier == {"reconstruction": (four,)}
    with monkeypatch.context() as patch:
        patch.setattr("winnow.evaluator.report.MEASURES", {})
        assert winnow(*command, "--windows", 4)[0] == 0
    assert stored(tmp_path / "sae").families["reconstruction"] == four
    save_sae(toy, tmp_path / "sae", random_sae(seed=3))
    assert winnow(*command, "--windows", 4)[0] == 0
    again = stored(tmp_path / "sae")
    assert not again.earlier
    assert again.others[0].families["reconstruction"] == four


def test_a_file_of_version_1_0_is_read_and_kept(toy, tmp_path):
    uri = save_sae(toy, tmp_path / "sae", random_sae())
    setting = Setting.open(uri, toy.root, EvaluateSpec(metrics=("reconstruction",), windows=4))
    made = json.loads(evaluate_setting(setting).to_json())
    for old in (made, family := made["families"]["reconstruction"]):
        for name in ("root", "settings", "others", "earlier"):
            old.pop(name, None)
    made["version"], family["settings_sha256"] = "1.0", "0" * 64
    (tmp_path / "sae" / "evaluation.json").write_text(json.dumps(made))
    old = stored(tmp_path / "sae")
    assert json.loads(old.to_json()) == made  # nothing is added to what it said
    found = evaluate_setting(setting)
    assert found.earlier["reconstruction"] == (old.families["reconstruction"],)
    assert "settings that are not known" in " ".join(list_notes(found))


def test_saes_are_compared_on_the_dataset_that_all_have(toy, tmp_path):
    other = toy_config(tmp_path / "other", units=1, plan={"seed": 5})
    uris = [save_sae(toy, tmp_path / name, random_sae(seed=i)) for i, name in enumerate(("one", "two"))]
    for uri, roots in zip(uris, ((toy.root, other.root), (toy.root,)), strict=True):
        for root in roots:
            spec = EvaluateSpec(metrics=("reconstruction",), windows=4)
            evaluate_setting(Setting.open(uri, root, spec, subject=toy.subject))
    code, out, err = winnow("compare", *uris, "--out", tmp_path / "cmp", "--json")
    assert code == 0, err
    shared = stored(tmp_path / "one").on(stored(tmp_path / "two").plan_fingerprint)
    assert f"compared on the dataset {toy.root}" in err
    assert json.loads(out)["figures"]["l0"][0] == shared.figure("l0").model_dump(mode="json")
    (tmp_path / "one" / "evaluation.json").unlink()
    evaluate_setting(Setting.open(uris[0], other.root, spec, subject=toy.subject))
    code, _, err = winnow("compare", *uris, "--out", tmp_path / "cmp")
    assert code == 2
    assert "another plan fingerprint" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--root"),
        (("--root", "nowhere"), "nowhere"),
        (("--metrics", "compute"), "no law is guessed"),
        (("--metrics", "stability"), "--against"),
        (("--metrics", "beauty"), "metrics"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(toy, tmp_path, arguments, words):
    uri = save_sae(toy, tmp_path / "sae", random_sae())
    root = () if "--root" in arguments or not arguments else ("--root", toy.root)
    code, _, err = winnow("evaluate", uri, *root, *arguments)
    assert code == 2, err
    assert words in err
    assert not (tmp_path / "sae" / "evaluation.json").exists()


def test_an_sae_of_another_subject_hook_or_width_is_refused(toy, tmp_path):
    wide = Sae(8, 16, 2, "none")
    cases = {
        "subject": save_sae(toy, tmp_path / "a", random_sae(), seed_of="0" * 64),
        "hook": save_sae(toy, tmp_path / "b", random_sae(), hook="resid_post.0"),
        "width D": save_sae(toy, tmp_path / "c", wide),
    }
    for word, uri in cases.items():
        with pytest.raises(SaeMismatch, match=word):
            Setting.open(uri, toy.root)
        code, _, err = winnow("evaluate", uri, "--root", toy.root)
        assert code == 2
        assert word in err


def test_stability_refuses_an_sae_of_another_place(setting_of, toy, tmp_path):
    cases = {
        "subject": save_sae(toy, tmp_path / "a", random_sae(), seed_of="0" * 64),
        "hook": save_sae(toy, tmp_path / "b", random_sae(), hook="resid_post.0"),
        "width D": save_sae(toy, tmp_path / "c", Sae(8, 16, 2, "none")),
    }
    setting = setting_of(random_sae())
    for word, uri in cases.items():
        spec = setting.spec.model_copy(update={"against": (uri,)})
        with pytest.raises(SaeMismatch, match=rf"the {word} of {uri}: .* \({setting.uri}'s\), got"):
            stability.measure(replace(setting, spec=spec))


def test_a_folder_that_is_something_else_is_named_as_what_it_is(toy, tmp_path):
    uri = save_sae(toy, tmp_path / "sae", random_sae())
    train = {"out": str(tmp_path / "run"), "hook": HOOK, "latents": 32, "k": 4, "batch_rows": 64}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"root": toy.root, "train": train}))

    def refused(*arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments])
        assert done.exit_code == 2, done.output
        return done.stderr

    nothing = refused("evaluate", str(tmp_path / "none"), "--root", toy.root)
    assert "none holds no SAE: expected sae.json, got nothing there. Check the path" in nothing
    assert "expected sae.json, got a dataset" in refused("evaluate", toy.root, "--root", toy.root)
    assert "holds no dataset: expected plan.json, got an SAE" in refused("evaluate", uri, "--root", uri)
    assert "expected set.json, got one SAE" in refused("circuit", uri, "--prompt", "a")

    # What belongs to an SAE is asked for only where there is one.
    none = str(tmp_path / "none")
    for asked in (("compare", none, uri), ("explore", none), ("index", none, "--root", toy.root)):
        assert f"{none} holds no SAE: expected sae.json, got nothing there. Check the path." in refused(
            *asked
        )
    assert f"{uri} has no evaluation.json: expected an evaluated SAE" in refused("compare", uri, uri)
    assert f"Run `winnow index {uri}` first" in refused("explore", uri)
    for command in ("watch", "stop", "resume"):
        assert f"{none} is no run: expected a status.json that can be read, got none." in refused(
            command, none
        )

    # A run that still trains.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text("{}")
    run = str(tmp_path / "run")
    assert f"got a run that has published no SAE yet. `winnow watch {run}` shows it." in refused("info", run)
    told = "got a run that has published none yet. It does so at its end; `winnow watch"
    assert told in refused("evaluate", run, "--root", toy.root)
    assert told in refused("explore", run)
    assert "hook 'blocks.1.hook_resid_post' is not in the dataset" in refused(
        *("train", str(tmp_path / "run.yaml"), "--set", "train.hook=blocks.1.hook_resid_post")
    )


def test_info_describes_an_sae(toy, tmp_path):
    uri = save_sae(toy, tmp_path / "sae", random_sae(), hook=HOOK)
    done = CliRunner().invoke(app, ["info", uri])
    assert done.exit_code == 0, done.output
    for words in (HOOK, "topk, K = 6", "D = 16", str(toy.subject.model), "dead_share_last_epoch"):
        assert words in done.stdout
    done = CliRunner().invoke(app, ["info", uri, "--json"])
    assert json.loads(done.stdout)["sae"]["latents"] == 48
