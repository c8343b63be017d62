"""Transcoder sets in every command that takes one, against what is computed by hand."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from tests.support.evaluated import stop_after, toy_config
from tests.support.sets import publish_set, random_set
from winnow.cli.main import app
from winnow.evaluator.families import sets
from winnow.evaluator.report import evaluate_setting, find_common_dataset, tabulate_several
from winnow.evaluator.set_setting import SetSetting
from winnow.sae import Sae, TranscoderSet
from winnow.schemas.base import sha256_hex
from winnow.schemas.errors import ConfigError
from winnow.schemas.evaluation import EvaluateSpec, Evaluation
from winnow.schemas.layers import SetSpec
from winnow.store.objects import open_store

LAYERS = 3


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    hooks = [*SetSpec(layers=(0, LAYERS - 1)).hooks, "resid_post.1"]
    return toy_config(tmp_path_factory.mktemp("toy"), plan={"hooks": hooks})


@pytest.fixture(scope="module", params=["plt", "clt"])
def published(request, toy, tmp_path_factory) -> str:
    return publish_set(toy, tmp_path_factory.mktemp(request.param) / "set", cross=request.param == "clt")


def values(measured) -> dict[str, float]:
    return {figure.id: figure.value for figure in measured.figures}


def winnow(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


# ---- evaluate ------------------------------------------------------------------------------------


def test_the_fit_of_every_layer_is_that_of_what_all_layers_predict(toy, published):
    setting = SetSetting.open(published, toy.root)
    found = values(sets.reconstruction(setting))
    whole, store = TranscoderSet.load(published), setting.dataset
    size = store.plan.rows_per_unit
    keep = torch.from_numpy(store.weights(whole.of.hooks, 0, size)) > 0
    rows = {hook: torch.from_numpy(store.read_rows(hook, 0, size))[keep] for hook in whole.of.hooks}
    reads = {layer: rows[whole.of.read_hook(layer)] for layer in whole.layers}
    given, codes = whole(reads), whole.encode(reads)
    errors, spreads = [], []
    for layer in whole.layers:
        true = rows[f"mlp_out.{layer}"].double()
        errors.append((true - given[layer]).square().sum().item())
        spreads.append((true - true.mean(0)).square().sum().item())
        assert found[f"fvu_raw.{layer}"] == pytest.approx(errors[-1] / spreads[-1], rel=1e-5)
        active = codes[layer][0] > 0
        assert found[f"l0.{layer}"] == pytest.approx(active.sum().item() / len(active))
        silent = 1 - len(codes[layer][1][active].unique()) / whole[layer].latents
        assert found[f"dead_share.{layer}"] == pytest.approx(silent)
    assert found["fvu_raw"] == pytest.approx(sum(errors) / sum(spreads), rel=1e-5)
    assert found["l0"] == pytest.approx(sum(found[f"l0.{layer}"] for layer in whole.layers))


def test_all_mlps_replaced_at_once_are_predicted_from_the_changed_stream(toy, published):
    setting = SetSetting.open(published, toy.root, EvaluateSpec(windows=2, batch_windows=2))
    measured = sets.downstream(setting)
    found, whole, subject = values(measured), setting.whole, setting.subject
    tokens = torch.from_numpy(setting.tokens(setting.windows))
    weights = setting.dataset.window_weights(whole.of.hooks, list(setting.windows))
    keep = torch.from_numpy(weights > 0).reshape(-1, 1)
    clean = subject.loss(tokens).mean().item()
    assert found["ce_clean"] == pytest.approx(clean, abs=1e-5)
    replace, reads = {}, {}
    for layer in whole.layers:
        # Layer by layer: the stream that this layer reads, with all MLPs below replaced already.
        hook = whole.of.read_hook(layer)
        seen = {}

        def look(x, layer=layer, seen=seen):
            seen[layer] = x.float()
            return x

        subject.logits(tokens, {**replace, hook: look})
        reads |= seen
        part = whole(reads)[layer]
        replace[f"mlp_out.{layer}"] = lambda y, part=part: torch.where(keep, part, y)
    expected = subject.loss(tokens, replace).mean().item()
    assert found["ce_patched"] == pytest.approx(expected, abs=1e-5)
    first = subject.loss(tokens, {"mlp_out.0": replace["mlp_out.0"]}).mean().item()
    assert found["delta_ce.0"] == pytest.approx(first - clean, abs=1e-5)
    last = f"mlp_out.{LAYERS - 1}"
    rows = subject.activations(tokens, [whole.of.read_hook(layer) for layer in whole.layers])
    alone = whole({layer: rows[whole.of.read_hook(layer)].flatten(0, 1) for layer in whole.layers})[
        LAYERS - 1
    ]
    loss = subject.loss(tokens, {last: lambda y: torch.where(keep, alone, y)}).mean().item()
    assert found[f"delta_ce.{LAYERS - 1}"] == pytest.approx(loss - clean, abs=1e-5)
    assert set(measured.details["mean_nats"]) >= {"clean", "sae", "zero", "mean", "0", "kl.0"}


def test_a_killed_delta_ce_of_a_set_resumes(toy, published, tmp_path, monkeypatch, told):
    setting = SetSetting.open(
        published, toy.root, EvaluateSpec(windows=6, batch_windows=2, metrics=("downstream",))
    )
    whole = sets.downstream(setting).figures
    stop_after(monkeypatch, sets, "_predicted", 2)
    with pytest.raises(KeyboardInterrupt):
        evaluate_setting(setting, out=tmp_path)
    told.clear()
    assert list(evaluate_setting(setting, out=tmp_path).families["downstream"].figures) == whole
    assert "downstream: resuming after 4 windows of 6" in told
    assert not (tmp_path / "losses.json").exists()


def test_the_command_evaluates_a_set_and_keeps_it(toy, published):
    code, out, err = winnow("evaluate", published, "--root", toy.root, "--windows", 4)
    assert code == 0, err
    assert "by layer" in out
    assert "left out: ablation, probes, n2g: they are about the latents of one layer, such as" in err
    stored = open_store(published).get("evaluation.json")
    found = Evaluation.from_json(stored, origin="test")
    assert found.reads == tuple(f"resid_mid.{layer}" for layer in range(LAYERS))
    assert found.latents == 32 * LAYERS
    assert found.figure("delta_ce.1") is not None
    code, _, err = winnow("evaluate", published, "--root", toy.root, "--windows", 4)
    assert "downstream: kept from" in err
    code, _, err = winnow("evaluate", published, "--root", toy.root, "--metrics", "n2g")
    assert code == 2
    assert "layer_0" in err
    assert find_common_dataset([found, found], ["one", "two"]) == [found, found]
    assert "fvu_raw" in [line[0] for line in tabulate_several([found, found])]
    assert not [line for line in tabulate_several([found, found]) if "." in line[0]]


def test_info_shows_a_set(published):
    code, out, err = winnow("info", published)
    assert code == 0, err
    assert "resid_mid.1" in out
    value = json.loads(winnow("info", published, "--json")[1])
    assert list(value["layers"]) == ["0", "1", "2"]
    assert value["bytes"] > 0


# ---- what does not fit ---------------------------------------------------------------------------


def test_a_set_named_for_one_sae_says_so(published):
    with pytest.raises(ConfigError, match=r"a set of layers 0 to 2: expected one SAE.*Name one .*/layer_0"):
        Sae.load(published)


@pytest.mark.parametrize("command", ["evaluate", "attribute"])
def test_a_set_that_does_not_fit_the_dataset_is_refused_and_nothing_written(toy, tmp_path, command):
    more = ("--prompt", "the fox", "--answer", " the") if command == "attribute" else ()
    cases = {
        "resid_mid.3. Harvest": {"layers": 4},
        "the subject of": {"weights": "0" * 64},
        "width D": {"d_model": 8},
    }
    for number, (words, how) in enumerate(cases.items()):
        uri = publish_set(toy, tmp_path / str(number), **how)
        before = sorted(path for path in (tmp_path / str(number)).rglob("*"))
        code, _, err = winnow(command, uri, "--root", toy.root, *more)
        assert code == 2, err
        assert words in err
        if "Harvest" in words:
            assert "resid_mid.0-3]: " in err
            assert "bytes as bfloat16" in err
        assert sorted(path for path in (tmp_path / str(number)).rglob("*")) == before


def test_a_set_of_mixed_widths_is_refused(toy, tmp_path):
    uri = publish_set(toy, tmp_path / "set")
    wide = random_set(LAYERS, d_model=8)
    entry = wide[1].save(open_store(f"{uri}/layer_1"), hook="resid_mid.1", target_hook="mlp_out.1")
    card = json.loads((tmp_path / "set" / "set.json").read_text())
    card["layers"][1]["card_sha256"] = sha256_hex(entry.to_json())
    (tmp_path / "set" / "set.json").write_text(json.dumps(card))
    code, _, err = winnow("evaluate", uri, "--root", toy.root)
    assert code == 2
    assert "widths D of a set's layers" in err
    assert not (tmp_path / "set" / "evaluation.json").exists()


# ---- attribute -----------------------------------------------------------------------------------


def test_all_layers_of_a_set_are_attributed_at_once(toy, published):
    line = ("attribute", published, "--root", toy.root, "--prompt", "the quick brown fox", "--answer", " the")
    code, out, err = winnow(*line, "--top", 6, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["hooks"] == [f"resid_mid.{layer}" for layer in range(LAYERS)]
    sizes = [abs(effect["first_order"]) for effect in found["effects"]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 6
    assert winnow(*line)[0] == 0
