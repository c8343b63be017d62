"""TensorBoard and Weights & Biases: the real libraries, across an interruption; neither can stop a run."""

from __future__ import annotations

import json
import time

import pytest
from typer.testing import CliRunner

import winnow.trainer.run.loggers as loggers
import winnow.trainer.run.member as member
from tests.support.planted import planted_config
from winnow.cli.train import make_app
from winnow.common.config_file import load_config
from winnow.trainer.run.loop import train


class Stopped(Exception):
    pass


@pytest.fixture
def config(tmp_path):
    """A run that asks for both, of 20 steps or more, with a checkpoint after each."""
    fields = {"tensorboard": str(tmp_path / "board"), "wandb": "winnow-test", "log_every_steps": 1}
    return load_config(planted_config(tmp_path, checkpoint_seconds=0, epochs=1, **fields))


def interrupt(monkeypatch, config, steps: int) -> None:
    """Train and break off after `steps`."""
    taken, real = [0], member.train_step

    def step(*args):
        if taken[0] == steps:
            raise Stopped
        taken[0] += 1
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(member, "train_step", step)
        with pytest.raises(Stopped):
            train(config)


def test_both_show_each_step_once_across_an_interruption(config, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    interrupt(monkeypatch, config, 7)
    train(config)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))

    board = EventAccumulator(str(tmp_path / "board/run"))
    board.Reload()
    for key in ("fvu", "lr", "tokens_per_s", "dead_share"):
        shown = [(event.step, event.value) for event in board.Scalars(f"train/{key}")]
        assert shown == [(record["step"], pytest.approx(record[key], rel=1e-6)) for record in records]

    known = json.loads((tmp_path / "run/wandb.json").read_text())["id"]
    parts = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{known}.wandb"))
    assert len(parts) == 2  # before and after; `wandb sync` joins them under the one id
    # its own process writes the file, on a busy machine after `finish` has returned
    end = time.monotonic() + 30
    while not all(b"dead_share" in part.read_bytes() for part in parts):
        assert time.monotonic() < end, "a part has no line of the run"
        time.sleep(0.1)


def test_a_logger_that_breaks_is_left_out_and_the_run_goes_on(config, monkeypatch, caplog):
    class Broken:
        def __init__(self, *_):
            self.lines = 0

        def log(self, record):
            self.lines += 1
            if self.lines == 3:
                raise ConnectionError("no route")

        def close(self):
            raise AssertionError("it was left out")

    def refuse(*_):
        raise OSError("no space")

    monkeypatch.setattr(loggers, "WandB", Broken)
    monkeypatch.setattr(loggers, "TensorBoard", refuse)
    summary = train(config)
    assert summary["fvu"] < 1
    assert caplog.messages == [
        "tensorboard is left out from here on: no space",
        "wandb is left out from here on: no route",
    ]


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_package_that_is_not_there_is_named_before_the_work(config, tmp_path, monkeypatch, package):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(loggers, "import_module", absent)
    other = "wandb" if package == "tensorboard" else "tensorboard"
    args = [str(tmp_path / "config.yaml"), "--set", f"train.{other}=null"]
    result = CliRunner().invoke(make_app(), args)
    assert result.exit_code == 2, result.output
    assert f"pip install 'winnow-sae[{package}]'" in result.output
    assert not list(tmp_path.glob("run/checkpoints/*/index.json"))
