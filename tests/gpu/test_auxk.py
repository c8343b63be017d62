"""AuxK's kernels on dense codes, against what a CPU does in several passes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from winnow.sae.init import initialise
from winnow.sae.model import PARAMETERS, Sae
from winnow.schemas.training import TrainSpec
from winnow.trainer.kernels.dispatch import triton_module
from winnow.trainer.kernels.step_ops import aligned
from winnow.trainer.step import Recipe, Run, auxk, train_step

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


def test_rows_may_lie_further_than_32_bits_reach(device):
    """The last two begin 2**31 numbers and more after the first; nearly nothing between is touched."""
    z = torch.empty(130 << 24, dtype=torch.bfloat16, device=device).as_strided((130, 5), (1 << 24, 1))
    expected = z.copy_(normal(0, 130, 5)).clone()
    auxk.keep_best(expected, 2, 130)
    triton_module("auxk").keep_best(z, 2)
    assert torch.equal(z, expected)
    grad, W = (normal(seed, size, 3).round().to(device, torch.bfloat16) for seed, size in ((1, 130), (2, 5)))
    triton_module("auxk").grads_of_codes(grad, W, z)
    assert torch.equal(z.float(), torch.where(expected <= 0, 0.0, grad.float() @ W.float().T))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (5, 7), (70, 33), (40, 300)])
def test_error_spread_and_gradient_come_from_one_pass(device, shape, dtype):
    B, D = shape
    # far from 0, where the difference of two sums of squares would have no digit left
    e, weights = normal(0, B, D) + 1e4, normal(1, B).abs() + 0.1
    given = aligned(B, D, torch.empty(0, dtype=dtype)).copy_(e + normal(2, B, D))
    found = triton_module("auxk").errors(given.to(device), e.to(device), weights.to(device), dtype)
    error, wide = given.double() - e.double(), weights.double()
    mean = wide @ e.double() / max(wide.sum().item(), 1e-30)
    expected = {
        "grad": 2 * wide[:, None] * error,
        "error": wide @ error.square().sum(1),
        "weight": wide.sum(),
        "mean": mean,
        "spread": wide @ (e.double() - mean).square().sum(1),
    }
    assert found.grad.dtype == dtype
    for name, one in expected.items():
        loose = 1e-2 if name == "grad" and dtype == torch.bfloat16 else 1e-3 if name == "spread" else 1e-5
        atol = loose * (one.abs().max().item() if one.numel() else 1.0)
        torch.testing.assert_close(getattr(found, name).cpu().double(), one, rtol=0, atol=atol, msg=name)


def test_what_is_not_finite_is_told_and_has_no_gradient(device):
    given, e = torch.zeros(3, 5), normal(0, 3, 5)
    given[1, 2], e[2, 0] = math.inf, math.nan
    found = triton_module("auxk").errors(
        *(tensor.to(device) for tensor in (given, e, torch.ones(3))), torch.float32
    )
    assert not found.error.isfinite()
    assert found.spread.isnan()
    where = (found.grad == 0).nonzero().tolist()
    assert where == [[1, 2], [2, 0]]


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_term_that_is_not_finite_adds_nothing(device, compute_dtype):
    """Of one row there is no spread to divide by."""
    runs = []
    for coefficient in (0.0, 1.0):
        fields = {"out": "x", "hook": "h.1", "latents": 40, "k": 2, "batch_rows": 64, "epochs": 8}
        fields |= {"auxk_coefficient": coefficient, "auxk_k": 16, "dead_after_tokens": 50}
        spec = TrainSpec.model_validate(fields | {"kernels": "triton", "compute_dtype": compute_dtype})
        sae = Sae(6, 40, 2, device=device)
        constant = initialise(sae, normal(9, 300, 6), torch.ones(300), seed=0)
        runs.append(Run(sae, Recipe.resolve(spec, 6, steps_per_epoch=5), constant))
        runs[-1].dead.since[:20] = 1000
    outcomes = [train_step(run, normal(1, 1, 6).to(device), torch.ones(1, device=device)) for run in runs]
    assert outcomes[1] is not None
    assert outcomes[1].dead == 20
    assert outcomes[1].auxk == 0
    for name in PARAMETERS:
        one, other = (getattr(run.sae, name).grad for run in runs)
        assert torch.equal(one, other), name
