"""The scripts of configs/slurm before a stand-in for SLURM: harvest and training survive preemption."""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import subprocess
import time
from contextlib import suppress

import pytest

from tests.support.pipeline import make_alone, pipeline_config
from tests.support.slurm import SCRIPTS, Cluster
from winnow.common.config_file import load_config
from winnow.store.objects import open_store
from winnow.store.read.reader import load_plan, receipts_present

UNITS, EPOCHS = 24, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def config(folder):
    """Of a dataset that is complete, and its digest."""
    # One window per pass, so that a harvest takes long enough to be stopped in the middle.
    train = {"epochs": EPOCHS, "checkpoint_seconds": 0, "log_every_steps": 1}
    path = pipeline_config(folder, units=UNITS - 1, harvest={"batch_windows": 1}, train=train)
    return path, make_alone(load_config(path))[1]


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path / "slurm")


def job_id() -> int:
    """A job's number for which the scripts choose a port that is free."""
    for number in (random.randrange(10_000) for _ in itertools.count()):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", 20_000 + number))
            return number
    raise AssertionError


def finish(cluster: Cluster, process: subprocess.Popen[bytes], code: int = 0) -> str:
    """Wait for a job, which ends with `code`; returns what all jobs have logged, as one line."""
    try:
        found = process.wait(timeout=200)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    log = " ".join(cluster.log.read_text().split())
    assert found == code, log[-3000:]
    return log


def await_that(reached, process: subprocess.Popen[bytes], cluster: Cluster) -> None:
    end = time.monotonic() + 200
    while not reached():
        assert process.poll() is None, cluster.log.read_text()[-3000:]
        assert time.monotonic() < end, "the awaited moment never came"
        time.sleep(0.004)


def steps_saved(out) -> list[int]:
    return [int(path.parent.name) for path in out.glob("checkpoints/*/index.json")]


def test_ranks_that_are_told_to_stop_are_requeued_and_end_with_the_weights_of_others_that_are_not(
    config, cluster, tmp_path
):
    whole = tmp_path / "whole"
    words = (str(whole), str(config[0]), "--json")
    finish(cluster, cluster.start("train-torchrun.sbatch", *words, job=job_id(), nodes=2, tasks=2))
    assert not cluster.requeued

    out, number = tmp_path / "run", job_id()
    words = (str(config[0]), "--set", f"train.out={out}", "--json")
    process = cluster.start("train.sbatch", *words, job=number, nodes=2, tasks=2)
    await_that(lambda: steps_saved(out), process, cluster)
    # As SLURM does it: SIGUSR1 before the time limit, then SIGTERM, to every task, whatever it is doing.
    for sent in (signal.SIGUSR1, signal.SIGTERM):
        for task in cluster.tasks:
            with suppress(ProcessLookupError):
                os.kill(task, sent)
    assert "a checkpoint is kept" in finish(cluster, process, 130)
    assert cluster.requeued == [str(number)]
    assert not (out / "summary.json").exists()

    log = finish(cluster, cluster.start("train.sbatch", *words, job=number, nodes=2, tasks=2))
    assert "resuming from the checkpoint at step" in log
    assert (out / "sae.safetensors").read_bytes() == (whole / "sae.safetensors").read_bytes()
    assert cluster.requeued == [str(number)]


def test_torchrun_on_every_node_is_stopped_through_the_folder(config, cluster, tmp_path):
    out, number = tmp_path / "run", job_id()
    # Far more than are taken before the stop is noticed, which takes up to 5 s.
    words = (str(out), str(config[0]), "--set", "train.epochs=1000")
    process = cluster.start("train-torchrun.sbatch", *words, job=number, nodes=2, tasks=2)
    await_that(lambda: steps_saved(out), process, cluster)
    process.send_signal(signal.SIGUSR1)
    assert "a checkpoint is kept" in finish(cluster, process, 1)
    assert cluster.requeued == [str(number)]
    assert not (out / "summary.json").exists()


def test_an_array_makes_the_dataset_and_a_preempted_job_of_it_is_requeued(config, cluster, tmp_path):
    path, digest = config
    root = tmp_path / "data"
    words = (str(path), "--set", f"root={root}", "--json")
    array = {"SLURM_ARRAY_TASK_COUNT": "2"}
    log = finish(cluster, cluster.start("harvest.sbatch", *words, job=1, SLURM_ARRAY_TASK_ID="0", **array), 2)
    assert "has no complete plan" in log
    assert not root.exists()
    finish(cluster, cluster.start("plan.sbatch", *words, job=2))
    plan = load_plan(open_store(str(root)))

    process = cluster.start("harvest.sbatch", *words, job=3, SLURM_ARRAY_TASK_ID="0", **array)
    await_that(lambda: any(root.glob("receipts/*.json")), process, cluster)
    process.send_signal(signal.SIGUSR1)
    assert "harvest: stopping after" in finish(cluster, process, 130)
    assert cluster.requeued == ["3"]
    made = set(receipts_present(open_store(str(root)), plan))
    assert made < set(range(0, UNITS, 2))

    log = finish(cluster, cluster.start("harvest.sbatch", *words, job=3, SLURM_ARRAY_TASK_ID="0", **array))
    assert f'"units_to_do": {UNITS // 2}' in log
    assert set(receipts_present(open_store(str(root)), plan)) == set(range(0, UNITS, 2))
    log = finish(cluster, cluster.start("harvest.sbatch", *words, job=4, SLURM_ARRAY_TASK_ID="1", **array))
    assert f'"dataset_sha256": "{digest}"' in log
    assert cluster.requeued == ["3"]


def test_every_script_is_valid_bash_and_names_the_limits_of_its_job():
    scripts = sorted(SCRIPTS.glob("*.sbatch"))
    assert len(scripts) == 4
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
        asked = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
        for option in ("--nodes=", "--cpus-per-task=", "--mem=", "--time=", "--output="):
            assert sum(line.startswith(f"#SBATCH {option}") for line in asked) == 1, script.name
