"""`decode_grad_values` on a GPU: each program computes LATENTS of a row's K dots.

Legend: B rows, D width, K entries per row. Sums are taken in float32.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.trainer.kernels.cost import Cost, Given, cost_of, size_of
from winnow.trainer.kernels.examples import Shape, example
from winnow.trainer.kernels.support_triton import block_of, cdiv, launch

LARGEST_BLOCK = 256
LATENTS = 16


@triton.jit
def _dots(grad, indices, W_dec, out, K, D, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    # 64 bits: row * D and latent * D pass 2**31
    row = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    # masked entries name latent 0, a valid address, although `inside` keeps it from being read
    latent = tl.load(indices + row * K + entry, mask=entry < K, other=0)
    total = tl.zeros([BLOCK_K], dtype=tl.float32)
    for left in range(0, D, BLOCK_D):
        d = left + tl.arange(0, BLOCK_D)
        g = tl.load(grad + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        inside = (entry < K)[:, None] & (d < D)[None, :]
        directions = tl.load(W_dec + latent[:, None] * D + d[None, :], mask=inside, other=0.0)
        total += tl.sum(directions.to(tl.float32) * g[None, :], axis=1)
    tl.store(out + row * K + entry, total, mask=entry < K)


@cost_of("_dots")
def _dots_cost(given: Given) -> Cost:
    codes = size_of(given["indices"]) + size_of(given["out"])
    gathered = given["indices"].numel() * given["D"] * given["W_dec"].element_size()
    return Cost(streamed=size_of(given["grad"]) + codes, gathered=gathered)


def decode_grad_values(grad: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """See `winnow.trainer.kernels.decode_grad_values`."""
    count, kept = indices.shape
    out = torch.empty(indices.shape, dtype=torch.float32, device=grad.device)
    if out.numel():
        width = W_dec.shape[1]
        contiguous = grad.contiguous(), indices.contiguous(), W_dec.contiguous()
        grid = (count, cdiv(kept, LATENTS))
        launch(
            _dots,
            grid,
            *contiguous,
            out,
            kept,
            width,
            BLOCK_K=LATENTS,
            BLOCK_D=block_of(width, LARGEST_BLOCK),
        )
    return out


@example
def _example(shape: Shape) -> None:
    rows, W_dec = shape.empty(shape.rows, shape.width), shape.empty(shape.latents, shape.width)
    decode_grad_values(rows, shape.codes()[1], W_dec)
