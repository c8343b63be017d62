"""Graphs as circuit-tracer writes them: its published layout, written out here."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from winnow.cli.main import app
from winnow.schemas.graph import GraphFile


def node(node_id, kind, layer, position, feature):
    return {
        "node_id": node_id, "feature": feature, "layer": layer, "ctx_idx": position, "feature_type": kind,
        "token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": node_id,
        "clerp": "", "influence": 0.5, "activation": 1.5,
    }  # fmt: skip


def theirs(**metadata):
    """A prompt of two tokens, a subject of two layers, one latent of number 7 in layer 1."""
    nodes = [
        node("1_7_1", "cross layer transcoder", "1", 1, 8 * 9 // 2 + 7),
        node("0_0_1", "mlp reconstruction error", "0", 1, -1),
        node("E_5_1", "embedding", "E", 1, 1),
        node("3_9_1", "logit", "3", 1, 9),
    ]
    links = [
        {"source": "E_5_1", "target": "1_7_1", "weight": 0.5},
        {"source": "1_7_1", "target": "3_9_1", "weight": -2.0},
        {"source": "0_0_1", "target": "3_9_1", "weight": 1.0},
    ]
    facts = {
        "slug": "theirs", "scan": "mine", "transcoder_list": [], "prompt_tokens": ["a", "b"], "prompt": "ab",
        "node_threshold": 0.8, "schema_version": 1,
    }  # fmt: skip
    state = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": facts | metadata, "qParams": state, "nodes": nodes, "links": links}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_graph_of_theirs_is_taken_and_given_back(tmp_path):
    (tmp_path / "theirs.json").write_text(json.dumps(theirs()))
    done = run("import", tmp_path / "theirs.json", "--from", "neuronpedia-graph", "--out", tmp_path / "ours")
    assert done.exit_code == 0, done.output
    assert "4 nodes, 3 links" in done.output
    graph = GraphFile.from_json((tmp_path / "ours" / "graph.json").read_bytes(), origin="it")
    assert [(n.node_id, n.feature_type, n.layer) for n in graph.nodes] == [
        (n["node_id"], n["feature_type"], n["layer"]) for n in theirs()["nodes"]
    ]
    out = tmp_path / "served"
    done = run("export", tmp_path / "ours" / "graph.json", "--to", "neuronpedia-graph", "--out", out)
    assert done.exit_code == 0, done.output
    assert json.loads((out / "theirs.json").read_text()) == theirs()
    listed = json.loads((out / "graph-metadata.json").read_text())["graphs"]
    assert listed == [theirs()["metadata"]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda graph: graph["nodes"][1].update(node_id="1_7_1"), "same node_id"),
        (lambda graph: graph["links"][0].update(source="0_3_5"), "not both nodes"),
        (lambda graph: graph["links"][0].update(weight=float("nan")), "graph"),
    ],
    ids=["ambiguous", "dangling", "nan"],
)
def test_what_is_no_graph_is_refused(tmp_path, change, words):
    graph = theirs()
    change(graph)
    (tmp_path / "theirs.json").write_text(json.dumps(graph))
    done = run("import", tmp_path / "theirs.json", "--from", "neuronpedia-graph", "--out", tmp_path / "ours")
    assert done.exit_code == 1
    assert words in " ".join(done.stderr.split())
    assert not (tmp_path / "ours").exists()


def test_a_slug_leads_nowhere_and_options_of_saes_are_refused(tmp_path):
    (tmp_path / "theirs.json").write_text(json.dumps(theirs(slug="../out")))
    command = ["export", tmp_path / "theirs.json", "--to", "neuronpedia-graph", "--out", tmp_path / "served"]
    assert run(*command).exit_code == 2
    assert run(*command, "--model", "gpt2").exit_code == 2
    assert not (tmp_path / "served").exists()
    missing = run("import", tmp_path / "no.json", "--from", "neuronpedia-graph", "--out", tmp_path / "ours")
    assert missing.exit_code == 2
