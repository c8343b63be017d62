"""A ring's trainer and harvest: each is killed, the disk never holds more, the weights come out the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.faults.test_harvest_kill import kill_tree
from tests.support.gated_worker import FREE, GATE
from tests.support.pipeline import make_alone, pipeline_config
from winnow.common.config_file import load_config
from winnow.store.check.verify import verify
from winnow.store.objects import open_store
from winnow.store.read.follow import deleted_units
from winnow.trainer.run.loop import train

UNITS = 8
# A sign of life comes every ten seconds, later on a busy machine; parking takes so long, so it is not more.
SILENCE = 20


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments, "--json"],
        cwd=Path(__file__).parents[2],
        env=os.environ | environment,
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


class Gauge(threading.Thread):
    """The most bytes of training shards that were ever on the disk at once."""

    def __init__(self, root: Path) -> None:
        super().__init__(daemon=True)
        self._root, self._ended, self.most = root, threading.Event(), 0

    def run(self) -> None:
        while not self._ended.wait(0.01):
            found = 0
            for path in self._root.glob("activations/*/c/*/0"):
                try:
                    found += path.stat().st_size if path.parent.name != "0" else 0  # 0 is held out: it stays
                except FileNotFoundError:
                    continue
            self.most = max(self.most, found)

    def stop(self) -> int:
        self._ended.set()
        self.join()
        return self.most


def test_each_dies_and_the_weights_are_the_same(tmp_path: Path) -> None:
    limits = {"high_water_bytes": 1, "silence_seconds": SILENCE, "ring": True}  # raised to two groups
    path = pipeline_config(
        tmp_path,
        units=UNITS,
        harvest={"follow": limits},
        train={"batch_rows": 64, "group_units": 2, "epochs": 1, "checkpoint_seconds": 3600},
    )
    config, root = str(path), tmp_path / "data"
    following = ("--set", "train.follow=true", "--set", "train.follow_seconds=600")
    gauge = Gauge(root)
    gauge.start()

    # The trainer is there first; it is killed, and the harvest is parked with a message.
    trainer = start("winnow.trainer", config, *following)
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
    code, _, err = finish(start("winnow.trainer", config, *following[:3], "train.follow_seconds=2"))
    assert code == 1
    assert "the harvest has committed nothing" in err.replace("\n", " ")

    # A harvest killed in the middle, and once more: the trainer does not notice.
    trainer = start("winnow.trainer", config, *following)
    patient = ("harvest", config, "--set", "harvest.follow.silence_seconds=600")
    (tmp_path / "gate").mkdir()  # closed: it makes one unit and is killed in the next
    gate = {GATE: str(tmp_path / "gate"), FREE: str(committed + 1)}
    harvest = start("tests.support.gated_worker", *patient, **gate)
    await_that(lambda: len(list(root.glob("receipts/*"))) > committed, trainer, harvest)
    kill_tree(harvest)
    harvest.communicate()
    again = start("winnow", *patient)
    code, out, err = finish(trainer)
    assert code == 0, err
    early = json.loads(out)
    code, out, err = finish(again)
    assert code == 0, err

    most = gauge.stop()
    plan, digest = make_alone(load_config(path, [f"root={tmp_path / 'alone'}"]))
    unit_bytes = sum(plan.shard_bytes(hook) for hook in plan.spec.hooks)
    assert unit_bytes < most <= 4 * unit_bytes, "the disk held more than two groups of two units"
    assert len(deleted_units(open_store(str(root)), plan)) >= UNITS - 4
    assert not verify(open_store(str(root)), level="full")
    assert json.loads(out)["dataset_sha256"] == digest
    later = train(load_config(path, [f"root={tmp_path / 'alone'}", f"train.out={tmp_path / 'later'}"]))
    assert later["sae_sha256"] == early["sae_sha256"]
