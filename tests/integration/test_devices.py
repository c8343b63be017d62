"""GPUs that are asked for where none is: what Ray reserves, what is refused, and planning without weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from tests.support.pipeline import pipeline_config
from tests.support.reserved import Reserved
from tests.support.tiny import ARCHITECTURES, make_subject
from winnow.cluster import crew as cluster
from winnow.cluster.crew import Crew, CrewSettings, no_room
from winnow.common.config_file import load_config
from winnow.harvester.plan import planner
from winnow.harvester.run import driver
from winnow.harvester.run.driver import ensure_plan
from winnow.harvester.run.worker import UnitWorker
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError
from winnow.schemas.subject import SubjectSpec
from winnow.store.objects import open_store
from winnow.subject import Subject
from winnow.subject.pretrained import check_on_gpus

NODE: dict[str, Any] = {"object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_config(tmp_path_factory.mktemp("base"), units=2)


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[str, str]]:
    """A node that claims three GPUs, and one without any; their ids."""
    head = {**NODE, "num_cpus": 1, "num_gpus": 0, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    try:
        gpu_node = made.add_node(num_cpus=2, num_gpus=3, **NODE)
        ray.init(address=made.address, logging_level="ERROR", log_to_driver=False)
        yield gpu_node.node_id, made.head_node.node_id
    finally:
        ray.shutdown()
        made.shutdown()


def muster(config: Config, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The actors that a harvest of two units asks for, once all are there."""
    monkeypatch.setattr(driver, "UnitWorker", Reserved)
    store = open_store(config.root)
    run = driver._Run.__new__(driver._Run)
    run._config, run._store, run._plan, run._total = config, store, ensure_plan(config, store), 2
    crew = run._muster()
    crew.await_first()
    while crew.waiting:
        for ref in ray.wait(crew.waiting, timeout=60)[0]:
            crew.welcome(ref)
    return list(crew.members.values())


def test_gpus_and_shares_of_them_are_reserved(
    base: Path, nodes: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for gpus, actors, asked, seen in (("0.5", 2, 0.5, 1), ("2", 1, 2.0, 2), ("null", 1, 1.0, 1)):
        config = load_config(
            base,
            [
                f"root={tmp_path}", f"harvest.gpus_per_actor={gpus}", f"harvest.actors={actors}",
                "subject.device=auto",
            ],
        )  # fmt: skip
        members = muster(config, monkeypatch)
        assert len(members) == actors
        assert {ray.get(member.ready.remote()) for member in members} == {nodes[0]}
        for resources, visible in ray.get([member.resources.remote() for member in members]):
            assert resources["GPU"] == asked
            assert len(visible) == seen
        for member in members:
            ray.kill(member)


def test_no_gpu_is_taken_for_a_subject_on_the_cpu(base: Path, nodes: tuple[str, str]) -> None:
    assert cluster.gpus_per_actor(driver.crew_settings(load_config(base))) == 0
    share = load_config(base, ["harvest.gpus_per_actor=0.25"])
    assert cluster.gpus_per_actor(driver.crew_settings(share)) == 0.25


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no GPU")
def test_a_device_map_without_gpus_is_refused(base: Path, tmp_path: Path) -> None:
    config = load_config(base, [f"root={tmp_path}", "subject.device_map=auto", "subject.device=auto"])
    with pytest.raises(ConfigError, match=r"over several GPUs: .*got 0 GPUs.*Leave device_map out") as caught:
        ensure_plan(config, open_store(config.root))
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_the_gpus_is_refused() -> None:
    check_on_gpus({"model.embed_tokens": 0, "model.layers.0": "cuda:1"})
    with pytest.raises(ConfigError, match=r"2 parts left over, 'model.layers.7' the first"):
        check_on_gpus({"model.embed_tokens": 0, "model.layers.7": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_outline_is_the_subject_without_weights(architecture: str, tmp_path: Path) -> None:
    spec = SubjectSpec(model=str(make_subject(tmp_path, architecture)), attention="eager")
    outline, whole = Subject.outline(spec, gpu=False), Subject.load(spec)
    hooks = ["resid_post.1", "attn_out.0", "mlp_out.3", "resid_pre.2"]
    assert outline.sites(hooks) == whole.sites(hooks)
    assert outline.identity == whole.identity
    assert all(parameter.is_meta for parameter in outline.model.parameters())
    assert Subject.outline(spec, gpu=True).identity.dtype == "bfloat16"


def test_a_plan_for_gpus_is_made_without_one_and_its_dtype_holds(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = ["harvest.gpus_per_actor=1", "harvest.ray_address=gpu-cluster:6379", "subject.device=auto"]
    config = load_config(base, [f"root={tmp_path}", *sets])
    monkeypatch.setattr(Subject, "load", None)
    plan = ensure_plan(config, open_store(config.root))
    assert plan.subject.dtype == "bfloat16"
    monkeypatch.undo()
    assert config.subject is not None
    worker = UnitWorker(plan.to_json(), config.root, config.storage, config.subject, 1, 8)
    assert worker.ready() == "cpu"
    assert worker._subject.dtype == torch.bfloat16


def test_widths_at_module_paths_are_found_on_the_cpu(base: Path, tmp_path: Path) -> None:
    sets = ["harvest.ray_address=gpu-cluster:6379", "subject.device=cuda", "plan.hooks=[model.layers.0.mlp]"]
    found = planner._outline(load_config(base, [f"root={tmp_path}", *sets]))
    assert (found.device.type, found.dtype) == ("cpu", torch.bfloat16)
    assert found.sites(["model.layers.0.mlp"])[0].d_model == 16


@ray.remote
class Waiting:
    """An actor that is ready once the gate, a named pipe, is opened from the other side."""

    def ready(self, gate: str) -> None:
        Path(gate).read_bytes()


class Gated:
    """Its handle, as a crew knows it."""

    def __init__(self, gate: Path, cpus: float) -> None:
        self._actor, self._gate = Waiting.options(num_cpus=cpus).remote(), str(gate)
        self.ready = SimpleNamespace(remote=lambda: self._actor.ready.remote(self._gate))
        self.__ray_ready__ = self._actor.__ray_ready__


@pytest.mark.usefixtures("nodes")
def test_a_crew_says_why_no_actor_is_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    said = list[str]()
    monkeypatch.setattr(cluster, "WAIT_NOTE_SECONDS", 0.01)

    def say(message: str) -> None:
        opened = any("loading the subject" in earlier for earlier in said)
        said.append(message)
        if "loading the subject" in message and not opened:  # a second opening would have no reader
            (tmp_path / "gate").write_bytes(b"")

    monkeypatch.setattr(cluster, "say", say)
    settings = CrewSettings(driver.NAMED, address="auto")
    crew = Crew(lambda: Gated(tmp_path / "gate", 1), 1, {"CPU": 1}, settings)
    crew.await_first()
    assert said[-1] == "harvest: 1 actor of 1 loading the subject"


def test_a_shortage_is_told_from_a_start() -> None:
    starting = "it is starting, or waits for one node that has all of that"
    assert (
        no_room({"CPU": 1}, {"CPU": 1})
        == f"no actor has started yet; one needs 1 CPU, 1 CPU free; {starting}"
    )
    short = "no actor has started yet; one needs 2 CPU, 1 GPU, 4 CPU free"
    assert no_room({"CPU": 2, "GPU": 1}, {"CPU": 4}) == short
    assert no_room({"CPU": 1}, {}) == "no actor has started yet; one needs 1 CPU, no CPU free"
