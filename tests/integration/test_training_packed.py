"""A run whose rows reach the step as they are stored, as on a GPU, is the same run to the bit."""

from __future__ import annotations

import pytest
import torch

from tests.support.planted import planted_config
from winnow.common.config_file import load_config
from winnow.sae.model import Sae
from winnow.trainer.run import loop
from winnow.trainer.run.loop import train
from winnow.trainer.run.transfer import Transfer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_packed_rows_train_the_same_sae(tmp_path, monkeypatch, accumulate):
    made, seen = [], []
    real = Transfer.__next__

    def next_batch(self):
        batch = real(self)
        seen.append({rows.dtype for rows in batch.rows.values()})
        return batch

    monkeypatch.setattr(Transfer, "__next__", next_batch)
    for packed in (True, False):
        folder = tmp_path / str(packed)
        folder.mkdir()
        monkeypatch.setattr(loop, "travels_packed", lambda _, packed=packed: packed)
        seen.clear()
        train(load_config(planted_config(folder, accumulate=accumulate, epochs=0.25)))
        assert seen == [{torch.bfloat16 if packed else torch.float32}] * len(seen) != []
        made.append(Sae.load(str(folder / "run")).tensors())
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
