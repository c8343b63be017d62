"""Edits in the subject, faithfulness, a set's own figures, and the command, on a tiny llama."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.support.evaluated import D_MODEL, toy_config
from tests.support.sets import random_set
from tests.support.tiny import SENTENCES, make_subject
from winnow.cli.main import app
from winnow.evaluator.circuits import Edit, Graph, edit, faithfulness, set_quality, trace
from winnow.evaluator.circuits.editing import Prompt, total_effects
from winnow.evaluator.circuits.paths import strongest_paths
from winnow.explorer.site.graphs import GRAPHS, Shelf
from winnow.sae.sets import TranscoderSet
from winnow.schemas.errors import ConfigError, SaeMismatch
from winnow.store.objects import open_store
from winnow.subject.load import Subject

P, D, L = 7, 16, 3
IDS = torch.arange(5, 5 + 7 * P, 7)
PROMPT = "It is a truth universally"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_subject(tmp_path_factory.mktemp("llama"), "llama", layers=L, width=D)


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return Subject.load(str(folder))


@pytest.fixture(scope="module", params=[False, True], ids=["plt", "clt"])
def set_(request: pytest.FixtureRequest) -> TranscoderSet:
    return random_set(L, cross=request.param)


@pytest.fixture(scope="module")
def graph(subject: Subject, set_: TranscoderSet) -> Graph:
    return trace(subject, set_, IDS, max_features=10_000)


def test_an_edit_that_changes_nothing_leaves_the_logits_bit_identical(subject, set_, graph):
    prompt = Prompt(subject, set_, graph)
    node = next(node for node in graph.nodes if node.kind == "feature")
    added = prompt.added([(prompt.number_of(node), 0.0)])
    assert set(added) == set(set_.targets(node.layer))
    replace = {f"mlp_out.{m}": (lambda rows, m=m: rows + added[m]) for m in added}
    assert torch.equal(subject.logits(IDS[None], replace), subject.logits(IDS[None]))
    found = edit(subject, set_, graph, [f"{node.name}*1"])
    assert not found.foretold.any()
    assert found.held.abs().max() < 1e-6
    assert found.found.abs().max() < 1e-6


def test_a_small_edit_does_what_the_held_model_says(subject, set_):
    # With ReLU a small change moves no latent by more than a little: the graph's paths are then the
    # replacement model's own. TopK's choice can jump.
    smooth = random_set(L, cross=set_.cross, activation="relu")
    graph = trace(subject, smooth, IDS, max_features=10_000)
    for node in [node for node in graph.nodes if node.kind == "feature"][::97]:
        found = edit(subject, smooth, graph, [f"{node.name}*1.01"])
        scale = max(float(found.held.abs().max()), 1e-3)
        assert (found.foretold - found.held).abs().max() < 0.02 * scale, node.name
        assert found.before[0] == pytest.approx(node.value, rel=1e-5)


def test_a_latent_of_the_last_layer_moves_the_subject_as_foretold(subject, set_, graph):
    # Nothing but the final norm's denominator lies between them.
    node = next(
        node for node in graph.nodes if node.kind == "feature" and (node.layer, node.position) == (2, 6)
    )
    found = edit(subject, set_, graph, [Edit(2, node.number, 6, 1.001, scales=True)])
    assert torch.allclose(found.foretold, found.held, atol=1e-6)
    by_hand = set_.decoder_rows(2, torch.tensor([node.number]), 2)[0] * 0.001 * node.value
    last = {"mlp_out.2": lambda rows: rows + torch.nn.functional.pad(by_hand[None], (0, 0, P - 1, 0))}
    logits = subject.logits(IDS[None], last)[0, -1] - subject.logits(IDS[None])[0, -1]
    expected = (logits - logits.mean())[[node.number for node in found.logits]]
    assert torch.allclose(found.found, expected, atol=1e-5)


def test_effects_of_latents_outside_the_graph_are_those_that_they_would_have(subject, set_, graph):
    part = trace(subject, set_, IDS, max_features=20)
    prompt, whole = Prompt(subject, set_, part), Prompt(subject, set_, graph)
    inside = [node for node in part.nodes if node.kind == "feature"]
    number = prompt.number_of(inside[3])
    assert torch.allclose(prompt.foretold(number), prompt._foretold_outside(number), atol=1e-4)
    # With all latents in the graph the solved system is the sum over all paths.
    effects = total_effects(graph)
    at = [i for i, node in enumerate(graph.nodes) if node.kind == "feature"]
    values = torch.tensor([graph.nodes[i].value for i in at])
    among, direct = graph.adjacency[at][:, at] / values[:, None], graph.adjacency[graph.of("logit")][:, at]
    summed, step = direct.clone(), direct
    for _ in range(L):
        step = step @ among
        summed += step
    assert torch.allclose(effects, summed, atol=1e-4)
    assert whole.foretold(0).shape == (len(whole.logits),)


@pytest.mark.parametrize("value", ["0", "2", "-1.5", ".5", "1e+6", "3E-7", "0.1234567891", "123456789", "5."])
def test_an_edit_is_written_as_it_is_read(value):
    for sign in "=*":
        found = Edit.parse(f"3.1207@5{sign}{value}")
        assert (found.value, found.scales) == (float(value), sign == "*")
        assert Edit.parse(str(found)) == found
    assert str(Edit(3, 1207, 5, 0.0)) == "3.1207@5=0"


def test_edits_that_make_no_sense_are_refused(subject, set_, graph):
    for text in ("3.7", "a.b@c=1", "0.1@2", "0.1@2=nan", "0.1@-1=0", "0.1@2=1e999", "0.1@2=", "0.1@2=."):
        with pytest.raises(ConfigError, match=r"layer\.latent@position"):
            edit(subject, set_, graph, [text])
    on = {
        node.number
        for node in graph.nodes
        if node.kind == "feature" and (node.layer, node.position) == (1, 3)
    }
    off = next(latent for latent in range(32) if latent not in on)
    with pytest.raises(ConfigError, match=r"Active there: \d+") as error:
        edit(subject, set_, graph, [f"1.{off}@3=0"])
    assert "which is not" in str(error.value)
    with pytest.raises(ConfigError, match=r"Positions with active latents: 0, 1, 2"):
        edit(subject, set_, graph, ["1.1@99=0"])
    with pytest.raises(ConfigError, match="edits"):
        edit(subject, set_, graph, [])
    name = next(node.name for node in graph.nodes if node.kind == "feature")
    # Taken away twice it would be as active as before, with the other sign.
    with pytest.raises(ConfigError, match=f"each latent once, got {name} twice"):
        edit(subject, set_, graph, [f"{name}=0", f"{name}*0"])
    with pytest.raises(SaeMismatch, match="set of the graph"):
        edit(subject, random_set(L, cross=set_.cross, seed=1), graph, ["1.1@1=0"])


def test_a_graph_of_another_subject_is_refused(set_, graph, tmp_path):
    other = Subject.load(str(make_subject(tmp_path, "llama", layers=L, width=D, seed=1)))
    with pytest.raises(SaeMismatch, match="subject of the graph"):
        edit(other, set_, graph, ["1.1@1=0"])


def test_faithfulness_has_a_figure_for_each_group_and_action(subject, set_, graph):
    found = {each.id: each for each in faithfulness(subject, set_, graph, 12)}
    assert len(found) == 8
    for group in ("graph", "random"):
        for action in ("taken_away", "doubled"):
            spearman = found[f"circuit.{group}.{action}.spearman"]
            assert spearman.value is not None
            assert -1 <= spearman.value <= 1
            assert spearman.samples == 12
            assert found[f"circuit.{group}.{action}.slope"].low is not None


def test_a_sets_figures_by_hand(subject, set_):
    windows = torch.stack([IDS, IDS.flip(0)])
    found = {each.id: each.value for each in set_quality(subject, set_, windows)}
    assert set(found) == {f"set.{name}.{m}" for name in ("fvu", "l0", "delta_ce") for m in range(L)} | {
        "set.delta_ce.all", "set.ce",
    }  # fmt: skip
    assert found["set.l0.0"] == 4
    acts = subject.activations(
        windows, [f"{site}.{m}" for site in ("resid_mid", "mlp_out") for m in range(L)]
    )
    told = set_({m: acts[f"resid_mid.{m}"].flatten(0, 1) for m in range(L)})
    ce = float(subject.loss(windows).mean())
    lost = float(subject.loss(windows, {"mlp_out.1": lambda _: told[1]}).mean()) - ce
    assert found["set.ce"] == pytest.approx(ce, abs=1e-5)
    assert found["set.delta_ce.1"] == pytest.approx(lost, abs=1e-5)
    parts = [each[:, 1:] for each in (acts["mlp_out.2"], told[2].view(2, P, D))]
    spread = (parts[0] - parts[0].mean(1, keepdim=True)).square().sum()
    assert found["set.fvu.2"] == pytest.approx(float((parts[1] - parts[0]).square().sum() / spread), rel=1e-4)


def test_paths_are_the_strongest_and_lead_from_sources_to_logits(graph):
    paths = strongest_paths(graph, 8)
    assert len(paths) == 8
    assert [path.share for path in paths] == sorted((path.share for path in paths), reverse=True)
    for path in paths:
        assert graph.nodes[path.nodes[0]].kind in ("embedding", "error")
        assert graph.nodes[path.nodes[-1]].kind == "logit"


# ---- the command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("set")
    random_set(L, cross=True).save(open_store(str(place)))
    return place


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["circuit", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output if code else done.stdout


def test_a_graph_is_written_where_the_explorer_of_its_set_finds_it(folder: Path, saved: Path, tmp_path: Path):
    own = tmp_path / "set"
    shutil.copytree(saved, own)
    prompt = "It is a truth, universally"
    done = CliRunner().invoke(
        app, ["circuit", f"{own}/", "--subject", str(folder), "--prompt", prompt, "--max-features", "20"]
    )
    assert done.exit_code == 0, done.output
    written = own / "graphs" / "it-is-a-truth-universally.json"
    assert Graph.from_json(written.read_bytes()).nodes
    said = " ".join(done.stderr.split())
    assert f"wrote {written}; `winnow explore {own}/` shows it" in said
    assert list(Shelf(open_store(str(own / GRAPHS))).sources()) == [written.stem]


def test_the_command_traces_edits_and_measures(folder: Path, saved: Path, tmp_path: Path):
    out = tmp_path / "graphs" / "g.json"
    common = (saved, "--subject", folder)
    raw = run(*common, "--prompt", PROMPT, "--out", out, "--max-features", 40, "--targets", " a", "--json")
    found = json.loads(raw)["graph"]
    assert found["prompt"] == PROMPT
    assert [each["text"] for each in found["logits"]] == [" a"]
    assert found["paths"]
    read = Graph.from_json(out.read_bytes())
    assert read.scores.replacement == pytest.approx(found["replacement"])
    node = next(node for node in read.nodes if node.kind == "feature")
    text = run(*common, "--graph", out, "--edit", f"{node.name}=0", "--faithfulness", 3, "--top", 2)
    assert f"{node.name}=0 (was {node.value:.3f})" in text.replace("\n", " ")
    assert "circuit.random.doubled.slope" in text
    words = tmp_path / "words.txt"
    words.write_text(" ".join(SENTENCES) * 3)
    measured = json.loads(run(*common, "--text", words, "--windows", 2, "--json"))
    assert {each["id"] for each in measured["set"]} >= {"set.fvu.0", "set.delta_ce.all"}


def test_held_out_windows_of_the_dataset_are_prompts(tmp_path: Path):
    config = toy_config(tmp_path)
    assert config.subject is not None
    layers = Subject.load(config.subject).layout.layers
    random_set(layers, d_model=D_MODEL).save(open_store(str(tmp_path / "set")))
    asked = (tmp_path / "set", "--subject", config.subject.model, "--root", config.root, "--windows", 3)
    small = ("--prompt-tokens", 6, "--max-features", 30)
    found = json.loads(run(*asked, *small, "--faithfulness", 10, "--json"))
    assert {each["id"] for each in found["set"]} >= {"set.fvu.0", "set.delta_ce.all"}
    assert {each["samples"] for each in found["set"]} == {3}
    # Ten latents over three windows: four of each.
    assert {each["id"]: each["samples"] for each in found["faithfulness"]} == {
        f"circuit.{group}.{action}.{what}": 12
        for group in ("graph", "random")
        for action in ("taken_away", "doubled")
        for what in ("spearman", "slope")
    }
    assert all(each["low"] <= each["value"] <= each["high"] for each in found["faithfulness"])
    assert "--edit" in run(*asked, "--edit", "0.1@1=0", code=2)
    other = make_subject(tmp_path / "other", "gpt2", layers=layers, width=D_MODEL)
    assert "the dataset's" in run(tmp_path / "set", "--subject", other, "--root", config.root, code=2)


def test_the_command_refuses_in_a_sentence(folder: Path, saved: Path, tmp_path: Path):
    common = (saved, "--subject", folder)
    assert "one of them" in run(*common, "--prompt", "a", "--graph", "g.json", code=2)
    assert "--prompt TEXT, --graph FILE, --text FILE or --root URI" in run(*common, code=2)
    assert "cannot be read" in run(*common, "--graph", tmp_path / "none.json", code=2)
    # before anything is loaded: there is no set either
    misspelt = run(tmp_path / "none", "--graph", "g.json", "--edit", "L0.1=0", code=2)
    assert "layer.latent@position=ACTIVATION" in misspelt
    out = tmp_path / "g.json"
    assert "too long" in run(*common, "--prompt", "x " * 400, "--out", out, code=2)
    assert "one token" in run(
        *common, "--prompt", "a", "--targets", "universally acknowledged", "--out", out, code=2
    )
    assert "--subject MODEL" in run(saved, "--prompt", "a", "--out", out, code=2)
    assert not out.exists()
