"""The peers on rows with known directions, in the peers' environment: `make test-formats`."""

from __future__ import annotations

import importlib.util

import pytest

from winnow.store.objects import open_store

if importlib.util.find_spec("sparsify") is None:
    pytest.skip("the peers' libraries are not here: `make test-formats`", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def test_every_peer_learns_on_the_task_and_its_results_are_kept(tmp_path, capsys, monkeypatch):
    from benchmarks import recovery_peers
    from benchmarks.peer_trainers import BATCH_PEERS, PEERS
    from winnow.evaluator.recovery.runs import read_records

    monkeypatch.setattr("winnow.evaluator.recovery.page.LEARNING_RATES", (0.003, 0.01, 0.03))
    peers = [name for name in (*PEERS, *BATCH_PEERS) if name != "sae-lens-sparse"]
    store = open_store(str(tmp_path))
    recovery_peers.recover(store, peers, [(64, 4)], seeds=1, rows=16_384)
    runs = read_records(store)
    monkeypatch.setattr(recovery_peers, "train_peer", None)  # nothing is left to do
    recovery_peers.recover(store, peers, [(64, 4)], seeds=1, rows=16_384)
    assert read_records(store) == runs
    for name in peers:
        rates = [run["lr"] for run in runs if run["variant"] == name]
        assert rates in ([0.01, 0.003], [0.01, 0.003, 0.03])  # the first, and on until none is left to try
    for run in runs:
        assert 0 < run["matched_cosine"] < 1
        # one threshold is kept as far as it has got: SAELens' starts at 0 and moves by 1 % a step
        assert 0 < run["l0"] <= (4 if run["variant"] in PEERS else 63)
    page = capsys.readouterr().out
    assert all(f"| {name} | 64 | 4 |" in page for name in peers)
