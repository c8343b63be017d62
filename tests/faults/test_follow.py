"""A trainer and a harvest that follow each other: each may die, and the weights come out the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from store.console import load_config
from tests.faults.test_harvest_kill import kill_tree
from tests.pipeline import pipeline_config
from trainer.loop import train

UNITS = 8
SILENCE = 12  # a sign of life comes every ten seconds


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def await_that(done, *alive: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while not done():
        for process in alive:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "the awaited moment never came"
        time.sleep(0.02)


def test_each_dies_and_the_weights_are_the_same(tmp_path: Path) -> None:
    limits = {"high_water_bytes": 1, "silence_seconds": SILENCE}  # raised to two groups
    config = str(
        pipeline_config(
            tmp_path,
            units=UNITS,
            harvest={"follow": limits},
            train={"batch_rows": 64, "group_units": 2, "epochs": 1, "checkpoint_seconds": 3600},
        )
    )
    root = tmp_path / "data"
    following = ("--set", "train.follow=true", "--set", "train.follow_seconds=120")

    # The trainer is there first; it is killed, and the harvest is parked with a message.
    trainer = start("trainer", config, *following)
    harvest = start("winnow", "harvest", config)
    await_that(lambda: list((tmp_path / "run").glob("checkpoints/*/index.json")), trainer, harvest)
    trainer.send_signal(signal.SIGKILL)
    trainer.communicate()
    code, _, err = finish(harvest)
    assert code == 1
    assert "parked" in err
    committed = len(list(root.glob("receipts/*")))
    assert committed < UNITS + 1
    assert not (root / "manifest.json").exists()

    # Alone, the trainer goes on as far as it gets, and says what it waits for.
    code, _, err = finish(start("trainer", config, *following[:3], "train.follow_seconds=2"))
    assert code == 1
    assert "the harvest has committed nothing" in err.replace("\n", " ")

    # A harvest killed in the middle, and once more: the trainer does not notice.
    trainer = start("trainer", config, *following)
    harvest = start("winnow", "harvest", config)
    await_that(lambda: len(list(root.glob("receipts/*"))) > committed, trainer, harvest)
    kill_tree(harvest)
    harvest.communicate()
    again = start("winnow", "harvest", config)
    code, out, err = finish(trainer)
    assert code == 0, err
    early = json.loads(out)
    code, _, err = finish(again)
    assert code == 0, err

    later = train(load_config(Path(config), [f"train.out={tmp_path / 'later'}"]))
    assert later["sae_sha256"] == early["sae_sha256"]
