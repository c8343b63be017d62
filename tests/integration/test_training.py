"""Training from a real dataset on disk: it learns, resumes exactly, publishes, and refuses bad input."""

from __future__ import annotations

import json
import signal
import threading

import pytest
import torch
from typer.testing import CliRunner

import winnow.trainer.run.member as member
from tests.support.planted import (
    D_MODEL,
    HOOK,
    OTHER_HOOK,
    SINKS_PER_UNIT,
    mean_max_cosine,
    planted_config,
    planted_rows,
)
from winnow.cli.train import make_app
from winnow.common.config_file import load_config
from winnow.sae import Sae
from winnow.schemas.checkpoint import CheckpointIndex
from winnow.schemas.errors import ConfigError, IntegrityError, NonFiniteError
from winnow.schemas.evaluation import LOSSES_KEY
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.store.objects.local import LocalStore
from winnow.store.testing import make_plan, write_dataset
from winnow.trainer.mesh.shard import Shard
from winnow.trainer.run.heldout import heldout_figures
from winnow.trainer.run.loop import train

WEIGHTS = "sae.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose dataset is written once."""
    path = tmp_path_factory.mktemp("planted")
    planted_config(path)
    return path


@pytest.fixture
def config_of(folder, tmp_path):
    """A config of the shared dataset with `out` in this test's folder."""

    def make(**fields):
        return load_config(planted_config(folder, **{"out": str(tmp_path / "run")} | fields))

    return make


@pytest.fixture(scope="module")
def whole(folder) -> bytes:
    """The published weights of the config as it is, trained without a break."""
    train(load_config(planted_config(folder, out=str(folder / "whole"))))
    return (folder / "whole" / WEIGHTS).read_bytes()


class Stopped(Exception):
    """Raised in place of a kill."""


def stop_after(monkeypatch, steps: int):
    """Make the step number `steps` fail like a killed process: nothing is saved on the way out."""
    original = member.train_step

    def step(run, *batch):
        if run.counts.step == steps:
            raise Stopped
        return original(run, *batch)

    monkeypatch.setattr(member, "train_step", step)


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_planted_directions_are_found_and_everything_is_published(config_of, tmp_path):
    config = config_of(epochs=30, lr=0.006)
    summary = train(config)
    out = tmp_path / "run"
    sae = Sae.load(out)
    assert mean_max_cosine(sae.W_dec) > 0.9
    assert summary["fvu"] < 0.1
    assert 0 < summary["l0"] <= 3
    dataset = ActivationStore.open(config.root)
    figures = heldout_figures([Shard.alone(sae)], dataset, HOOK)[0]
    assert (figures["fvu_normalised"], figures["fvu_raw"]) == (summary["fvu"], summary["fvu_raw"])
    assert summary["fvu_raw"] < 0.1  # the sinks, 1000 times larger, are left out
    assert sae.card is not None
    assert sae.card.weights == summary["weights"]
    assert {"fvu_normalised.raw", "fvu_normalised.ema"} <= set(sae.card.metrics)
    best = min(sae.card.metrics[f"fvu_normalised.{name}"] for name in ("raw", "ema"))
    assert summary["fvu"] == best
    assert sae.card.identity is not None
    assert sae.card.identity.dataset_sha256 == dataset.manifest.dataset_sha256
    assert summary == json.loads((out / "summary.json").read_text())
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    steps = [line["step"] for line in lines(out)]
    assert steps == sorted(set(steps))
    assert steps[-1] == summary["steps"]
    rows = 8 * 512 - 8 * SINKS_PER_UNIT
    assert summary["tokens"] == 30 * rows
    assert checkpoints(out)[-1] == summary["steps"]


@pytest.mark.parametrize(
    "fields", [{"normalize": "dataset"}, {"normalize": "none"}, {"multi_topk": True, "ema": False}]
)
def test_other_recipes_train_too(config_of, fields):
    summary = train(config_of(epochs=8, **fields))
    assert summary["fvu"] < 0.6


VARIANTS = {
    "batchtopk": {"activation": "batchtopk"},
    "matryoshka": {"matryoshka": [16, 32], "activation": "batchtopk"},
    "relu": {"activation": "relu", "sparsity_coefficient": 0.1},
    "jumprelu": {"activation": "jumprelu", "normalize": "dataset"},
    "transcoder": {"target_hook": OTHER_HOOK},
    "skip": {"target_hook": OTHER_HOOK, "skip": True, "target_normalize": "none"},
    "crosscoder": {"with_hooks": [OTHER_HOOK], "normalize": "dataset", "k": 6},
    "micro-batches": {"accumulate": 4, "lanes": 8},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_learns_publishes_and_resumes_to_the_same_bits(
    config_of, tmp_path, monkeypatch, fields
):
    config = config_of(epochs=8, lr=0.01, checkpoint_seconds=0, **fields)
    with monkeypatch.context() as patch:
        stop_after(patch, 30)
        with pytest.raises(Stopped):
            train(config)
    summary = train(config)
    other = train(config_of(epochs=8, lr=0.01, out=str(tmp_path / "whole"), **fields))
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert summary["fvu"] == other["fvu"]
    # the other hook's rows are drawn without regard to this hook's: a transcoder can only give their mean
    assert summary["fvu"] < (1.05 if "target_hook" in fields else 0.45)
    sae = Sae.load(tmp_path / "run")
    spec = config.train
    widths = dict.fromkeys((HOOK, OTHER_HOOK), D_MODEL)
    assert (sae.parts, sae.card.output_hooks) == (spec.parts(widths), spec.output_hooks)
    dataset = ActivationStore.open(config.root)
    figures = heldout_figures([Shard.alone(sae)], dataset, *spec.input_hooks, target=spec.target_hook)[0]
    assert (figures["fvu_normalised"], figures["l0"]) == (summary["fvu"], summary["l0"])
    if spec.activation == "batchtopk":
        assert summary["l0"] == pytest.approx(spec.k, rel=0.05)


@pytest.mark.parametrize("moment", [7, 16, 47])
def test_a_run_stopped_at_any_step_and_run_again_gives_the_same_bits(
    config_of, tmp_path, monkeypatch, moment
):
    fields = {"log_every_steps": 3, "normalize": "dataset", "multi_topk": True}
    fields |= {"latents": 512, "dead_after_tokens": 600}
    train(config_of(out=str(tmp_path / "whole"), **fields))
    config = config_of(checkpoint_seconds=0, **fields)
    with monkeypatch.context() as patch:
        stop_after(patch, moment)
        with pytest.raises(Stopped):
            train(config)
    assert not (tmp_path / "run" / WEIGHTS).exists()
    train(config)
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    kept = ("step", "tokens", "loss", "fvu", "l0", "dead_share", "auxk_steps", "grad_norm", "lr")
    found, expected = ([[line[k] for k in kept] for line in lines(tmp_path / n)] for n in ("run", "whole"))
    assert found == expected
    assert expected[-1][6] > 0, "AuxK was never active"


def checkpoints(out) -> list[int]:
    return sorted(int(path.parent.name) for path in out.glob("checkpoints/*/index.json"))


def damage(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 8
        path.write_bytes(data)


@pytest.mark.parametrize("file", ["state.safetensors", "index.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_stepped_over(
    whole, config_of, tmp_path, monkeypatch, told, caplog, file, how
):
    config = config_of(checkpoint_seconds=0)
    with monkeypatch.context() as patch:
        stop_after(patch, 20)
        with pytest.raises(Stopped):
            train(config)
    assert checkpoints(tmp_path / "run") == [19, 20]
    damage(tmp_path / "run" / "checkpoints" / f"{20:012d}" / file, how)
    train(config)
    assert f"resuming from the checkpoint at step 19 of 48: {tmp_path / 'run'}" in told
    if (file, how) != ("index.json", "missing"):  # without an index it is no checkpoint at all
        assert "checkpoint 20 is damaged" in caplog.text
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == whole
    assert checkpoints(tmp_path / "run") == [47, 48]


def test_when_every_checkpoint_is_damaged_nothing_is_guessed(config_of, tmp_path, monkeypatch):
    config = config_of(checkpoint_seconds=0)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stopped):
            train(config)
    for path in (tmp_path / "run" / "checkpoints").glob("*/state.safetensors"):
        damage(path, "flipped")
    with pytest.raises(IntegrityError, match="every checkpoint"):
        train(config)


def test_a_finished_run_is_shown_and_not_trained_again(config_of, tmp_path, monkeypatch, told):
    config = config_of()
    first = train(config)
    stop_after(monkeypatch, 0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert train(config) == first
    assert told[-1] == f"{tmp_path / 'run'} is finished: nothing to train"
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_figures_that_need_the_subject_are_added_once(config_of):
    config, calls = config_of(), []

    def after(given, sae, dataset, hook, out):
        out.put(LOSSES_KEY, b"so far")
        calls.append((given, hook, sae.card.hook, dataset.rows))
        return {"delta_ce": 0.25}

    assert "delta_ce" in train(config)["left_out"]
    for _ in range(2):
        summary = train(config, after_train=after)
        assert (summary["delta_ce"], summary["left_out"]) == (0.25, [])
    assert calls == [(config, HOOK, HOOK, 9 * 512)]
    assert open_store(config.train.out).size(LOSSES_KEY) is None


def test_another_spec_or_dataset_in_the_same_out_is_refused(config_of, tmp_path, monkeypatch):
    config = config_of(checkpoint_seconds=0)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stopped):
            train(config)
    with pytest.raises(ConfigError, match=r"k: 3 -> 5.*lr: 0\.003 -> 0\.01"):
        train(config_of(k=5, lr=0.01))
    root = tmp_path / "other"
    write_dataset(open_store(str(root)), make_plan(9, hooks={HOOK: D_MODEL}, seed=5), planted_rows)
    with pytest.raises(ConfigError, match="plan_fingerprint"):
        train(config.model_copy(update={"root": str(root)}))
    train(config_of(log_every_steps=1, checkpoint_seconds=100, checkpoints_kept=3))  # these may change
    with pytest.raises(ConfigError, match="k: 3 -> 5"):
        train(config_of(k=5))


def test_sigterm_makes_a_checkpoint_and_says_how_to_go_on(whole, config_of, tmp_path, monkeypatch, told):
    assert threading.current_thread() is threading.main_thread()
    original, handler = member.train_step, signal.getsignal(signal.SIGTERM)

    def step(run, rows, weights, *target):
        if run.counts.step == 9:
            signal.raise_signal(signal.SIGTERM)
        return original(run, rows, weights, *target)

    with monkeypatch.context() as patch:
        patch.setattr(member, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(config_of())
    assert "stopped after step 10 of 48; a checkpoint is kept" in told
    assert signal.getsignal(signal.SIGTERM) is handler
    found = tmp_path / "run" / "checkpoints" / "000000000010" / "index.json"
    index = CheckpointIndex.from_json(found.read_bytes(), origin="test")
    assert (index.step, index.stream.step, index.threads) == (10, 10, 1)
    train(config_of())
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == whole


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(config_of, tmp_path, monkeypatch):
    original = member.train_step

    def step(run, rows, weights, *target):
        return original(run, rows * (1e30 if run.counts.step == 12 else 1), weights, *target)

    monkeypatch.setattr(member, "train_step", step)
    with pytest.raises(NonFiniteError, match=r"step 12 .*units \[.*checkpoint of step 12 is kept"):
        train(config_of(normalize="none", checkpoint_seconds=0))
    assert (tmp_path / "run" / "checkpoints" / "000000000012" / "index.json").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hook": "resid_post.7"}, "resid_post.1, mlp_out.0"),
        ({"batch_rows": 8192}, "batch_rows=8192"),
        ({"epochs": 0.01}, "epochs"),
        ({"auxk_k": 65}, "auxk_k"),
        ({"device": "cuda:9"}, "device"),
        ({"device": "tpu"}, "device"),
        ({"group_units": 1, "batch_rows": 448}, "design effect"),
        ({"k": 65}, "K <= N"),
        ({"batch_rows": 100}, "lanes"),
        ({"kernels": "triton"}, "kernels: triton"),
        ({"mesh": {"latent": 2}}, "2 processes"),
    ],
)
def test_bad_input_is_one_sentence_exit_2_and_nothing_written(folder, tmp_path, fields, words):
    path = planted_config(folder, **{"out": str(tmp_path / "run")} | fields)
    result = CliRunner().invoke(make_app(), [str(path)])
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(folder, tmp_path, monkeypatch):
    path = planted_config(folder, out=str(tmp_path / "run"))
    assert CliRunner().invoke(make_app(), [str(path)]).exit_code == 0
    sizes = [file.stat().st_size for file in (tmp_path / "run").glob("checkpoints/*/*.safetensors")]
    # what is asked for is no more than what a checkpoint takes, and most of it
    free = {"enough": max(sizes), "short": int(0.9 * max(sizes))}
    for name, size in free.items():
        monkeypatch.setattr(LocalStore, "free_bytes", lambda _, size=size: size)
        path = planted_config(folder, out=str(tmp_path / name))
        result = CliRunner().invoke(make_app(), [str(path)])
        assert result.exit_code == (0 if name == "enough" else 2), result.output
    assert "too small for one checkpoint: expected" in " ".join(result.stderr.split())
    assert not list((tmp_path / "short").glob("checkpoints/*"))


def test_a_dataset_that_is_not_finished_is_refused(folder, tmp_path):
    root = tmp_path / "data"
    write_dataset(open_store(str(root)), make_plan(9, hooks={HOOK: D_MODEL}), planted_rows, units=[0, 1])
    arguments = ["--set", f"root={root}", "--set", f"train.out={tmp_path / 'run'}"]
    result = CliRunner().invoke(make_app(), [str(planted_config(folder)), *arguments])
    assert result.exit_code == 2, result.output
    assert "harvest" in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_command_prints_one_json_object_or_a_table(folder, tmp_path):
    path = str(planted_config(folder, out=str(tmp_path / "run")))
    result = CliRunner().invoke(make_app(), [path, "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert {"fvu", "fvu_raw", "l0", "dead_share", "tokens", "train_tokens_per_s"} <= set(summary)
    result = CliRunner().invoke(make_app(), [path])
    assert result.exit_code == 0, result.output
    assert "FVU, held out" in result.stdout
    assert "left out: delta_ce" in result.stderr
    helped = CliRunner().invoke(make_app(), ["--help"])
    assert "Example" in helped.stdout


def test_a_run_says_where_and_what_it_begins_with(config_of, tmp_path, monkeypatch, told):
    monkeypatch.chdir(tmp_path)
    config = config_of(out="run")
    train(config)
    assert told[0] == f"reading {config.root}; writing to {tmp_path / 'run'}"
    assert any(line.startswith("reading the first units and initialising from") for line in told)
    assert f"{tmp_path / 'run'}: measuring on the held-out rows" in told
    assert told[-1].startswith("held out: 512/512 (100%) rows")


def test_threads_are_put_back(config_of):
    before = torch.get_num_threads()
    train(config_of(epochs=0.1))
    assert torch.get_num_threads() == before
