"""The benchmark of graphs, at tiny size: it runs without the peer, and its result has the keys."""

from __future__ import annotations

import json

import torch

from benchmarks import graph
from tests.support.tiny import make_subject


def test_graph(tmp_path, monkeypatch):
    model = make_subject(tmp_path / "subject", layers=2, width=16)
    options = [
        "--no-peer",
        "--rounds",
        "1",
        "--threads",
        str(torch.get_num_threads()),
        "--kind",
        "clt",
        "--model",
        str(model),
    ]
    options += ["--latents", "64", "--active", "4", "--features", "50", "--tokens", "12"]
    # Only the traced child is a process of its own, whose memory is measured.
    monkeypatch.setattr("sys.argv", ["graph", *options, "--json", str(tmp_path / "result.json")])
    graph.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["benchmark"] == "graph"
    assert result["active"] >= 50
    assert result["seconds"] > 0
    assert result["peak_mib"] > 0
    assert "peer_over_winnow" not in result
