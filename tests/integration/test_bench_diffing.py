"""`benchmarks.diffing` at tiny size: it runs, resumes, and every figure is there."""

from __future__ import annotations

import pytest

from benchmarks.diffing import SIZES, measure
from benchmarks.invented import write_texts
from tests.support.pipeline import write_corpus
from tests.support.tiny import make_subject
from winnow.store.format import order


def test_the_fine_tuned_model_differs_and_two_runs_of_the_base_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "LARGEST_DESIGN_EFFECT", float("inf"))
    model = str(make_subject(tmp_path / "lm", layers=3, width=16))
    known = str(write_corpus(tmp_path / "known.jsonl", documents=80))
    run = lambda: measure(tmp_path / "run", SIZES["tiny"], model, (known,), 1)  # noqa: E731
    found = run()
    assert found["fine_tuning"]["loss_after"] < found["fine_tuning"]["loss_before"] - 0.5
    for name in ("tuned", "again"):
        assert found[name]["top"] == 20
        assert 0.1 < found[name]["new_text_share_of_rows"] < 0.9
        assert 0 <= found[name]["top_on_new_text"] <= 20
    # One model twice: every latent has the same direction in both.
    assert found["again"]["latents_shared"] == 1
    assert (found["again"]["top_one_sided"], found["again"]["top_found"]) == (0, 0)
    assert max(found["again"]["top_relative_norms"]) < 0.6
    assert max(found["tuned"]["top_relative_norms"]) > max(found["again"]["top_relative_norms"])
    assert found["again"]["above_control"] == 0
    assert found["tuned"]["above_control"] > 0
    assert 0 <= found["tuned"]["above_control_on_new_text"] <= found["tuned"]["above_control"]
    # Again: nothing is done twice, and the figures are the same.
    later = run()
    assert {**later, "seconds": None} == {**found, "seconds": None}


@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_seed_gives_the_same_text(tmp_path, seed):
    one, two = (write_texts(tmp_path / name, 3, seed).read_bytes() for name in ("a", "b"))
    assert one == two
