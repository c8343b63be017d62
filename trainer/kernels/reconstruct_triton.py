"""`reconstruct` on a GPU: a program gathers a row's K directions once, and does all that they are read for.

They are read again for the dots, by then from the caches: 32 directions of 768 numbers in bfloat16 are 48
KiB, and a multiprocessor works on few rows at a time. Held in registers they took 240 per thread, and left
room for one program per multiprocessor (compiled for sm_90). With K = 256, 393 KB, memory is read again.

Legend: B rows, D width of the output, K entries per row, P programs. Sums are taken in float32.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.trainer.kernels.cost import Cost, cost_of
from winnow.trainer.kernels.examples import Shape, example
from winnow.trainer.kernels.reconstruct import Reconstructed
from winnow.trainer.kernels.rounding_triton import narrow
from winnow.trainer.kernels.support_triton import cdiv, launch, power_of_two

TILE = 4096
"""Numbers of directions that are read at a time."""
ROWS = 16
"""Most rows per program: their sum is added up in registers, so P x D and not B x D is written for it."""
PROGRAMS = 2048
"""Programs below which each has fewer rows: about 15 for each of an H100's 132 multiprocessors."""


@triton.jit
def _reconstruct(
    values,
    indices,
    W_dec,
    y,
    bias,
    share,
    y_hat,
    squares,
    grad,
    pull,
    dz,
    B,
    K,
    D,
    rows,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # 64 bits: row * D and latent * D pass 2**31
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    pulled = tl.zeros([BLOCK_D], dtype=tl.float32)
    for row in range(program * rows, tl.minimum((program + 1) * rows, B)):
        made = tl.load(bias + d, mask=inside, other=0.0)
        for first in range(0, K, BLOCK_K):
            entry = first + tl.arange(0, BLOCK_K)
            value = tl.load(values + row * K + entry, mask=entry < K, other=0.0)
            latent = tl.load(indices + row * K + entry, mask=entry < K, other=0)
            there = (entry < K)[:, None] & inside[None, :]
            directions = tl.load(W_dec + latent[:, None] * D + d[None, :], mask=there, other=0.0)
            made += tl.sum(value[:, None] * directions.to(tl.float32), axis=0)
        tl.store(y_hat + row * D + d, made, mask=inside)
        error = made - tl.load(y + row * D + d, mask=inside, other=0.0)
        tl.store(squares + row, tl.sum(error * error, axis=0))
        exact = error * tl.load(share + row)
        pulled += exact
        rounded = narrow(exact, grad.dtype.element_ty)
        tl.store(grad + row * D + d, rounded, mask=inside)
        # by the gradient as the sums over latents will read it
        wide = rounded.to(tl.float32)
        for first in range(0, K, BLOCK_K):
            entry = first + tl.arange(0, BLOCK_K)
            value = tl.load(values + row * K + entry, mask=entry < K, other=0.0)
            latent = tl.load(indices + row * K + entry, mask=entry < K, other=0)
            there = (entry < K)[:, None] & inside[None, :]
            directions = tl.load(W_dec + latent[:, None] * D + d[None, :], mask=there, other=0.0)
            dots = tl.sum(directions.to(tl.float32) * wide[None, :], axis=1)
            # as torch's backward of relu, which passes the gradient of NaN on
            tl.store(dz + row * K + entry, tl.where(value <= 0, 0.0, dots), mask=entry < K)
    tl.store(pull + program * D + d, pulled, mask=inside)


@cost_of("_reconstruct")
def _(given: Mapping[str, Any]) -> Cost:
    rows, kept, width = given["B"], given["K"], given["D"]
    dense = sum(given[name].nbytes for name in ("y", "y_hat", "grad", "pull", "squares", "share"))
    # values, indices and dots; the second reading of the directions is the caches'
    return Cost(0.0, dense + rows * kept * 16, rows * kept * width * given["W_dec"].element_size())


def reconstruct(
    values: Tensor, indices: Tensor, W_dec: Tensor, y: Tensor, bias: Tensor, share: Tensor
) -> Reconstructed:
    """See `winnow.trainer.kernels.reconstruct`; only for O up to `fused_ops.WIDEST`."""
    (rows, kept), width = values.shape, W_dec.shape[1]
    y_hat, squares = torch.empty_like(y), y.new_empty(rows)
    grad, dz = W_dec.new_empty(rows, width), y.new_empty(rows, kept)
    each = min(ROWS, max(1, rows // PROGRAMS))
    pull = y.new_empty(cdiv(rows, each), width)
    # an empty grid cannot be launched
    if rows:
        block = max(16, power_of_two(width))
        launch(
            _reconstruct,
            (len(pull),),
            values.contiguous(),
            indices.contiguous(),
            W_dec.contiguous(),
            y.contiguous(),
            bias.contiguous(),
            share.contiguous(),
            y_hat,
            squares,
            grad,
            pull,
            dz,
            rows,
            kept,
            width,
            each,
            BLOCK_K=max(1, min(power_of_two(kept), TILE // block)),
            BLOCK_D=block,
            num_warps=min(16, max(4, block // 512)),
        )
    return Reconstructed(y_hat, squares, grad, pull.sum(0), dz)


@example
def _example(shape: Shape) -> None:
    values, indices = shape.codes()
    y, bias, share = (
        shape.empty(*size, dtype=torch.float32)
        for size in ((shape.rows, shape.width), (shape.width,), (shape.rows,))
    )
    reconstruct(values, indices, shape.empty(shape.latents, shape.width), y, bias, share)
