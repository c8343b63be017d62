"""`benchmarks.many_hooks` at tiny size: it runs, and every figure is there."""

from __future__ import annotations

import pytest

from benchmarks.many_hooks import measure
from tests.support.tiny import make_subject
from winnow.store.format import order


def test_every_figure_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "LARGEST_DESIGN_EFFECT", float("inf"))
    model = str(make_subject(tmp_path / "lm", layers=2, vocab=512))
    root = str(tmp_path / "data")
    found = measure(root, model, layers=2, windows=64, context=9, rounds=1, threads=1, batch=16)
    assert (found["hooks"], found["d_model"], found["rows_per_unit"]) == (4, 32, 512)
    assert found["harvest_over_forward_rounds"] == [pytest.approx(found["harvest_over_forward"])]
    for name in ("harvest_over_forward", "read_over_forward", "stream_over_forward", "stream_memory_bytes"):
        assert found[name] > 0
