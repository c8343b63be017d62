"""kill -9 of training, run again: bit-identical published weights."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.planted import planted_config
from tests.support.roots import roots_config
from tests.support.set_data import LAYERS, set_config
from tests.support.struck import begun, killed
from winnow.common.config_file import load_config
from winnow.trainer.run.loop import train

EPOCHS = 8


def words(config, out) -> list[str]:
    return ["winnow.trainer", str(config), "--json", "--set", f"train.out={out}"]


def finish(config, out) -> dict:
    command = [sys.executable, "-m", *words(config, out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The config, and the weights of a run in this process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    config = planted_config(folder, epochs=EPOCHS, checkpoint_seconds=0)
    train(load_config(config))
    return config, (folder / "run" / "sae.safetensors").read_bytes()


# Of the object whose bytes were written just before, and which is not there.
MOMENTS = {
    "while a checkpoint is written": r"checkpoints/0+4/state\.safetensors",
    "in the middle": rf"checkpoints/0+{8 * EPOCHS}/index\.json",
    "before it is published": r"run/sae\.safetensors",
}


def test_killed_at_one_moment_after_another_it_gives_the_same_bits(whole, tmp_path):
    config, weights = whole
    out = tmp_path / "run"
    for moment in MOMENTS.values():
        killed(moment, words(config, out))
        assert not (out / "summary.json").exists()

    summary = finish(config, out)
    assert (out / "sae.safetensors").read_bytes() == weights
    assert summary["steps"] == 16 * EPOCHS
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(10, 16 * EPOCHS, 10), 16 * EPOCHS]


def test_stopped_by_a_scheduler_it_saves_the_step_and_ends_with_130(whole, tmp_path):
    config, weights = whole
    out = tmp_path / "run"
    # The later ones must not end the process while it writes the checkpoint.
    signals = "SIGUSR1,SIGTERM,SIGTERM"
    process = begun(
        r"checkpoints/0+5/index\.json",
        signals,
        words(config, out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    told = " ".join(process.communicate(timeout=120)[1].split())
    assert process.returncode == 130
    step = max(int(path.parent.name) for path in out.glob("checkpoints/*/index.json"))
    assert f"stopped after step {step} of {16 * EPOCHS}; a checkpoint is kept" in told
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    assert finish(config, out)["steps"] == 16 * EPOCHS
    assert (out / "sae.safetensors").read_bytes() == weights


def test_a_killed_crosscoder_of_two_subjects_gives_the_same_bits(tmp_path):
    config = roots_config(tmp_path, out=str(tmp_path / "whole"), checkpoint_seconds=0)
    train(load_config(config))
    out = tmp_path / "run"
    killed(r"checkpoints/0+21/index\.json", words(config, out))
    assert not (out / "sae.json").exists()
    assert finish(config, out)["steps"] == 48
    weights = "sae.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_a_killed_set_gives_the_same_bits_for_every_layer(tmp_path):
    config = set_config(tmp_path, out=str(tmp_path / "whole"), cross=True, checkpoint_seconds=0)
    train(load_config(config))
    out = tmp_path / "run"
    killed(r"checkpoints/0+21/index\.json", words(config, out))
    assert not (out / "set.json").exists()
    assert finish(config, out)["steps"] == 48
    for layer in range(LAYERS):
        file = f"layer_{layer}/sae.safetensors"
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
