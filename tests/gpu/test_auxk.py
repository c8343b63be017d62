"""AuxK's kernels on dense codes, against what a CPU does in several passes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from winnow.trainer.kernels.dispatch import triton_module
from winnow.trainer.kernels.step_ops import aligned
from winnow.trainer.step import auxk

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16]


def normal(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def codes(B: int, M: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of ties, without a positive number, and with NaN, in memory whose gaps are not clean."""
    z = normal(0, B, M)
    z[:1] = z[:1].round()
    if B > 3:
        z[1], z[2, ::3], z[3, M // 2] = -z[1].abs(), 1.0, math.nan
    there = aligned(B, M, torch.empty(0, dtype=dtype, device=device))
    there.as_strided((B, there.stride(0)), (there.stride(0), 1)).fill_(math.nan)
    return there.copy_(z)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7, 3), (40, 300, 5), (3, 1500, 256), (4, 50, 60), (6, 33, 33)])
def test_rows_are_cut_to_their_best(device, shape, dtype):
    B, M, k = shape
    found = codes(B, M, dtype, device)
    expected = found.clone()
    auxk.keep_best(expected, k, max(1, B))
    triton_module("auxk").keep_best(found, k)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(9), expected.nan_to_num(9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7, 3), (140, 300, 33)])
def test_gradients_are_masked_and_summed(device, shape, dtype):
    B, M, D = shape
    z = codes(B, M, dtype, device)
    triton_module("auxk").keep_best(z, 2)
    grad, W = (normal(seed, size, D).to(device, dtype) for seed, size in ((1, B), (2, M)))
    expected = torch.where(z <= 0, 0.0, grad.float() @ W.float().T)
    sums = triton_module("auxk").grads_of_codes(grad, W, z)
    # a GPU rounds what it stores; the interpreter cuts it off
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype] * expected.abs().max().item()
    torch.testing.assert_close(z.float(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(sums, z.sum(0, dtype=torch.float32), rtol=1e-5, atol=1e-5)
