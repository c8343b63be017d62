"""`subject.tensor_parallel`: two processes with a share of the subject each, on gloo, against one alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.support.pipeline import pipeline_config
from tests.support.tiny import make_subject
from winnow.common.config_file import load_config
from winnow.harvester.run.driver import ensure_plan
from winnow.harvester.run.worker import UnitWorker
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError, WorkerError
from winnow.schemas.harvest import HarvestPlan
from winnow.store.check.verify import verify
from winnow.store.objects import open_store
from winnow.store.write.writer import seal
from winnow.subject.divided import DividedSubject

BOTH = "subject.tensor_parallel=2"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_config(tmp_path_factory.mktemp("base"), units=1, plan={"dtype": "float32"})


def worker_of(base: Path, root: Path, *settings: str) -> tuple[Config, HarvestPlan, UnitWorker]:
    config = load_config(base, [f"root={root}", *settings])
    plan = ensure_plan(config, open_store(config.root))
    assert config.subject is not None
    batch = config.harvest.batch_windows
    return config, plan, UnitWorker(plan.to_json(), config.root, config.storage, config.subject, 1, batch)


@pytest.fixture(scope="module")
def two(base: Path) -> Iterator[tuple[Config, HarvestPlan, UnitWorker, DividedSubject]]:
    config, plan, worker = worker_of(base, base.parent / "two", BOTH)
    worker.ready()
    divided = worker._divided
    assert divided is not None
    yield config, plan, worker, divided
    divided.close()
    assert not dist.is_initialized()
    assert all(one.poll() is not None for one in divided._followers), "no process is left behind"


def test_two_processes_harvest_the_rows_of_one_and_only_the_first_writes(
    two: tuple[Config, HarvestPlan, UnitWorker, DividedSubject], base: Path, tmp_path: Path
) -> None:
    config, plan, worker, divided = two
    _, whole_plan, whole = worker_of(base, tmp_path / "one")
    assert plan.fingerprint == whole_plan.fingerprint, "a division changes float noise only"
    mine, right = worker.make(0)[0], whole.make(0)[0]
    for hook in plan.spec.hooks:
        assert not np.array_equal(mine[hook], right[hook]), "another order of sums"
        np.testing.assert_allclose(mine[hook], right[hook], rtol=1e-4, atol=1e-5)
    # The shares are shares: what this process holds is less than the subject.
    held = sum(_local(part).numel() for part in divided.subject.model.parameters())
    assert held < sum(part.numel() for part in whole._subject.model.parameters())
    store = open_store(config.root)
    for unit in range(plan.units):
        worker.run(unit)
    seal(store, plan)
    assert not list(verify(store))


def _local(part: torch.Tensor) -> torch.Tensor:
    return part.to_local() if hasattr(part, "to_local") else part


def test_a_process_that_dies_ends_the_harvest_with_a_sentence(
    two: tuple[Config, HarvestPlan, UnitWorker, DividedSubject],
) -> None:
    _, _, worker, divided = two
    follower = divided._followers[0]
    follower.kill()
    follower.wait()
    with pytest.raises(WorkerError, match=r"a pass of the divided subject failed.*exit codes .*\[-9\]"):
        worker.run(0)
    with pytest.raises(WorkerError, match="the processes of the divided subject have ended"):
        worker.run(1)


@pytest.mark.parametrize(
    ("architecture", "settings", "words"),
    [
        ("gpt2", [BOTH], "transformers has no tp_plan for 'gpt2'.*subject.device_map"),
        ("llama", ["subject.tensor_parallel=4"], "cannot be divided by 4.*got 4 heads, 2 of keys and values"),
        ("llama", [BOTH, "plan.hooks=[attn_z.0]"], "'attn_z.0': .* only a part of it"),
        ("llama", [BOTH, "plan.hooks=[model.layers.0.mlp]"], "only a part of it"),
        ("llama", [BOTH, "plan.attend=document"], "document has not been tried"),
        ("llama", [BOTH, "subject.engine=interp-engine"], "one of them"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path, architecture: str, settings: list[str], words: str
) -> None:
    folder = base.parent / "subject"
    if architecture != "llama":
        folder = tmp_path / "subject"
        folder.mkdir()
        make_subject(folder, architecture, layers=2, width=16)
    config = load_config(base, [f"root={tmp_path / 'data'}", f"subject.model={folder}", *settings])
    with pytest.raises(ConfigError, match=words):
        ensure_plan(config, open_store(config.root))
    assert not list(open_store(config.root).list())


def test_the_batch_of_a_divided_subject_is_not_found_by_running_out_of_memory(
    base: Path, tmp_path: Path
) -> None:
    _, _, worker = worker_of(base, tmp_path / "data", BOTH, "harvest.batch_windows=auto")
    with pytest.raises(ConfigError, match=r"batch_windows: auto.*Set harvest\.batch_windows"):
        worker.ready()
