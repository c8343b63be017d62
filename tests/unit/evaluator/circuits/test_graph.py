"""A graph is written in circuit-tracer's layout and read again as it was."""

from __future__ import annotations

import json

import pytest
import torch

from winnow.evaluator.circuits.graph import Graph, Node
from winnow.schemas.errors import IntegrityError
from winnow.schemas.graph import GraphMetadata, pair

NODES = (
    Node("feature", 0, 1, 5, 2.0),
    Node("feature", 2, 1, 7, 0.5),
    Node("error", 0, 0, -1),
    Node("error", 5, 1, -1),
    Node("embedding", -1, 0, 300),
    Node("embedding", -1, 1, 301),
    Node("logit", 6, 1, 9, 0.6, " the"),
    Node("logit", 6, 1, 10, 0.2, 'say "a" (p='),
)


@pytest.fixture
def graph() -> Graph:
    adjacency = torch.zeros(8, 8)
    adjacency[0, 4], adjacency[0, 5], adjacency[1, 0], adjacency[1, 2] = 1.0, -0.5, 0.25, 0.125
    adjacency[6, 1], adjacency[6, 3], adjacency[7, 0] = 2.0, 0.1, -1.0
    metadata = GraphMetadata(slug="s", scan="m", prompt_tokens=("a", "b"), prompt="ab")
    return Graph(NODES, adjacency, metadata)


def test_round_trip(graph: Graph):
    again = Graph.from_json(graph.to_json())
    assert again.nodes == graph.nodes
    assert torch.equal(again.adjacency, graph.adjacency)
    assert again.scores == graph.scores
    assert again.to_json() == graph.to_json()


def test_layout(graph: Graph):
    raw = json.loads(graph.to_json())
    ids = [node["node_id"] for node in raw["nodes"]]
    # The error of layer 5 at position 1 and latent 5 of layer 0 there have one name in the layout.
    assert ids[:4] == ["0_5_1", "2_7_1", "0_0_0", "0_5_1_error"]
    assert ids[4:] == ["E_300_0", "E_301_1", "7_9_1", "7_10_1"]
    assert raw["nodes"][1]["feature"] == pair(2, 7)
    assert raw["nodes"][1]["layer"] == "2"
    assert [node["is_target_logit"] for node in raw["nodes"]] == [False] * 6 + [True, False]
    assert {"source": "E_301_1", "target": "0_5_1", "weight": -0.5} in raw["links"]


def test_pruning_drops_what_leads_nowhere(graph: Graph):
    pruned = graph.prune(nodes=1.0, edges=1.0)
    assert pruned.shares is not None
    assert pruned.metadata.node_threshold == 1.0
    few = graph.prune(nodes=0.3, edges=0.9)
    kinds = [node.kind for node in few.nodes]
    assert kinds.count("embedding") == 2
    assert kinds.count("logit") == 2
    assert len(few.nodes) < len(graph.nodes)
    assert Graph.from_json(few.to_json()).nodes == few.nodes


@pytest.mark.parametrize(
    ("place", "value"), [("feature_type", "lorsa"), ("feature", pair(3, 7)), ("layer", "3")]
)
def test_a_node_that_contradicts_itself_is_refused(graph: Graph, place: str, value: object):
    raw = json.loads(graph.to_json())
    raw["nodes"][1][place] = value
    with pytest.raises(IntegrityError, match="2_7_1"):
        Graph.from_json(json.dumps(raw).encode())


def test_names(graph: Graph):
    assert [node.name for node in graph.nodes] == [
        "0.5@1", "2.7@1", "error 0@0", "error 5@1", "token 300@0", "token 301@1", "logit 9@1", "logit 10@1",
    ]  # fmt: skip
