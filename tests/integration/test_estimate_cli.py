"""`winnow estimate` on a dataset: the steps that training would take, and its refusals."""

from __future__ import annotations

import json
import re

import pytest
import typer
from typer.testing import CliRunner

from tests.support.planted import planted_config
from winnow.cli import estimate as estimate_cli
from winnow.common.config_file import load_config
from winnow.schemas.config import section
from winnow.store import ActivationStore
from winnow.store.read.stream import memory_bytes
from winnow.trainer.run.start import plan_order, resolve_recipe


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    made = typer.Typer()
    estimate_cli.register(made)
    return made


def test_steps_are_those_that_training_would_take(tmp_path, app):
    path = planted_config(tmp_path, epochs=1.7)
    config = load_config(path)
    spec, dataset = section(config.train, "train"), ActivationStore.open(config.root)
    result = CliRunner().invoke(app, [str(path), "--json"])
    assert result.exit_code == 0, result.output
    recipe = resolve_recipe(spec, dataset, plan_order(spec, dataset))
    found = json.loads(result.stdout)
    assert found["steps"] == recipe.steps > 0
    units = len(dataset.plan.split_units("train"))
    assert found["data"]["shards"] == units
    assert found["data"]["bytes"] == units * dataset.plan.shard_bytes(spec.hook)
    order = plan_order(spec, dataset)
    assert found["stream_bytes"] == memory_bytes(dataset.plan, order, [spec.hook], dtype="packed")
    assert found["stream_bytes"] < 2**26 < spec.group_bytes


def test_a_small_run_takes_seconds_and_a_cpu_has_no_rates(tmp_path, app):
    path = str(planted_config(tmp_path))
    shown = CliRunner().invoke(app, [path]).stdout
    assert re.search(r"time +│ +(\d+|under 1) s ", shown), shown
    refused = CliRunner().invoke(app, [path, "--gpu", "cpu"])
    assert refused.exit_code == 2
    assert "no published rate" in refused.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [("epochs=0.01", "one step"), ("auxk_k=65", "auxk_k"), ("batch_rows=8192", "batch_rows=8192")],
)
def test_what_training_refuses_on_this_dataset_is_refused(tmp_path, app, change, words):
    result = CliRunner().invoke(app, [str(planted_config(tmp_path)), "--set", f"train.{change}"])
    assert result.exit_code == 2, result.output
    assert words in result.stderr


def test_a_set_needs_its_layers_where_no_dataset_says_how_many(tmp_path, app):
    path = tmp_path / "set.yaml"
    path.write_text("root: nowhere\ntrain: {out: nowhere, latents: 2048, k: 16}\n")
    lacking = CliRunner().invoke(app, [str(path), "--set", "train.hook=resid_post.1"])
    assert lacking.exit_code == 2, lacking.output
    assert "--tokens N --d-model D, got no plan.json at nowhere" in lacking.stderr
    options = ["--tokens", "1e6", "--d-model", "64", "--json", "--set"]
    result = CliRunner().invoke(app, [str(path), *options, "train.set={layers: all, cross: true}"])
    assert result.exit_code == 2, result.output
    assert "[first, last]" in result.stderr
    told = [
        CliRunner().invoke(app, [str(path), *options, f"train.set={{layers: [0, 3], cross: {cross}}}"])
        for cross in ("false", "true")
    ]
    plt, clt = (json.loads(result.stdout) for result in told)
    assert plt["data"]["bytes"] == clt["data"]["bytes"] == 8 * 1e6 * 64 * 2
    # four encoders, and ten decoders in the place of four
    assert clt["memory"]["weights"] == pytest.approx(14 / 8 * plt["memory"]["weights"], rel=0.02)
