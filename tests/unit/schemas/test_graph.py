"""The graph's JSON: what is written is read again, and what is hostile is refused."""

from __future__ import annotations

import json

import pytest

from winnow.schemas.errors import IntegrityError, UnsupportedVersion
from winnow.schemas.graph import GraphFile, pair, unpair


def small() -> dict:
    nodes = [
        {
            "node_id": "1_7_0", "feature": pair(1, 7), "layer": "1", "ctx_idx": 0, "activation": 2.5,
            "feature_type": "cross layer transcoder", "jsNodeId": "1_7-0", "isTargetLogit": False,
        },
        {
            "node_id": "3_42_1", "feature": 42, "layer": "3", "ctx_idx": 1, "feature_type": "logit",
            "token_prob": 0.5, "is_target_logit": True, "jsNodeId": "L_42-1",
        },
    ]  # fmt: skip
    origin = {
        "set_sha256": "a" * 64, "subject_weights_sha256": "b" * 64, "token_ids": [3, 4], "subject_layers": 2,
        "layers": [0, 1], "cross": True, "reads": "resid_mid",
        "scores": {"replacement": 0.5, "completeness": 0.75},
        "limits": {"max_features": 10, "max_logits": 1, "mass": 0.95},
        "left_out": {"latents": 3, "probability": 0.5},
    }  # fmt: skip
    return {
        "metadata": {
            "slug": "s", "scan": "m", "transcoder_list": [], "prompt_tokens": ["a", "b"], "prompt": "ab",
            "winnow": origin, "info": {"creator": "another program's field"},
        },
        "qParams": {
            "pinnedIds": [], "supernodes": [["name", "1_7_0"]], "linkType": "both", "clickedId": "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": [{"source": "1_7_0", "target": "3_42_1", "weight": -0.25}],
    }  # fmt: skip


def read(raw: object) -> GraphFile:
    return GraphFile.from_json(json.dumps(raw).encode(), origin="g.json")


def test_a_file_is_written_as_it_was_read():
    graph = read(small())
    assert GraphFile.from_json(graph.to_json(), origin="again") == graph
    # What another program added is dropped, and everything that circuit-tracer's models need is there.
    node = json.loads(graph.to_json())["nodes"][0]
    assert "isTargetLogit" not in node
    assert {"jsNodeId", "run_idx", "reverse_ctx_idx", "clerp", "influence"} <= set(node)


def test_a_file_of_another_program_has_no_block_of_ours():
    raw = small()
    del raw["metadata"]["winnow"]
    graph = read(raw)
    assert graph.metadata.winnow is None
    assert "winnow" not in json.loads(graph.to_json())["metadata"]


def test_pairing_is_undone_and_is_cantors():
    assert [pair(0, 0), pair(1, 0), pair(0, 1), pair(2, 0), pair(1, 1)] == [0, 1, 2, 3, 4]
    for layer, latent in [(0, 0), (0, 5), (29, 131_071), (120, 1 << 24)]:
        assert unpair(pair(layer, latent)) == (layer, latent)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("nodes", 1, "node_id"), "1_7_0"),
        (("links", 0, "source"), "nobody"),
        (("links", 0, "weight"), float("nan")),
        (("links", 0, "weight"), "much"),
        (("nodes", 0, "ctx_idx"), 2),
        (("nodes", 0, "ctx_idx"), -1),
        (("nodes", 0, "layer"), "one"),
        (("nodes", 1, "token_prob"), 7.0),
        (("metadata", "winnow", "token_ids"), [3]),
        (("metadata", "winnow", "set_sha256"), "../../etc"),
        (("metadata", "winnow", "scores", "replacement"), 2),
        (("metadata", "winnow", "surplus"), 1),
        (("nodes",), "many"),
    ],
)
def test_what_does_not_fit_is_refused(path, value):
    raw = small()
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(IntegrityError, match=r"g\.json"):
        read(raw)


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"\xff", b"[]", b"3", b'{"metadata": []}'])
def test_what_is_no_graph_is_refused(data):
    with pytest.raises(IntegrityError, match="graph"):
        GraphFile.from_json(data, origin="g.json")


def test_another_major_version_is_refused_by_name():
    raw = small()
    raw["metadata"]["winnow"]["version"] = "2.0"
    with pytest.raises(UnsupportedVersion, match=r"2\.0"):
        read(raw)
