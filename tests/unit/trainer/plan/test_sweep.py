"""A grid's specs and names, what is refused, and what runs look like from outside."""

from __future__ import annotations

import time

import pytest

from winnow.jobs.runs import find_runs, sparkline, watch_rows
from winnow.schemas.base import validate
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError
from winnow.schemas.service import RunStatus
from winnow.store.objects import open_store
from winnow.trainer.plan import sweep
from winnow.trainer.plan.grid import grid_specs
from winnow.trainer.run.status import ask_to_stop

BASE = {"out": "unused", "hook": "h.1", "latents": 64, "k": 4, "seed": 3}


def config(grid, **train) -> Config:
    raw = {"root": "data", "train": BASE | train, "sweep": {"out": "runs/grid/", "grid": grid}}
    return validate(Config, raw, origin="test")


def test_a_grid_is_every_combination_with_k_at_most_latents():
    specs = grid_specs(config({"latents": [8, 16], "k": [4, 16], "lr": [1e-3]}))
    assert [spec.out for spec in specs] == [
        "runs/grid/latents-8_k-4_lr-0.001",
        "runs/grid/latents-16_k-4_lr-0.001",
        "runs/grid/latents-16_k-16_lr-0.001",
    ]
    assert {(spec.seed, spec.order_seed) for spec in specs} == {(3, None)}


def test_seeds_share_the_order():
    specs = grid_specs(config({"seed": [0, 1], "hook": ["a.b", "c"]}))
    assert {(spec.seed, spec.stream_seed) for spec in specs} == {(0, 3), (1, 3)}
    assert specs[0].out == "runs/grid/seed-0_hook-a.b"


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"latent": [8]}, "fields of train"),
        ({"out": ["x"]}, "fields of train"),
        ({"k": [4, 4]}, "each once"),
        ({"k": []}, "one or more"),
        ({"k": [65]}, "at most latents"),
        ({"k": [2, True]}, "sweep.grid at k-True: k: expected a number, got true"),
        ({"k": [3, 3.0]}, "differ, got k-3 and k-3.0, which are the same"),
        ({"k": ["many"]}, "k-many"),
        ({"batch_rows": [100]}, "lanes"),
        ({"hook": ["a.b", "a b"]}, "hook"),
    ],
)
def test_a_wrong_grid_is_one_sentence(grid, words):
    with pytest.raises(ConfigError, match=words):
        grid_specs(config(grid))


def test_a_grid_that_does_not_fit_says_what_it_needs(monkeypatch):
    class Dataset:
        def d_model(self, hook: str) -> int:
            return 1000

    monkeypatch.setattr(sweep, "free_memory", lambda _: 2**30)
    specs = grid_specs(config({"latents": [65536, 131072]}, device="cpu"))
    with pytest.raises(
        ConfigError, match=r"2 SAEs at once.*1\.0 GiB.*got 7\.[0-9] GiB.*Split the grid into 9"
    ):
        sweep.require_room(specs, Dataset())
    small = grid_specs(config({"latents": [64, 128]}, device="cpu", batch_rows=64))
    assert 0 < sweep.require_room(small, Dataset()) < 2**30


def status(state="training", **fields) -> RunStatus:
    facts = {"state": state, "step": 5, "steps": 10, "tokens": 50, "latents": 64, "k": 4, "hook": "h.1"}
    return RunStatus.model_validate(facts | {"beat": time.time()} | fields)


def test_runs_are_found_with_their_states(tmp_path):
    told = {
        "a": status(fvu=0.25, eta_seconds=65.0, cost=1.5, currency="EUR"),
        "b/c": status("finished"),
        "d": status(beat=time.time() - 1000),
        "e": status("failed", cause="the loss of step 3 is not finite"),
        "f": status(),
    }
    for name, facts in told.items():
        open_store(str(tmp_path / name)).put("status.json", facts.to_json())
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "status.json").write_text("torn")
    ask_to_stop(open_store(str(tmp_path / "f")))
    found = {seen.name: seen for seen in find_runs(open_store(str(tmp_path)))}
    assert {name: seen.state for name, seen in found.items()} == {
        "a": "training", "b/c": "finished", "d": "lost", "e": "failed", "f": "stopping",
    }  # fmt: skip
    assert found["a"].row() == ["a", "training", "50%", "1:05", "64 / 4", "0.2500", "0", "1.50 EUR"]
    (alone,) = find_runs(open_store(str(tmp_path / "a")))
    assert alone.name == ""
    records = [
        {"fvu": 0.5**n, "l0": 4.0, "dead_share": 0, "grad_norm": n, "share_encode": 1.0} for n in range(3)
    ]
    shown = dict(watch_rows("a", alone, records))
    assert shown["steps"] == "5 of 10 (50%)"
    assert shown["FVU"] == "0.25  █▅▁"
    assert shown["a step's time"] == "encode 100%"


def test_a_sparkline_leaves_out_what_is_no_number():
    assert sparkline([float("nan"), 1, 2]) == "▁█"
    assert sparkline([]) == ""
    assert len(sparkline(list(range(1000)), 50)) == 50
