"""Several SAEs from one read of the store: each has the bits it would have alone, and its own end."""

from __future__ import annotations

import json

import pytest

import winnow.trainer.run.loop as loop
import winnow.trainer.run.member as member
from tests.support.planted import HOOK, OTHER_HOOK, planted_config
from winnow.common.config_file import load_config
from winnow.schemas.errors import ConfigError, NonFiniteError
from winnow.store import ActivationStore
from winnow.trainer.run.loop import train, train_fleet

WEIGHTS = "sae.safetensors"
GRID = {
    "wide": {"latents": 96, "k": 5},
    "fast": {"lr": 0.01, "sample_rows": 300},
    "seed": {"seed": 7, "order_seed": 0, "normalize": "none"},
    "long": {"epochs": 3, "log_every_steps": 3},
    "other": {"hook": OTHER_HOOK},
}
"""`other` needs a stream of its own, `long` goes on when the rest has ended."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = planted_config(tmp_path_factory.mktemp("fleet"), epochs=1.5)
    return load_config(path)


def specs_of(config, folder, grid=GRID):
    changes = {name: {**fields, "out": str(folder / name)} for name, fields in grid.items()}
    return [config.train.model_copy(update=change) for change in changes.values()]


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """Each spec trained in a run of its own: the weights by name."""
    folder = tmp_path_factory.mktemp("alone")
    for spec in specs_of(config, folder):
        train(config.model_copy(update={"train": spec}))
    return {name: (folder / name / WEIGHTS).read_bytes() for name in GRID}


def weights(folder):
    return {name: (folder / name / WEIGHTS).read_bytes() for name in GRID}


def test_a_fleet_gives_every_sae_the_bits_it_has_alone_from_one_read_a_stream(
    config, alone, tmp_path, monkeypatch
):
    opened = []
    original = ActivationStore.stream
    monkeypatch.setattr(
        ActivationStore, "stream",
        lambda self, hooks, **args: opened.append((hooks[0], args["start_step"], args["steps"]))
        or original(self, hooks, **args),
    )  # fmt: skip
    summaries = train_fleet(config, specs_of(config, tmp_path))
    assert weights(tmp_path) == alone
    assert sorted(opened) == [(OTHER_HOOK, 0, 24), (HOOK, 0, 24), (HOOK, 24, 48)]
    assert [summary["steps"] for summary in summaries] == [24, 24, 24, 48, 24]
    for name in GRID:
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == (48 if name == "long" else 24)
        shares = [value for key, value in lines[-1].items() if key.startswith("share_")]
        assert len(shares) == 4
        assert sum(shares) == pytest.approx(1)
        assert lines[-1]["bytes_read_per_s"] > 0
        assert json.loads((tmp_path / name / "status.json").read_text())["state"] == "finished"
    monkeypatch.setattr(member, "train_step", None)
    assert train_fleet(config, specs_of(config, tmp_path)) == summaries, "finished ones are skipped"


class Stopped(Exception):
    """Raised in place of a kill."""


def test_members_that_were_killed_at_different_steps_catch_up_and_join(config, alone, tmp_path, monkeypatch):
    specs = [spec.model_copy(update={"checkpoint_seconds": 0}) for spec in specs_of(config, tmp_path)]
    original = member.train_step

    def step(run, rows, weights, *target):
        if run.recipe.spec.out.endswith("fast") and run.counts.step == 9:
            raise Stopped
        return original(run, rows, weights, *target)

    with monkeypatch.context() as patch:
        patch.setattr(member, "train_step", step)
        with pytest.raises(Stopped):
            train_fleet(config, specs[:4])
    newest = tmp_path / "wide" / "checkpoints"
    (newest / f"{9:012d}" / "index.json").unlink()  # killed before it was made
    begun = []
    take = loop.take_steps
    monkeypatch.setattr(
        loop, "take_steps",
        lambda members, until, *rest: begun.append((len(members), members[0].step, until))
        or take(members, until, *rest),
    )  # fmt: skip
    train_fleet(config, specs)
    assert weights(tmp_path) == alone
    assert (1, 8, 9) in begun
    assert (4, 9, 24) in begun


def test_one_that_is_not_finite_stops_alone_and_is_named(config, alone, tmp_path, monkeypatch, caplog):
    original = member.train_step

    def step(run, rows, weights, *target):
        sick = run.recipe.spec.normalize == "none" and run.counts.step == 12
        return original(run, rows * (1e30 if sick else 1), weights, *target)

    monkeypatch.setattr(member, "train_step", step)
    grid = {name: GRID[name] for name in ("wide", "seed")}
    with pytest.raises(NonFiniteError, match=r"1 of 2 SAEs failed.*seed.*step 12.*units \["):
        train_fleet(config, specs_of(config, tmp_path, grid))
    assert (tmp_path / "wide" / WEIGHTS).read_bytes() == alone["wide"]
    status = json.loads((tmp_path / "seed" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 12)
    assert "The others continue" in caplog.text


@pytest.mark.parametrize("fields", [{"threads": 2}, {"out": "same"}])
def test_what_cannot_share_a_process_is_refused(config, tmp_path, fields):
    specs = specs_of(config, tmp_path, {"a": {}, "b": {}})
    if "out" in fields:
        fields = {"out": specs[0].out}
    with pytest.raises(ConfigError, match="trained together"):
        train_fleet(config, [specs[0], specs[1].model_copy(update=fields)])
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_extended_and_a_shorter_or_other_one_refused(config, tmp_path):
    (spec,) = specs_of(config, tmp_path, {"run": {}})
    first = train(config.model_copy(update={"train": spec}))
    more = config.model_copy(update={"train": spec.model_copy(update={"epochs": 3})})
    with pytest.raises(ConfigError, match="--extend"):
        train(more)
    summary = train(more, extend=True)
    assert (first["steps"], summary["steps"]) == (24, 48)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr"] for line in lines}
    assert rates[24] < rates[30] == 0.003, "back up to the peak"
    assert train(more) == summary
    with pytest.raises(ConfigError, match=r"epochs: 3\.0 -> 1\.5"):
        train(config.model_copy(update={"train": spec}), extend=True)
    with pytest.raises(ConfigError, match="k: 3 -> 4"):
        train(more.model_copy(update={"train": spec.model_copy(update={"epochs": 5, "k": 4})}), extend=True)
