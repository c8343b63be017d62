"""Rows that travel to a GPU while it computes arrive whole, and are not overwritten while they are used."""

from __future__ import annotations

import pytest
import torch

from winnow.schemas.training import TrainSpec
from winnow.store.read.torch_stream import Batch
from winnow.trainer.run.transfer import Transfer

STEPS, ROWS, WIDTH = 12, 4096, 512


def test_rows_arrive_while_the_gpu_computes(device):
    if device.type != "cuda":
        pytest.skip("a CPU copies nothing")
    spec = TrainSpec(out="x", hook="h.1", latents=32, k=4, batch_rows=ROWS, epochs=1)

    def batches():
        for step in range(STEPS):
            yield Batch(
                {"h.1": torch.full((ROWS, WIDTH), float(step))}, torch.full((ROWS,), step + 0.5), step
            )

    busy = torch.randn(4096, 4096, device=device)
    sums = []
    with Transfer(batches(), STEPS, spec, device) as ready:
        for rows, weights, _ in ready:
            assert rows.is_cuda
            assert weights.is_cuda
            for _ in range(20):  # the GPU is behind the host by now
                busy = torch.tanh(busy @ busy)
            sums.append(torch.stack([rows.min(), rows.max(), weights.min(), weights.max()]))
            del rows, weights  # their memory may be given away as soon as it is read
    for step, found in enumerate(torch.stack(sums).tolist()):
        assert found == [step, step, step + 0.5, step + 0.5]
