"""Rows that leave a device by the copying stream are the rows the subject gives there, every bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.pipeline import pipeline_config
from winnow.common.config_file import load_config
from winnow.harvester.run.driver import ensure_plan
from winnow.harvester.run.worker import UnitWorker
from winnow.store.format.layout import row_permutation
from winnow.store.objects import open_store
from winnow.store.read.reader import read_tokens
from winnow.subject import Subject


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [8, 24])  # 24: the last pass is smaller
def test_rows_leave_the_device_whole(device: torch.device, tmp_path: Path, batch: int) -> None:
    config = load_config(pipeline_config(tmp_path, units=2), [f"subject.device={device.type}"])
    store = open_store(config.root)
    plan = ensure_plan(config, store)
    assert config.subject is not None
    worker = UnitWorker(plan.to_json(), config.root, config.storage, config.subject, 1, batch)
    rows, attempt, _ = worker.make(1)
    assert torch.device(attempt.device).type == device.type
    subject = Subject.load(config.subject.model_copy(update={"dtype": plan.subject.dtype}))
    assert plan.subject.dtype == ("bfloat16" if device.type == "cuda" else "float32")
    tokens = read_tokens(store, plan, 1)
    order = row_permutation(plan, 1)
    for hook in plan.spec.hooks:
        passes = [
            subject.activations(tokens[first : first + batch], [hook])[hook][:, 1:].to(torch.bfloat16).cpu()
            for first in range(0, len(tokens), batch)
        ]
        planned = torch.cat(passes).flatten(0, 1).contiguous().view(torch.uint16).numpy()
        assert np.array_equal(rows[hook], planned[order])
