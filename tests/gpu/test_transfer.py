"""Rows that travel to a GPU while it computes arrive whole, and are not overwritten while they are used."""

from __future__ import annotations

import pytest
import torch

from winnow.store.read.torch_stream import Batch
from winnow.trainer.run.transfer import Transfer

STEPS, ROWS, WIDTH = 12, 4096, 512


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int8])
def test_rows_arrive_while_the_gpu_computes(device, kind):
    if device.type != "cuda":
        pytest.skip("a CPU copies nothing")

    def batches():
        for step in range(STEPS):
            yield Batch(
                {"h.1": torch.full((ROWS, WIDTH), step, dtype=kind)}, torch.full((ROWS,), step + 0.5), step
            )

    busy = torch.randn(4096, 4096, device=device)
    sums = []
    with Transfer(batches(), STEPS, device) as ready:
        for found, weights, _ in ready:
            rows = found.pop("h.1")
            assert rows.is_cuda
            assert rows.dtype == kind
            rows = rows.float()
            assert weights.unique().tolist() == [len(sums) + 0.5]
            for _ in range(20):  # the GPU is behind the host by now
                busy = torch.tanh(busy @ busy)
            sums.append(torch.stack([rows.min(), rows.max()]))
            del rows  # their memory may be given away as soon as it is read
    for step, seen in enumerate(torch.stack(sums).tolist()):
        assert seen == [step, step]
