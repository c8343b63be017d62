"""A Ray cluster of two nodes on this machine, a harvest to S3, a trainer that follows, a node killed.

A trainer, a process of its own, is there before the first unit. The first node works alone until the
second joins, and is killed with units in its hands once both work; `harvest.follow` lets the harvest
run no more than a few units ahead of the trainer. The dataset's digest must be that of a harvest which
nothing disturbed, and the trainer's weights, bit for bit, those of one that comes when all is done: it
saw the same batches. Anyone can run it:

    make test ARGS=tests/integration/test_cluster_follow.py

It takes MinIO where `make minio` has built it, else moto.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.support.gated_worker import FREE_UNITS, GATE, GatedWorker
from tests.support.pipeline import make_alone, pipeline_config
from winnow.common.config_file import load_config
from winnow.harvester.run import driver
from winnow.harvester.run.driver import ensure_plan, harvest
from winnow.harvester.run.ledger import read_ledger
from winnow.schemas.config import Config
from winnow.store.check.verify import verify
from winnow.store.objects import open_store
from winnow.store.read.follow import read_followers
from winnow.store.read.reader import receipts_present
from winnow.trainer.run.loop import train

UNITS = 12
HIGH_WATER_BYTES = 400_000
"""About six units of 67 KB: less than half of the dataset."""
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
PATIENCE_SECONDS = 180.0


@contextmanager
def small_cluster() -> Iterator[Cluster]:
    """A head without CPUs and one node with one; the test lets another join."""
    head = {**NODE, "num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    try:
        cluster.add_node(**NODE)
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def looking_on(config: Path) -> Iterator[subprocess.Popen[str]]:
    """A trainer beside the harvest, from before its first unit; it waits for the plan by itself."""
    trainer = subprocess.Popen(
        [sys.executable, "-m", "winnow.trainer", str(config), "--json", "--set", "train.follow=true"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield trainer
    finally:
        if trainer.poll() is None:
            trainer.send_signal(signal.SIGKILL)
        trainer.communicate()


class Trouble(threading.Thread):
    """Lets a second node join and kills the first, each at its moment; then opens the gate."""

    def __init__(self, cluster: Cluster, config: Config, gate: Path) -> None:
        super().__init__(daemon=True)
        self._cluster, self._config, self._gate = cluster, config, gate
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.failure = error
        finally:
            (self._gate / "open").touch()

    def _run(self) -> None:
        [first] = self._cluster.worker_nodes
        store = open_store(self._config.root)
        plan = ensure_plan(self._config, store)
        self._await(lambda: read_followers(store, plan), "trainer that follows")
        self._await(lambda: len(self._begun()) > FREE_UNITS, "units on the first node")
        assert {node for node, _ in self._begun()} == {first.node_id}
        self._cluster.add_node(**NODE)
        self._await(lambda: len({node for node, _ in self._begun()}) == 2, "units on the node that joined")
        held = {unit for node, unit in self._begun() if node == first.node_id}
        assert held - set(receipts_present(store, plan)), "it holds units that are not committed"
        self._cluster.remove_node(first, allow_graceful=False)

    def _begun(self) -> list[tuple[str, int]]:
        names = [path.name.split("-") for path in self._gate.iterdir() if "-" in path.name]
        return [(node, int(unit)) for node, unit in names]

    def _await(self, moment: Callable[[], object], what: str) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not moment():
            assert time.monotonic() < end, f"there were no {what}"
            time.sleep(0.02)


def test_a_node_joins_another_is_killed_and_nobody_can_tell(
    tmp_path: Path, s3_uri: str, monkeypatch: pytest.MonkeyPatch
):
    path = pipeline_config(
        tmp_path,
        root=s3_uri,
        units=UNITS - 1,
        harvest={
            "actors": 2,
            "threads_per_actor": 1,
            "follow": {"high_water_bytes": HIGH_WATER_BYTES, "silence_seconds": PATIENCE_SECONDS},
        },
        train={"batch_rows": 64, "group_units": 2, "epochs": 1},
    )
    config = load_config(path)
    _, expected = make_alone(config.model_copy(update={"root": str(tmp_path / "alone")}))
    gate = tmp_path / "gate"
    gate.mkdir()
    monkeypatch.setenv(GATE, str(gate))  # before the nodes start: they hand it on
    monkeypatch.setattr(driver, "UnitWorker", GatedWorker)
    with looking_on(path) as trainer:
        store = open_store(config.root)
        plan = ensure_plan(config, store)
        with small_cluster() as cluster:
            trouble = Trouble(cluster, config, gate)
            trouble.start()
            manifest = harvest(config, store, plan)
            trouble.join(PATIENCE_SECONDS)
        assert trouble.failure is None, trouble.failure
        out, err = trainer.communicate(timeout=PATIENCE_SECONDS)
    assert trainer.returncode == 0, err
    assert manifest.dataset_sha256 == expected
    [run] = read_ledger(store).runs
    assert (run.units, run.failures, run.ended) == (UNITS, 0, True), "a lost node is no fault of its units"
    assert not verify(store, level="full")

    [follower] = read_followers(store, plan)
    assert follower.finished
    later = train(load_config(path, [f"train.out={tmp_path / 'later'}"]))
    assert later["sae_sha256"] == json.loads(out)["sae_sha256"]
    weights = [(tmp_path / run / "sae.safetensors").read_bytes() for run in ("run", "later")]
    assert weights[0] == weights[1]
