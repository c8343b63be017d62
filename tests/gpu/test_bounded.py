"""Float32 encoded by bounded bfloat16: the bound, and that nothing of the result depends on it.

The interpreter cuts numbers off to bfloat16 where a GPU rounds them, and adds products in float32 where
tensor cores cut sums off. The bound is of the rounding that was done; what sums may lose is tried by bounds
that are moved.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnow.schemas.training import TrainSpec
from winnow.trainer.kernels import dispatch, reference
from winnow.trainer.kernels.step_ops import step_ops

pytestmark = pytest.mark.gpu
SHAPES = [(0, 5, 9, 2), (3, 4, 6, 0), (5, 3, 7, 7), (3, 33, 300, 5), (2, 17, 1100, 70)]  # B, D, N, K


@pytest.fixture
def module(device):
    return dispatch.triton_module("encode_bounded")


def normal(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def data(B: int, D: int, N: int, device: torch.device, *, whole: bool = False) -> list[Tensor]:
    made = [normal(seed, *size) for seed, size in enumerate(((B, D), (N, D), (N,)))]
    return [(tensor.round() if whole else tensor).to(device) for tensor in made]


def equal(found, expected):
    assert torch.equal(found[0].isnan(), expected[0].isnan())
    assert torch.equal(found[0].nan_to_num(0), expected[0].nan_to_num(0))
    assert torch.equal(found[1], expected[1])


def with_errors(module, monkeypatch, by: float) -> None:
    """The bounds of the sweep are moved up, each differently, by up to `by` of what they allow for."""
    before = module._sweep

    def sweep(x, W, bias, k):
        spread = 1 + by * torch.rand(len(W.norms), generator=torch.Generator().manual_seed(7)).to(bias.device)
        return before(x, W._replace(norms=W.norms * spread, lost=W.lost * spread), bias, k)

    monkeypatch.setattr(module, "_sweep", sweep)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_exact_ties_included(module, device, shape):
    B, D, N, k = shape
    x, W, b = data(B, D, N, device, whole=True)
    equal(module.encode_topk_bounded(x, W, b, k), reference.encode_topk(x, W, b, k))


def test_the_bound_is_above_every_number(module, device):
    """What the sweep stores reaches the largest number of each group, in double precision."""
    x, W, b = data(7, 40, 300, device)
    x[:, 3] *= 1000  # one coordinate carries the norm
    rounded = module.round_rows(x)
    torch.testing.assert_close(rounded.norms, x.norm(dim=1))
    torch.testing.assert_close(rounded.lost, (x - rounded.low.float()).norm(dim=1))
    maxima, _, group = module._sweep(rounded, module.round_rows(W), module._upper(b, 40), 5)
    bits = maxima ^ ((maxima >> 31) & 0x7FFFFFFF)
    z = x.double() @ W.double().T + b.double()
    step = 128 // group
    padded = torch.nn.functional.pad(z, (0, 384 - 300), value=-torch.inf)
    largest = padded.view(7, 3, group, step).amax(2).flatten(1)
    above = bits.view(torch.float32) - largest
    there = largest.isfinite()
    assert (above[there] >= 0).all()
    assert above[there].max() < 0.02 * (x.norm(dim=1).max() * W.norm(dim=1).max())


@pytest.mark.parametrize("scale", [1e-19, 1e-22])
def test_the_bound_holds_where_squares_are_lost(module, device, scale):
    """Rows so small that the squares of their numbers, or of what rounding took, are 0 in float32."""
    x, W, b = data(11, 40, 300, device)
    x, b = x * scale, torch.zeros_like(b)
    rounded = module.round_rows(x)
    assert (rounded.norms.double() >= x.double().norm(dim=1)).all()
    assert (rounded.lost.double() >= (x.double() - rounded.low.double()).norm(dim=1)).all()
    values, indices = module.encode_topk_bounded(x, W, b, 5)
    exact = (x.double() @ W.double().T).clamp(min=0).topk(5).values
    torch.testing.assert_close(values.double(), exact, rtol=1e-4, atol=0)
    assert indices.shape == values.shape


@pytest.mark.parametrize("by", [0.0, 3.0, 30.0])
def test_nothing_of_the_result_depends_on_the_bounds(module, device, monkeypatch, by):
    """Near-ties of float32, far closer than bfloat16 tells apart, in and outside of one group; any bounds."""
    x, W, b = data(2, 40, 500, device)
    W[130:150] = W[400]  # ties and neighbours of the best
    W[131:150] += 2e-7 * normal(3, 19, 40).to(device)
    x[0] = W[400]
    b.zero_()
    expected = reference.encode_topk(x, W, b, 12)
    with_errors(module, monkeypatch, by)
    values, indices = module.encode_topk_bounded(x, W, b, 12)
    exact = (x.double() @ W.double().T).gather(1, indices)
    torch.testing.assert_close(values.double(), exact, rtol=0, atol=4e-5)
    assert (values.diff(dim=1) <= 0).all()
    # as good as the reference's choice, but for the rounding of sums
    torch.testing.assert_close(values, expected[0], rtol=0, atol=4e-5)
    assert all(len(set(row)) == 12 for row in indices.tolist())
    assert torch.equal(indices[1:], expected[1][1:])


def test_more_groups_in_question_than_are_selected(module, device, monkeypatch):
    """All latents are: what is not selected is looked through."""
    x, W, b = data(1, 8, 700, device, whole=True)
    monkeypatch.setattr(module, "SCAN", 128)
    with_errors(module, monkeypatch, 1e6)
    equal(module.encode_topk_bounded(x, W, b, 3), reference.encode_topk(x, W, b, 3))


def test_rows_with_nan_infinity_or_nothing_but_ties_are_exact(module, device):
    x, W, b = data(5, 8, 300, device, whole=True)
    x[3], x[4, 2] = 0, torch.nan
    W[77, 3] = W[299, 0] = torch.nan
    b[200:] = -torch.inf
    b[7] = torch.inf
    equal(module.encode_topk_bounded(x, W, b, 3), reference.encode_topk(x, W, b, 3))


def test_a_step_asks_for_it_and_half_precision_has_none(module, device):
    x, W, b = data(4, 8, 60, device, whole=True)
    ops = step_ops("triton", "float32", "bounded")
    found = ops.encode(x, W, b, 3, None)
    equal((found.values, found.indices), module.encode_topk_bounded(x, W, b, 3))
    half = x.bfloat16(), W.bfloat16(), b
    equal(module.encode_topk_bounded(*half, 3), reference.encode_topk(*half, 3))
    fields = {"out": "x", "hook": "h.1", "latents": 64, "k": 4, "float32_products": "bounded"}
    with pytest.raises(ValueError, match="compute_dtype is bfloat16"):
        TrainSpec.model_validate(fields | {"compute_dtype": "bfloat16"})
    with pytest.raises(ValueError, match="float32_products: bounded needs the fused step"):
        TrainSpec.model_validate(fields | {"kernels": "eager"})
