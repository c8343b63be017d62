"""`decode` on a GPU: one program per row and block of D gathers the row's K directions.

Legend: B rows, D width, K entries per row. Sums are taken in float32, entry by entry.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.trainer.kernels.cost import Cost, Given, cost_of, size_of
from winnow.trainer.kernels.examples import Shape, example
from winnow.trainer.kernels.support_triton import block_of, cdiv, launch

LARGEST_BLOCK = 1024


@triton.jit
def _decode(values, indices, W_dec, out, K, D, ADD: tl.constexpr, BLOCK_D: tl.constexpr):
    # 64 bits: row * D and latent * D pass 2**31 (at D = 768 from 2.8 M rows or latents)
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    # one entry after another: a fixed order of the sum, so the same bits every run
    for entry in range(K):
        value = tl.load(values + row * K + entry).to(tl.float32)
        latent = tl.load(indices + row * K + entry)
        direction = tl.load(W_dec + latent * D + d, mask=d < D, other=0.0)
        total += value * direction.to(tl.float32)
    if ADD:
        total += tl.load(out + row * D + d, mask=d < D, other=0.0)
    tl.store(out + row * D + d, total.to(out.dtype.element_ty), mask=d < D)


@cost_of("_decode")
def _decode_cost(given: Given) -> Cost:
    gathered = given["values"].numel() * given["D"] * given["W_dec"].element_size()
    codes = size_of(given["values"]) + size_of(given["indices"])
    return Cost(streamed=codes + size_of(given["out"]) * (2 if given["ADD"] else 1), gathered=gathered)


def decode(values: Tensor, indices: Tensor, W_dec: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """See `winnow.trainer.kernels.decode`; `dtype` is the result's type, None takes W_dec's."""
    width = W_dec.shape[1]
    out = W_dec.new_empty(len(values), width, dtype=dtype or W_dec.dtype)
    _launch(values, indices, W_dec, out, add=False)
    return out


def add_decoded(out: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor) -> None:
    """Add the same to `out`, float32 [B, D] and contiguous."""
    _launch(values, indices, W_dec, out, add=True)


def _launch(values: Tensor, indices: Tensor, W_dec: Tensor, out: Tensor, *, add: bool) -> None:
    # an empty grid cannot be launched
    if out.numel():
        width = W_dec.shape[1]
        block = block_of(width, LARGEST_BLOCK)
        grid = (len(values), cdiv(width, block))
        contiguous = values.contiguous(), indices.contiguous(), W_dec.contiguous()
        launch(_decode, grid, *contiguous, out, values.shape[1], width, ADD=add, BLOCK_D=block)


@example
def _example(shape: Shape) -> None:
    W_dec = shape.empty(shape.latents, shape.width)
    decode(*shape.codes(), W_dec, torch.float32)
    add_decoded(shape.empty(shape.rows, shape.width, dtype=torch.float32), *shape.codes(), W_dec)
