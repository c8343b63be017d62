"""The notebooks of `examples/` run, at toy size, and are committed with outputs, small and without errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.notebooks import EXAMPLES, NAMES, execute, source_of
from tests.support.pipeline import write_corpus
from tests.support.tiny import make_subject
from winnow.schemas.evaluation import Evaluation

LARGEST_BYTES = 100_000
TINY = (
    "subject.device=cpu",
    "storage.single_writer=true",
    "train.epochs=2",
    "train.threads=1",
    "train.sample_rows=512",
)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Where the notebooks run, one after another: the first makes what the others read."""
    folder = tmp_path_factory.mktemp("notebooks")
    make_subject(folder / "subject", "llama", layers=3, width=16)
    write_corpus(folder / "corpus.jsonl", documents=400)
    corpus = {"MODEL": "subject", "CORPUS": "corpus.jsonl", "TOKENS": 40_000}
    made = execute("own_text", folder, {**corpus, "SETTINGS": list(TINY)})
    said = "".join(output.get("text", "") for output in outputs(made))
    assert "fvu_normalised" in said
    assert "# The corpus:" in said
    assert str(folder) not in json.dumps(made)
    return folder


def test_a_prompt_is_read_and_steered(work):
    run = {"RUN": "runs/mine", "CONFIG": "mine.yaml", "PROMPT": "harvest grain wind chaff row order"}
    made = execute("read_and_steer", work, run)
    tables = [output["data"]["text/html"] for output in outputs(made) if "data" in output]
    assert len(tables) == 6
    assert all(table.startswith(("<table", "<div")) for table in tables)


def test_a_public_dictionary_is_evaluated(work):
    settings = ["evaluate.metrics=[reconstruction,downstream]", "evaluate.windows=16", "subject.device=cpu"]
    execute("public_dictionary", work, {"RUN": "runs/mine", "CONFIG": "mine.yaml", "SETTINGS": settings})
    ours, theirs = (
        Evaluation.from_json((work / run / "evaluation.json").read_bytes(), origin=run)
        for run in ("runs/mine", "runs/theirs")
    )
    assert ours.sae_sha256 != theirs.sae_sha256
    for name in ("fvu_normalised", "delta_ce"):
        assert theirs.figure(name).value == pytest.approx(ours.figure(name).value, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_whole_and_small(name):
    assert (EXAMPLES / f"{name}.ipynb").stat().st_size < LARGEST_BYTES
    cells = [cell for cell in source_of(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert cells[-1].outputs
    for cell in cells:
        assert all(output.output_type != "error" for output in cell.outputs)


def test_every_notebook_is_executed_here():
    assert sorted(path.stem for path in EXAMPLES.glob("*.ipynb")) == sorted(NAMES)
