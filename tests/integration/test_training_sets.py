"""Transcoder sets trained from a dataset on disk: they learn, resume exactly, and are one artefact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import winnow.trainer.run.member as member
from tests.support.set_data import LAYERS, set_config
from winnow.common.config_file import load_config
from winnow.jobs.runs import find_runs
from winnow.sae import Sae, TranscoderSet
from winnow.schemas.errors import ConfigError, NonFiniteError
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.trainer.run.loop import train
from winnow.trainer.run.start import plan_order

RANGE = [0, LAYERS - 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose dataset is written once."""
    path = tmp_path_factory.mktemp("sets")
    set_config(path)
    return path


def bytes_of(out: Path) -> dict[str, bytes]:
    """Every published file of weights."""
    return {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("layer_*/*.safetensors"))
    }


class Stopped(Exception):
    """Raised in place of a kill."""


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    original = member.train_set

    def step(run, *batch):
        if run.counts.step == steps:
            raise Stopped
        return original(run, *batch)

    monkeypatch.setattr(member, "train_set", step)


def test_a_dataset_that_lacks_layers_is_trained_on_those_that_it_has(folder):
    config = load_config(set_config(folder))
    dataset = ActivationStore.open(config.root)
    spec = config.train
    assert spec is not None
    assert spec.set is not None
    beyond = spec.model_copy(update={"set": spec.set.model_copy(update={"layers": (1, LAYERS + 3)})})
    with pytest.raises(ConfigError, match=rf"set train\.set\.layers to \[1, {LAYERS - 1}\]\. Harvest into"):
        plan_order(beyond, dataset)
    none = spec.model_copy(update={"set": spec.set.model_copy(update={"layers": (LAYERS, LAYERS + 3)})})
    with pytest.raises(ConfigError, match="Harvest into another root") as caught:
        plan_order(none, dataset)
    assert "train.set.layers" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"activation": "batchtopk"},
        {"accumulate": 2, "moments": "int8"},
        {"cross": True},
        {"cross": True, "activation": "batchtopk", "accumulate": 2},
    ],
    ids=["per-layer", "per-layer, batchtopk", "per-layer, accumulate", "cross", "cross, batchtopk"],
)
def test_a_set_learns_resumes_to_the_same_bits_and_is_one_run(folder, tmp_path, monkeypatch, fields):
    config = load_config(set_config(folder, out=str(tmp_path / "whole"), **fields))
    summary = train(config)
    assert summary["fvu"] < 0.25
    assert list(summary["layers"]) == ["0", "1", "2"]
    assert summary["hook"] == "resid_mid.0-2"

    config = load_config(set_config(folder, out=str(tmp_path / "run"), checkpoint_seconds=0, **fields))
    with monkeypatch.context() as patch:
        stop_after(patch, 20)
        with pytest.raises(Stopped):
            train(config)
    assert not (tmp_path / "run" / "set.json").exists()
    assert train(config)["set_sha256"]
    assert bytes_of(tmp_path / "run") == bytes_of(tmp_path / "whole")

    found = TranscoderSet.load(tmp_path / "run")
    assert found.card is not None
    assert (found.layers, found.card.identity.subject_model) == (range(LAYERS), "synthetic")
    # a layer is a transcoder that can be loaded alone
    layer = Sae.load(tmp_path / "run" / "layer_1")
    written = ("mlp_out.1", "mlp_out.2") if found.cross else ("mlp_out.1",)
    assert (layer.card.hook, layer.card.output_hooks) == ("resid_mid.1", written)
    assert (
        layer.card.metrics[f"fvu_normalised.{layer.card.weights}"] == summary["layers"]["1"]["fvu_normalised"]
    )
    (seen,) = find_runs(open_store(str(tmp_path / "run")))
    assert (seen.state, seen.status.hook, seen.status.fvu) == ("finished", "resid_mid.0-2", summary["fvu"])
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"fvu.0", "fvu.1", "fvu.2"} < records[-1].keys()
    assert records[-1]["fvu"] == pytest.approx(sum(records[-1][f"fvu.{n}"] for n in range(LAYERS)) / LAYERS)


def test_a_layer_of_a_per_layer_set_is_what_it_is_alone(folder, tmp_path):
    train(load_config(set_config(folder, out=str(tmp_path / "set"), epochs=1)))
    alone = {"set": None, "hook": "resid_mid.1", "target_hook": "mlp_out.1", "normalize": "dataset"}
    train(load_config(set_config(folder, out=str(tmp_path / "alone"), epochs=1, **alone)))
    ours, theirs = Sae.load(tmp_path / "set" / "layer_1"), Sae.load(tmp_path / "alone")
    assert torch.equal(ours.W_dec, theirs.W_dec)
    assert torch.equal(ours.W_enc, theirs.W_enc)


def test_a_range_of_layers_is_trained_and_a_finished_set_is_not_trained_again(folder, tmp_path, told):
    config = load_config(set_config(folder, out=str(tmp_path / "run"), layers=[1, 2], epochs=1))
    train(config)
    assert TranscoderSet.load(tmp_path / "run").layers == range(1, 3)
    assert train(config)["steps"] == 16
    assert any("is finished" in line for line in told)
    assert "is finished" in told.text if hasattr(told, "text") else True
    other = load_config(set_config(folder, out=str(tmp_path / "run"), layers=[0, 2], epochs=1))
    with pytest.raises(ConfigError, match="set"):
        train(other)


def test_what_no_dataset_or_subject_has_is_refused_and_nothing_is_written(folder, tmp_path):
    out = tmp_path / "run"
    for fields, said in [
        ({"layers": "all"}, "mlp_out.3|resid_mid.3"),
        ({"layers": [2, 4]}, "layers from 0 to 3"),
        ({"layers": RANGE, "set": {"layers": RANGE, "reads": "mlp_in"}}, "mlp_in.0"),
    ]:
        with pytest.raises(ConfigError, match=said):
            train(load_config(set_config(folder, out=str(out), **fields)))
    assert not out.exists()


def test_a_layer_that_is_not_finite_ends_the_whole_set(folder, tmp_path):
    config = load_config(set_config(folder, out=str(tmp_path / "run"), layers=RANGE, lr=1e30))
    with pytest.raises(NonFiniteError):
        train(config)
    assert not (tmp_path / "run" / "set.json").exists()
