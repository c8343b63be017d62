"""Dense equivalents of every kernel, for tests, benchmarks and the backend `eager`.

Legend: B rows, D width, N latents, K entries per row.

Each holds [B, N] and is as plain as its formula. In half precision sums are taken in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which products of `dtype` are summed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scatter(values: Tensor, indices: Tensor, latents: int) -> Tensor:
    """Codes [B, K] as a dense [B, N]; a latent that a row names twice counts twice."""
    # added, not assigned: an empty slot, of value 0, must not erase an entry of the latent that it names
    dense = values.new_zeros(len(values), latents, dtype=accumulator(values.dtype))
    return dense.scatter_add_(1, indices, values.to(dense.dtype))


def encode_topk(x: Tensor, W_enc: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`(x @ W_enc.T + b).topk(k)`, ordered by value descending, then index ascending."""
    kind = accumulator(x.dtype)
    # a stable sort and not `topk`, which may choose any of the equals at the edge
    values, indices = (x.to(kind) @ W_enc.to(kind).T + b.to(kind)).sort(dim=1, descending=True, stable=True)
    return values[:, :k].contiguous(), indices[:, :k].contiguous()


def decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """`scatter(values) @ W_dec`: [B, D]."""
    dense = scatter(values, indices, len(W_dec))
    return (dense @ W_dec.to(dense.dtype)).to(W_dec.dtype)


def decode_grad_values(grad: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """`(grad @ W_dec.T).gather(indices)`: [B, K]."""
    kind = accumulator(W_dec.dtype)
    return (grad.to(kind) @ W_dec.to(kind).T).gather(1, indices)


def segment_grad(values: Tensor, indices: Tensor, rows: Tensor, latents: int) -> Tensor:
    """`scatter(values).T @ rows`: [N, D]."""
    dense = scatter(values, indices, latents)
    return (dense.T @ rows.to(dense.dtype)).to(rows.dtype)
