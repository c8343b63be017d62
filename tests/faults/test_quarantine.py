"""One bad unit costs that unit and no other: quarantine, void receipts, and a single writer."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tests.support.pipeline import pipeline_config
from winnow.cli.main import app
from winnow.harvester.run import worker
from winnow.schemas.errors import NonFiniteError
from winnow.store import ActivationStore
from winnow.store.format.layout import tokens_key
from winnow.store.objects import open_store
from winnow.store.read.reader import load_plan, receipts_present
from winnow.store.testing import flip_bit


def winnow(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture
def planned(tmp_path):
    config = pipeline_config(tmp_path, units=3)
    code, _, err = winnow("plan", config)
    assert code == 0, err
    return config, open_store(str(tmp_path / "data"))


def test_a_bad_unit_is_quarantined_then_accepted_as_void(planned):
    config, store = planned
    flip_bit(store, tokens_key(2), 40)
    code, _, err = winnow("harvest", config)
    assert code == 1
    assert "1 of 4 units are quarantined" in err
    assert "unit 2: tokens of unit 2" in err
    assert "unit 2 failed (3x), quarantined" in err
    assert sorted(receipts_present(store, load_plan(store))) == [0, 1, 3]

    code, out, err = winnow("harvest", config, "--single-writer", "--accept-quarantined", "--json")
    assert code == 0, err
    assert json.loads(out)["void_units"] == [2]
    data = ActivationStore.open(store.uri)
    rows = data.plan.rows_per_unit
    weights = data.weights(["resid_post.1"], 0, data.rows)
    assert not weights[2 * rows : 3 * rows].any()
    assert weights[: 2 * rows].mean() > 0.9
    assert not data.read_rows("resid_post.1", 2 * rows, 2 * rows + 5).any()


def test_a_single_writer_goes_on_past_nan_and_says_what_stands_in_the_way(planned, monkeypatch):
    config, store = planned
    rows = worker.UnitWorker._rows
    asked = []

    def poisoned(self, unit, tokens, *rest):
        asked.append(unit)
        if unit == 1:
            raise NonFiniteError("unit 1, hook resid_post.1, window 5 of the unit", got="NaN")
        return rows(self, unit, tokens, *rest)

    monkeypatch.setattr(worker.UnitWorker, "_rows", poisoned)
    code, _, err = winnow("harvest", config, "--single-writer")
    assert code == 2
    assert "unit 1, hook resid_post.1, window 5" in err
    assert "--accept-quarantined" in err
    assert sorted(asked) == [0, 1, 2, 3]
    assert sorted(receipts_present(store, load_plan(store))) == [0, 2, 3]
    code, out, err = winnow("harvest", config, "--single-writer", "--accept-quarantined", "--json")
    assert code == 0, err
    assert json.loads(out)["void_units"] == [1]
    assert asked[4:] == [1]
    code, _, err = winnow("harvest", config, "--single-writer", "--set", "harvest.actors=2")
    assert code == 2
    assert "single_writer" in err
