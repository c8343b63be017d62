"""The SAE against its dense equivalent under plain autograd, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.sae import Sae
from winnow.sae.model import PARAMETERS, encode_topk, sum_by_latent
from winnow.schemas.errors import IntegrityError

B, D, N, K = 37, 12, 40, 5


def make(normalize="none", dtype=torch.float64, seed=0, k=K) -> Sae:
    draw = torch.Generator().manual_seed(seed)
    sae = Sae(D, N, k, normalize, dtype=dtype)
    with torch.no_grad():
        for name in PARAMETERS:
            tensor = getattr(sae, name)
            tensor.copy_(torch.randn(tensor.shape, generator=draw, dtype=torch.float64))
        sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
        sae.input_mean.copy_(torch.randn(D, generator=draw, dtype=torch.float64))
        sae.input_scale.fill_(2.5)
    return sae


def rows(seed=1, dtype=torch.float64, count=B) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(sae: Sae, x: torch.Tensor, k: int) -> torch.Tensor:
    """The definition, word for word: TopK as a mask over all N latents."""
    pre = (x - sae.b_pre) @ sae.W_enc.T + sae.b_enc
    mask = torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0)
    return (pre * mask).relu() @ sae.W_dec + sae.b_pre


@pytest.mark.parametrize("k", [1, K, 4 * K, N])
def test_reconstruction_and_every_gradient_equal_the_dense_definition(k):
    sae, x, g = make(), rows(), rows(2)
    x.requires_grad_()
    found = sae.reconstruct(*sae.select(x, k))
    expected = dense(sae, x, k)
    torch.testing.assert_close(found, expected)
    wanted = [getattr(sae, name) for name in PARAMETERS] + [x]
    for name, a, b in zip(
        [*PARAMETERS, "x"],
        torch.autograd.grad((found * g).sum(), wanted),
        torch.autograd.grad((expected * g).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b, msg=name)


def test_encode_topk_passes_gradcheck():
    x, W = rows(count=4).requires_grad_(), make().W_enc.detach()[:10].clone().requires_grad_()
    b = torch.linspace(-1, 1, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: encode_topk(*a, 3)[0], (x, W, b))


def test_negatives_are_cut_and_get_no_gradient():
    sae = make()
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    values, _ = sae.select(rows())
    assert not values.any()
    values.sum().backward()
    assert not sae.W_enc.grad.any()
    torch.testing.assert_close(sae.reconstruct(*sae.select(rows())), sae.b_pre.expand(B, D))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 9), st.integers(0, 10))
def test_sum_by_latent_is_the_scattered_product(count, k, latents, seed):
    draw = torch.Generator().manual_seed(seed)
    k = min(k, latents)
    indices = torch.rand(count, latents, generator=draw).argsort(1)[:, :k]
    values = torch.randn(count, k, generator=draw, dtype=torch.float64)
    data = torch.randn(count, 3, generator=draw, dtype=torch.float64)
    expected = torch.zeros(count, latents, dtype=torch.float64).scatter(1, indices, values).T @ data
    torch.testing.assert_close(sum_by_latent(values, indices, data, latents), expected)


def test_gradients_are_the_same_bits_every_run():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=draw)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = []
        for _ in range(4):
            torch.manual_seed(3)
            sae = Sae(64, 1024, 16, "layer")
            with torch.no_grad():
                sae.W_dec.copy_(F.normalize(torch.randn(1024, 64), dim=1))
                sae.W_enc.copy_(sae.W_dec)
            normal = sae.normalise(x)[0]
            (sae.reconstruct(*sae.select(normal)) - normal).square().sum().backward()
            runs.append([getattr(sae, name).grad for name in PARAMETERS])
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("normalize", ["layer", "dataset", "none"])
def test_normalising_and_restoring_gives_the_rows_back(normalize):
    sae, x = make(normalize), 1e3 * rows() + 50
    normal, scale = sae.normalise(x)
    torch.testing.assert_close(sae.restore(normal, scale), x)
    if normalize == "layer":
        torch.testing.assert_close(normal.mean(1), torch.zeros(B, dtype=torch.float64), atol=1e-9, rtol=0)
        torch.testing.assert_close(normal.norm(dim=1), torch.ones(B, dtype=torch.float64))


def test_a_constant_row_survives_layer_normalisation():
    sae = make("layer")
    assert sae(torch.full((1, D), 7.0, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("normalize", ["layer", "dataset", "none"])
def test_calling_it_gives_the_raw_space_and_the_rows_dtype(normalize):
    sae, x = make(normalize, torch.float32), 10 * rows(dtype=torch.float32) + 3
    values, indices = sae.encode(x)
    torch.testing.assert_close(sae(x), sae.decode(values, indices, like=x))
    torch.testing.assert_close(sae(x), sae.decode(values, indices, like=sae.normalise(x)[1]))
    normal = sae.decode(values, indices)
    torch.testing.assert_close(normal, sae.reconstruct(values, indices))
    assert sae(x.bfloat16()).dtype == torch.bfloat16


def test_encode_orders_by_value_then_index():
    sae, x = make(), rows()
    with torch.no_grad():
        sae.W_enc[1::2] = sae.W_enc[::2]  # every value twice
        sae.b_enc[1::2] = sae.b_enc[::2]
    values, indices = sae.encode(x)
    assert (values.diff(dim=1) <= 0).all()
    ties = values.diff(dim=1) == 0
    assert ties.any()
    assert (indices.diff(dim=1)[ties] > 0).all()
    scattered = torch.zeros(B, N, dtype=torch.float64).scatter(1, indices, values)
    plain = torch.zeros(B, N, dtype=torch.float64).scatter(1, *reversed(sae.select(x)))
    torch.testing.assert_close(scattered, plain)


def test_fill_refuses_other_names_and_shapes():
    sae = make()
    with pytest.raises(IntegrityError, match="W_enc"):
        sae.fill({"W_enc": torch.zeros(1)})
