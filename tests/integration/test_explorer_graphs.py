"""The explorer's graphs: what is sent of one, edits, refusals, and files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.support.graphs import graph_of_set, random_graph
from tests.support.sets import random_set
from tests.support.tiny import make_subject
from winnow.evaluator.circuits import edit, set_digest, trace
from winnow.explorer.place import Place
from winnow.explorer.site.circuit import LatentEdit, Outcome
from winnow.explorer.site.desk import open_desk
from winnow.explorer.site.graphs import MAX_LINKS
from winnow.explorer.site.serve import make_app
from winnow.sae.sets import TranscoderSet
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError
from winnow.schemas.graph import GraphFile, pair
from winnow.schemas.subject import SubjectSpec
from winnow.store.objects import open_store
from winnow.subject.load import Subject

NOWHERE = Place(None, None, StorageSpec())
GRAPH = random_graph(120, 700, layers=3, latents=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A published set without indexes, with one graph."""
    random_set(3).save(open_store(str(tmp_path / "set")))
    (tmp_path / "set/graphs").mkdir()
    (tmp_path / "set/graphs/dallas.json").write_text(json.dumps(GRAPH))
    return tmp_path / "set"


def client_of(desk) -> TestClient:
    return TestClient(make_app(desk), base_url="http://127.0.0.1:8517", raise_server_exceptions=False)


def test_graphs_of_a_set_are_listed_and_sent_as_columns(folder):
    client = client_of(open_desk([str(folder)], None, NOWHERE, 1))
    site = client.get("/api/site").json()
    assert (site["graphs"], site["saes"]) == (True, [])
    (line,) = client.get("/api/graphs").json()
    assert (line["name"], line["nodes"], line["links"]) == ("dallas", 120, 700)
    sent = client.get("/api/graphs/dallas").json()
    assert sent["tokens"] == GRAPH["metadata"]["prompt_tokens"]
    for at, node in enumerate(GRAPH["nodes"]):
        assert sent["nodes"]["id"][at] == node["node_id"]
        if node["feature_type"] == "cross layer transcoder":
            assert node["feature"] == pair(sent["nodes"]["layer"][at], sent["nodes"]["latent"][at])
        else:
            assert sent["nodes"]["latent"][at] is None
    ids = sent["nodes"]["id"]
    columns = zip(*(sent["links"][name] for name in ("source", "target", "weight")), strict=True)
    for link, (source, target, weight) in zip(GRAPH["links"], columns, strict=True):
        assert (link["source"], link["target"]) == (ids[source], ids[target])
        assert link["weight"] == pytest.approx(weight, rel=1e-4)
    assert client.get("/api/graphs/dallas/file").content == (folder / "graphs/dallas.json").read_bytes()


def test_a_graph_that_is_traced_meanwhile_appears_and_one_that_changes_is_read_again(folder):
    client = client_of(open_desk([str(folder)], None, NOWHERE, 1))
    assert len(client.get("/api/graphs").json()) == 1
    (folder / "graphs/other.json").write_text(json.dumps(random_graph(60, 200, layers=3, seed=1)))
    (folder / "graphs/dallas.json").write_text(json.dumps(random_graph(80, 300, layers=3, seed=2)))
    assert [each["nodes"] for each in client.get("/api/graphs").json()] == [80, 60]


def test_a_graph_file_is_shown_without_a_set(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "my graph.json").write_text(json.dumps(GRAPH))
    files = [tmp_path / "a/my graph.json", tmp_path / "b/my graph.json"]
    client = client_of(open_desk([], None, NOWHERE, 1, files))
    assert [each["name"] for each in client.get("/api/graphs").json()] == ["my graph", "my graph (2)"]
    assert client.get("/api/graphs/my%20graph%20(2)").status_code == 200
    edit = {"edits": [{"layer": 0, "latent": 1}]}
    reply = client.post("/api/graphs/my%20graph/edit", json=edit)
    assert reply.status_code == 400
    assert "an explorer without a set" in reply.json()["error"]
    # Pages of SAEs refuse in a sentence as well.
    assert "winnow index" in client.get("/api/saes/0/features/0").json()["error"]
    steer = client.post("/api/steer", json={"prompt": "a", "edits": []})
    assert steer.status_code == 400


def test_edits_are_run_by_the_subject_if_the_graph_is_of_this_set(folder):
    desk = open_desk([str(folder)], None, NOWHERE, 1)
    client, circuits = client_of(desk), desk.circuits
    asked: list[LatentEdit] = []

    def runner(graph: GraphFile, edits: list[LatentEdit]) -> list[Outcome]:
        asked.extend(edits)
        return [Outcome(" Austin", 0.4, 0.3, -0.5, -0.45, -0.4)]

    assert circuits.set_sha256 is not None
    own = graph_of_set(GRAPH, circuits.set_sha256, layers=3)
    (folder / "graphs/own.json").write_text(json.dumps(own))
    node = next(each for each in own["nodes"] if each["feature_type"] == "cross layer transcoder")
    layer, latent, at = map(int, node["node_id"].split("_"))
    edit: dict[str, Any] = {"layer": layer, "latent": latent, "position": at, "op": "scale", "strength": 2.0}
    refused = client.post("/api/graphs/own/edit", json={"edits": [edit]})
    assert "an explorer without a subject" in refused.json()["error"]
    assert "without a subject" in client.get("/api/graphs/own").json()["no_edits"]

    circuits.runner = runner
    assert client.get("/api/graphs/own").json()["no_edits"] is None
    reply = client.post("/api/graphs/own/edit", json={"edits": [edit]})
    assert reply.json()["logits"] == [
        {"token": " Austin", "before": 0.4, "after": 0.3, "foretold": -0.5, "held": -0.45, "found": -0.4}
    ]
    assert asked == [LatentEdit(layer, latent, at, "scale", 2.0)]
    for other in ({"latent": 31, "layer": 9}, {"position": 10**6}):
        reply = client.post("/api/graphs/own/edit", json={"edits": [edit | other]})
        assert (reply.status_code, "active in this graph" in reply.json()["error"]) == (400, True)
    (folder / "graphs/other.json").write_text(json.dumps(graph_of_set(GRAPH, "1" * 64, layers=3)))
    reply = client.post("/api/graphs/other/edit", json={"edits": [edit]})
    assert "the set of this graph" in reply.json()["error"]
    reply = client.post("/api/graphs/dallas/edit", json={"edits": [edit]})
    assert "the set of this graph" in reply.json()["error"]
    for wrong in ({"strength": 1e9}, {"op": "add"}, {"surprise": 1}):
        assert client.post("/api/graphs/own/edit", json={"edits": [edit | wrong]}).status_code == 422


def test_latents_of_another_set_get_no_cards_but_a_sentence(folder):
    desk = open_desk([str(folder)], None, NOWHERE, 1)
    desk.circuits.layers = {0: 0}
    assert desk.circuits.set_sha256 is not None
    own, other, unsaid = (
        GraphFile.from_json(json.dumps(graph).encode(), origin="graph")
        for graph in (
            graph_of_set(GRAPH, desk.circuits.set_sha256, layers=3),
            graph_of_set(GRAPH, "1" * 64, layers=3),
            GRAPH,
        )
    )
    for graph in (own, unsaid):
        facts = desk.circuits.facts(graph)
        assert (facts["saes"], facts["other_set"]) == ({"0": 0}, None)
    facts = desk.circuits.facts(other)
    assert facts["saes"] == {}
    assert "the set of this graph: expected" in facts["other_set"]


def test_an_edit_in_the_subject_is_what_circuits_say(tmp_path):
    folder = make_subject(tmp_path / "llama", "llama", layers=3, width=16)
    random_set(3).save(open_store(str(tmp_path / "set")))
    subject, set_ = Subject.load(str(folder)), TranscoderSet.load(tmp_path / "set")
    graph = trace(subject, set_, list(range(5, 40, 7)), max_features=40)
    (tmp_path / "set/graphs").mkdir()
    (tmp_path / "set/graphs/own.json").write_bytes(graph.to_json())
    place = Place(None, SubjectSpec(model=str(folder)), StorageSpec())
    desk = open_desk([str(tmp_path / "set")], None, place, 1)
    assert desk.circuits.set_sha256 == set_digest(set_)
    client = client_of(desk)
    sent = client.get("/api/graphs/own").json()
    assert sent["no_edits"] is None
    node = next(each for each in graph.nodes if each.kind == "feature")
    body = {"layer": node.layer, "latent": node.number, "op": "clamp", "strength": 3.0}
    reply = client.post("/api/graphs/own/edit", json={"edits": [body | {"position": node.position}]}).json()
    expected = edit(subject, set_, graph, [f"{node.name}=3"])
    for name in ("foretold", "held", "found"):
        got = [each[name] for each in reply["logits"]]
        assert got == pytest.approx(getattr(expected, name).tolist(), abs=1e-4)
    # Without a position: wherever the graph has it.
    everywhere = [
        each
        for each in graph.nodes
        if each[:1] + each[1:2] + each[3:4] == (node.kind, node.layer, node.number)
    ]
    reply = client.post("/api/graphs/own/edit", json={"edits": [body]}).json()
    expected = edit(subject, set_, graph, [f"{each.name}=3" for each in everywhere])
    got = [each["found"] for each in reply["logits"]]
    assert got == pytest.approx(expected.found.tolist(), abs=1e-4)


HOSTILE = {
    "not-json": b"{",
    "deep": b"[" * 100_000,
    "a-list": b"[1, 2]",
    "no-nodes": json.dumps({"metadata": GRAPH["metadata"]}).encode(),
    "unknown-node": json.dumps(GRAPH | {"links": [{"source": "x", "target": "y", "weight": 1}]}).encode(),
    "wrong-types": json.dumps(GRAPH | {"nodes": [{"node_id": 3}]}).encode(),
    "infinite": json.dumps(GRAPH | {"links": [GRAPH["links"][0] | {"weight": float("inf")}]}).encode(),
    "twice": json.dumps(GRAPH | {"nodes": GRAPH["nodes"] + GRAPH["nodes"][:1]}).encode(),
}


def test_hostile_files_are_named_with_what_is_wrong_and_the_others_are_shown(folder):
    for name, data in HOSTILE.items():
        (folder / f"graphs/{name}.json").write_bytes(data)
    with (folder / "graphs/huge.json").open("wb") as file:
        file.truncate(65 << 20)  # sparse: refused by its size, unread
    client = client_of(open_desk([str(folder)], None, NOWHERE, 1))
    lines = {each["name"]: each for each in client.get("/api/graphs").json()}
    assert "problem" not in lines.pop("dallas")
    assert set(lines) == {*HOSTILE, "huge"}
    assert all(each["problem"] for each in lines.values())
    for name in lines:
        reply = client.get(f"/api/graphs/{name}")
        assert reply.status_code in (400, 500)
        assert reply.json()["error"]
    layer = GRAPH["nodes"][0] | {"layer": "9" * 50, "feature_type": "logit"}
    (folder / "graphs/layers.json").write_text(json.dumps(GRAPH | {"nodes": [layer, *GRAPH["nodes"][1:]]}))
    assert "error" in client.get("/api/graphs/layers").json()


@pytest.mark.parametrize("name", ["nothing", "..%2fset", "%2e%2e", "dallas.json", "graphs%2fdallas"])
def test_only_a_listed_name_opens_a_graph(folder, name):
    reply = client_of(open_desk([str(folder)], None, NOWHERE, 1)).get(f"/api/graphs/{name}")
    assert reply.status_code in (400, 404)


def test_more_links_than_a_page_can_draw_are_refused(folder):
    # Several links of one pair are valid, and quicker to make than a graph of so many pairs.
    many = GRAPH | {"links": [GRAPH["links"][0]] * (MAX_LINKS + 1)}
    (folder / "graphs/many.json").write_text(json.dumps(many))
    reply = client_of(open_desk([str(folder)], None, NOWHERE, 1)).get("/api/graphs/many")
    assert reply.status_code == 400
    assert "Prune it further" in reply.json()["error"]


def test_a_set_is_shown_alone(folder, tmp_path):
    with pytest.raises(ConfigError, match="a set alone"):
        open_desk([str(folder), str(tmp_path / "sae")], None, NOWHERE, 1)
    with pytest.raises(ConfigError, match="a set alone"):
        open_desk([str(folder)], ["elsewhere"], NOWHERE, 1)


def test_layers_without_an_index_are_named(folder, caplog):
    desk = open_desk([str(folder)], None, NOWHERE, 1)
    assert desk.circuits.layers == {}
    assert "layers 0, 1, 2 of" in caplog.text
