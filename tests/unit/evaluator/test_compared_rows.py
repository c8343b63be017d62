"""Figures of different rows are not compared, and only those of rows name any."""

from __future__ import annotations

from typing import Any

import pytest

from winnow.evaluator.report import find_common_dataset, list_notes
from winnow.schemas.errors import ConfigError
from winnow.schemas.evaluation import Evaluation

ASSISTANT = {"roles": ["assistant"]}


def measured(**families: dict[str, Any]) -> Evaluation:
    result = {"settings_sha256": "0" * 64, "figures": (), "seconds": 1.0, "finished": "now"}
    fields = {
        "sae": "x", "sae_sha256": "0" * 64, "plan_fingerprint": "1" * 64, "dataset_sha256": None,
        "subject_model": "m", "subject_weights_sha256": "0" * 64, "hook": "resid_post.1", "latents": 4,
        "k": 1, "trained_on_this": True,
    }  # fmt: skip
    settings = {name: result | {"settings": given} for name, given in families.items()}
    return Evaluation.model_validate(fields | {"families": settings})


def test_families_of_other_rows_are_not_compared():
    every, some = measured(reconstruction={}), measured(reconstruction={"rows": ASSISTANT})
    with pytest.raises(ConfigError, match=r"runs/b was .* expected all rows, got roles=assistant"):
        find_common_dataset([every, some], ["runs/a", "runs/b"])
    assert len(find_common_dataset([some, some], ["runs/a", "runs/b"])) == 2
    # Measured in one of them only.
    find_common_dataset([measured(downstream={}), some], ["runs/a", "runs/b"])


def test_families_that_read_no_rows_are_compared_whatever_was_noted_once():
    # Evaluations of before noted rows for these too.
    one, other = measured(probes={}), measured(probes={"rows": ASSISTANT})
    assert len(find_common_dataset([one, other], ["runs/a", "runs/b"])) == 2
    notes = list_notes(measured(reconstruction={"rows": ASSISTANT}, probes={}))
    assert notes == ["reconstruction: of rows with roles=assistant only"]
