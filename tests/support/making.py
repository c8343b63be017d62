"""SAEs of every kind, rows like a residual stream's, and the measure of agreement."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.sae import Sae
from winnow.schemas.training import SaeParts
from winnow.store.objects import open_store

B, D, N, K = 64, 24, 96, 6
LARGEST_ERROR = 1e-5
"""Of a reconstruction, relative to its norm, in single precision."""


def make_sae(
    activation="topk", normalize="dataset", *, d_out=None, target_normalize="dataset", skip=False, seed=0
) -> Sae:
    """A random SAE whose every tensor matters."""
    draw = torch.Generator().manual_seed(seed)
    parts = SaeParts(
        activation=activation,
        d_out=d_out,
        target_normalize=target_normalize if d_out else None,
        skip=skip,
    )
    sae = Sae(D, N, K, normalize, parts)
    tensors = {n: 0.3 * torch.randn(t.shape, generator=draw) for n, t in sae.tensors().items()}
    tensors["W_dec"] = F.normalize(tensors["W_dec"], dim=1)
    if not d_out:
        tensors["W_enc"] = tensors["W_dec"] * 0.7 + 0.02 * tensors["W_enc"]
    for name in ("input_scale", "target_scale", "threshold"):
        if name in tensors:
            tensors[name] = tensors[name].abs() + (0.05 if name == "threshold" else 20.0)
    for name in ("input_mean", "target_mean"):
        if name in tensors:
            tensors[name] = tensors[name] * 10
    sae.fill(tensors)
    return sae.requires_grad_(False)


def save(sae: Sae, folder, hook="resid_post.9") -> str:
    """Publish it as a run would; gives its address."""
    target = "mlp_out.9" if sae.has_target else None
    sae.save(open_store(str(folder)), hook=hook, target_hook=target)
    return str(folder)


def rows(spread=10.0, seed=1) -> Tensor:
    """[B, D], of standard deviation `spread` within a row, their mean off 0."""
    draw = torch.Generator().manual_seed(seed)
    return spread * (torch.randn(B, D, generator=draw) + 0.3)


def error(found: Tensor, expected: Tensor) -> float:
    """The largest |found - expected| / |expected| of a row."""
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


def dense(values: Tensor, indices: Tensor, latents: int = N) -> Tensor:
    """Codes [B, S] as a matrix [B, N]."""
    return torch.zeros(len(values), latents).scatter_add(1, indices, values)
