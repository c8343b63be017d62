"""The task with known directions: what its rows are, and what the figures count."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from winnow.cli.main import app
from winnow.evaluator.recovery.page import best_lr, draw_curves, next_lr, page_of
from winnow.evaluator.recovery.task import BLOCK_ROWS, Task, measure_recovery
from winnow.evaluator.recovery.train import VARIANTS, fields_of, measure_run, spec_of, train_on, train_variant


def test_rows_are_what_the_task_says():
    task = Task(rows=3 * BLOCK_ROWS)
    rows, coefficients = task.block(1)
    active = coefficients > 0
    counts = active.sum(1)
    assert counts.min() >= 1
    assert counts.mean() == pytest.approx(8, rel=0.02)
    assert counts.var() == pytest.approx(8, rel=0.06)
    assert (coefficients[active].min(), coefficients[active].max()) == pytest.approx((0.5, 1.5), abs=1e-3)
    assert np.linalg.norm(task.truth, axis=1) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(task.bias) == pytest.approx(1, abs=1e-6)
    noise = rows - coefficients @ task.truth - task.bias
    assert noise.std() == pytest.approx(0.01, rel=0.02)
    # the first of a draw falls on direction r in proportion to 1/r
    single = replace(task, active=1e-9, seed=3).block(0)[1] > 0
    assert (single.sum(1) == 1).all()
    share = single.mean(0)
    harmonic = (1 / np.arange(1, 257)).sum()
    assert share[0] == pytest.approx(1 / harmonic, rel=0.06)
    assert share[9:20].sum() == pytest.approx((1 / np.arange(10, 21)).sum() / harmonic, rel=0.12)


def test_equal_tasks_give_equal_rows_and_other_seeds_others():
    task = Task(rows=20_000)
    assert np.array_equal(task.block(2)[0], Task(rows=20_000).block(2)[0])
    assert len(task.block(2)[0]) == 20_000 - 2 * BLOCK_ROWS
    assert not np.allclose(task.block(0)[0][:50], replace(task, seed=1).block(0)[0][:50])
    batches = list(task.batches(3000))
    assert [len(batch) for batch in batches] == [3000] * 6
    whole = np.concatenate([task.block(n)[0] for n in range(3)])
    assert np.array_equal(np.concatenate(batches), whole[:18_000])


def test_figures_of_known_decoders():
    truth = Task().truth
    assert list(measure_recovery(3 * truth[::-1], truth).values()) == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)
    half = measure_recovery(truth[:128], truth)
    assert half["found"] == 0.5
    assert half["matched_cosine"] == pytest.approx(0.5, abs=1e-6)
    twice = np.repeat(truth[:128], 2, axis=0)  # every other latent is a copy: one to one, it finds half
    assert measure_recovery(twice, truth)["found"] == 0.5
    assert measure_recovery(-truth, truth)["found"] == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_finds_more_than_it_began_with(variant):
    task = Task(d_model=16, directions=24, active=2.0, rows=24_576)
    spec = spec_of(task, 24, 2, batch_rows=256, dead_after_tokens=1000, **fields_of(variant, 24, 2))
    small = {"batch_rows": 256, "dead_after_tokens": 1000}
    run = train_variant(variant, task, 24, 2, **small)
    found = measure_run(run, task)
    assert run.counts.step == (48 if variant == "topk-pruned" else 96)
    begun = measure_run(train_on(replace(task, rows=256), spec.model_copy(update={"lr": 1e-9})), task)
    assert found["matched_cosine"] > begun["matched_cosine"] + 0.1
    assert found["fvu"] < 0.5
    if spec.activation == "batchtopk":
        assert found["l0"] == pytest.approx(2, rel=0.05)


def test_the_command_writes_results_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("winnow.evaluator.recovery.page.LEARNING_RATES", (0.003, 0.01))
    arguments = ["recovery", str(tmp_path), "--variants", "topk", "--latents", "32", "--rows", "16384"]
    for seeds in ("1", "2"):
        result = CliRunner().invoke(app, [*arguments, "--seeds", seeds, "--json"])
        assert result.exit_code == 0, result.output
    runs = json.loads(result.stdout)["runs"]
    assert [(run["seed"], run["lr"]) for run in runs[:2]] == [(0, 0.01), (0, 0.003)]
    assert len(runs) == 3
    best = max(runs[:2], key=lambda run: run["matched_cosine"])
    assert runs[2]["lr"] == best["lr"]
    assert "± " in (tmp_path / "recovery.md").read_text()
    assert (tmp_path / "recovery.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("winnow.evaluator.recovery.runs.train_variant", None)  # nothing is left to train
    (tmp_path / "recovery.remarks.md").write_text("What a person says.\n")
    assert CliRunner().invoke(app, [*arguments, "--seeds", "2"]).exit_code == 0
    assert (tmp_path / "recovery.md").read_text().endswith("\nWhat a person says.\n")


def test_the_search_goes_on_until_the_best_rate_lies_between_two_others():
    def searched(best: float) -> list[float]:
        cell: list[dict[str, float]] = []
        while (lr := next_lr(cell, 0.01)) is not None:
            cell.append({"seed": 0, "lr": lr, "matched_cosine": -abs(math.log(lr / best))})
        assert best_lr([*cell, {"seed": 1, "lr": 0.1, "matched_cosine": 1.0}]) == best
        return [run["lr"] for run in cell]

    assert searched(0.01) == [0.01, 0.0055, 0.018]
    assert searched(0.003) == [0.01, 0.0055, 0.003, 0.0018]
    assert searched(0.03) == [0.01, 0.0055, 0.018, 0.03, 0.055]
    assert searched(0.1) == [0.01, 0.0055, 0.018, 0.03, 0.055, 0.1]  # the end of the ladder


def test_the_page_ranks_the_trainers_of_a_size_and_draws_the_curve_over_sizes():
    figures = {"found": 1.0, "max_cosine": 1.0, "fvu": 0.1, "l0": 8.0, "rows": 1000}
    records = [
        {"variant": name, "latents": n, "k": 8, "seed": seed, "lr": 0.01, **figures}
        | {"matched_cosine": {"ours": 0.8, "theirs": 0.9}[name] + seed / 100}
        for name, n in (("ours", 128), ("ours", 256), ("ours", 512), ("theirs", 256))
        for seed in (0, 1)
    ]
    text = page_of(records)
    head, rest = text.split("## N = 256, K = 8")
    ranked, others = rest.split("## Other sizes")
    assert "| ours |" not in head
    assert ranked.index("| theirs |") < ranked.index("| ours |")
    assert "| theirs | 256 | 8 | ~ 0.01 | 2 |" in ranked  # no other rate was tried
    assert "0.905 ± 0.064" in ranked  # two seeds: t = 12.7 times 0.01 / 2
    assert others.index("| ours | 128 |") < others.index("| ours | 512 |")
    assert draw_curves(records[:4]) is None
    assert (draw_curves(records) or b"").startswith(b"\x89PNG")


def test_a_variant_that_is_not_there_is_named():
    result = CliRunner().invoke(app, ["recovery", "x", "--variants", "gelu"])
    assert result.exit_code == 2
    assert "gelu" in result.stderr
