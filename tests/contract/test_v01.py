"""What Winnow 0.1.0 stored opens: datasets, a run to be resumed, a published SAE, its index, a queue.

`golden/v0.1` was made by `make_golden.py`. None of its files holds the name of a module or a pickled
object: they are JSON, YAML, Zarr, Parquet and safetensors, so modules may move. A failure here means that
what somebody has stored no longer opens, or that a run that was stopped ends with other weights.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import winnow.jobs.service as service_module
from tests.contract.make_golden import (
    HOOK,
    INT8_HOOK,
    PLACE,
    STOP_STEP,
    codes,
    dataset_facts,
    index_facts,
    probe,
    queue_facts,
    run_facts,
)
from winnow import ActivationStore, evaluate
from winnow.common.config_file import load_config
from winnow.explorer.index.build import Recipe
from winnow.explorer.index.table import FeatureTable
from winnow.jobs.runs import find_runs
from winnow.jobs.service import Service
from winnow.sae.model import Sae
from winnow.schemas.training import SaeCard
from winnow.store.check.verify import verify
from winnow.store.objects import open_store
from winnow.trainer.run.checkpoint_files import newest_checkpoint
from winnow.trainer.run.loop import train

V01 = Path(__file__).parent / "golden" / "v0.1"
EXPECTED = json.loads((V01 / "expected.json").read_text(encoding="utf-8"))
SAME_BITS = probe() == EXPECTED["probe"]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of all of it that may be written to."""
    shutil.copytree(V01, tmp_path / "v0.1")
    return tmp_path / "v0.1"


def require_same_weights(run: Path) -> None:
    """The published weights, and all that the last checkpoint holds, are those of the run without a stop."""
    if SAME_BITS:
        assert (run / "sae.safetensors").read_bytes() == (V01 / "run" / "sae.safetensors").read_bytes()
    found, expected = (newest_checkpoint(open_store(str(each))) for each in (run, V01 / "run"))
    assert found is not None
    assert expected is not None
    assert found[0].step == expected[0].step == EXPECTED["run"]["steps"]
    state, wanted = found[1], expected[1]
    assert state.keys() == wanted.keys()
    for name in wanted.keys() - {"count.seconds", "count.seconds_waiting"}:
        # Of the tensor's largest number: other instructions moved at most 1.1e-6 of it in 32 steps, a
        # checkpoint without its moments, average or dead counters 1e-2 and more.
        limit = 0.0 if SAME_BITS else 1e-3 * wanted[name].double().abs().max().item()
        torch.testing.assert_close(
            state[name], wanted[name], rtol=0, atol=limit, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize(("name", "hook"), [("data", HOOK), ("data-int8", INT8_HOOK)])
def test_a_dataset_opens_and_every_byte_is_as_it_was_committed(name, hook):
    assert verify(open_store(str(V01 / name)), "full") == []
    assert dataset_facts(V01 / name, hook) == EXPECTED[name]


def test_a_stopped_run_resumes_and_ends_with_the_weights_of_the_run_without_a_stop(copy):
    found = newest_checkpoint(open_store(str(copy / "stopped")))
    assert found is not None
    index, tensors = found
    assert index.step == STOP_STEP
    assert 0 < tensors["count.auxk_steps"] < EXPECTED["run"]["auxk_steps"]  # dead latents before and after
    assert {"ema.W_dec", "adam.W_enc.exp_avg", "dead.since"} <= tensors.keys()
    config = load_config(V01 / "config.yaml", [f"root={copy / 'data'}", f"train.out={copy / 'stopped'}"])
    train(config)
    require_same_weights(copy / "stopped")
    steps = [
        json.loads(line)["step"] for line in (copy / "stopped" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [
        json.loads(line)["step"] for line in (V01 / "run" / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_finished_run_is_only_shown_again(copy):
    config = load_config(V01 / "config.yaml", [f"root={copy / 'data'}", f"train.out={copy / 'run'}"])
    assert train(config) == json.loads((V01 / "run" / "summary.json").read_bytes())
    assert run_facts(copy / "run") == EXPECTED["run"]


def test_runs_are_listed_as_they_ended():
    seen = {run.name: (run.state, run.status.step) for run in find_runs(open_store(str(V01)))}
    assert seen == {"run": ("finished", EXPECTED["run"]["steps"]), "stopped": ("stopped", STOP_STEP)}


def test_a_published_sae_gives_the_codes_it_gave():
    found, expected = codes(V01 / "run", V01 / "data"), EXPECTED["codes"]
    assert found["indices"] == expected["indices"]
    np.testing.assert_allclose(found["values"], expected["values"], rtol=1e-5)
    sae = Sae.load(str(V01 / "run"))
    assert sae.card == SaeCard.from_json((V01 / "run" / "sae.json").read_bytes(), origin="sae.json")
    assert sae.card.weights_sha256 == EXPECTED["run"]["sae_sha256"]
    assert sae.card.identity.dataset_sha256 == EXPECTED["data"]["dataset"]
    for name, tensor in load_file(V01 / "run" / "sae.safetensors").items():
        assert torch.equal(sae.tensors()[name], tensor), name


def test_an_index_opens_and_is_finished(copy):
    assert index_facts(V01 / "run") == EXPECTED["index"]
    features = copy / "run" / "features"
    card = Sae.load(str(copy / "run")).card
    meta = FeatureTable.open(str(features), sae_sha256=card.weights_sha256).meta
    recipe = Recipe(str(copy / "run"), str(copy / "data"), str(features), None, meta.spec)
    assert recipe.open().run() == meta  # nothing of it is made again, which would need the subject


def test_a_service_takes_over_what_an_earlier_one_left(copy, monkeypatch):
    assert queue_facts(V01 / "queue") == EXPECTED["jobs"]
    assert sorted(job["state"] for job in EXPECTED["jobs"]) == ["finished", "running", "waiting"]
    for path in copy.glob("queue/jobs/*/job.json"):
        path.write_text(path.read_text().replace(PLACE, str(copy)))
    monkeypatch.setattr(service_module, "LEASE_SECONDS", 0.0)  # the earlier service's lease is over
    root = open_store(str(copy / "queue"))
    Service(root, ["cpu0", "cpu1"], dict(os.environ), poll_seconds=0.1).run(until_empty=True)
    attempts = {
        Path(job["outs"][0]).name: (job["state"], job["attempts"]) for job in queue_facts(copy / "queue")
    }
    assert attempts == {"run": ("finished", 2), "stopped": ("finished", 2), "waiting": ("finished", 1)}
    require_same_weights(copy / "stopped")
    assert Sae.load(str(copy / "waiting")).card.spec.seed == 1


def test_what_lies_in_a_folder_opens_by_its_path_too(copy: Path) -> None:
    sets = [f"root={copy / 'data'}", "evaluate.metrics=[reconstruction]"]
    found = evaluate(copy / "run", load_config(copy / "config.yaml", sets), out=copy / "figures")
    assert json.loads((copy / "figures" / "evaluation.json").read_text()) == json.loads(found.to_json())
    assert ActivationStore.open(copy / "data").hooks == (HOOK,)
    assert repr(Sae.load(copy / "run")) == "Sae(d_model=16, latents=48, k=4, activation='topk')"
