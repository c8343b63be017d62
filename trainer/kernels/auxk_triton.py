"""AuxK's dense codes on a GPU: rows of [B, M] cut to their best k, their error, and their gradients.

A program holds a whole row in its registers and looks for the k-th best by bisection over the numbers' bits,
so the row is read once and written once; the library's top-k alone reads it five times.
One pass over [B, O] gives error, spread and the gradient of what the codes reconstruct, which waits for no
sum over the batch: that scales what is made of it. The gradients' product is masked, and summed for the
biases, by the program that has a block of it.

Legend: B rows, M dead latents, D width, O width of the output, k kept per row.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.trainer.kernels.cost import Cost, Given, cost_of
from winnow.trainer.kernels.encode_topk_triton import DEPTH, _key, _threshold
from winnow.trainer.kernels.examples import Shape, example
from winnow.trainer.kernels.fused_ops import Errors
from winnow.trainer.kernels.groups import COLUMNS, ROWS
from winnow.trainer.kernels.rounding_triton import narrow
from winnow.trainer.kernels.step_ops import aligned
from winnow.trainer.kernels.support_triton import block_of, cdiv, interpreted, launch, power_of_two

SMALLEST = 1024
"""Least numbers of a program: several rows, if these are short."""
ERROR_ROWS, ERROR_BLOCK = 32, 128
"""Rows and columns of [B, O] that a program takes."""


@triton.jit(do_not_specialize=["R", "M", "kept"])
def _keep_best(z, R, M, stride, kept, SHIFT: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * LINES + tl.arange(0, LINES)
    column = tl.arange(0, BLOCK)[None, :]
    at = z + row.to(tl.int64)[:, None] * stride + column
    # to the next row, whose place is a multiple of 64 bytes, so that no number needs a mask of its own
    inside = (row < R)[:, None] & (column < stride)
    # half precision has 16 bits, and takes half the rounds
    key = _key(tl.load(at, mask=inside, other=0.0).to(tl.float32)) >> SHIFT
    key = tl.where(column < M, key, 0)
    # 1 is the key of the smallest positive number: if fewer than k are positive, all of them are kept
    least = tl.full([LINES], 1, tl.int32)
    threshold = _threshold(key, kept, least, tl.maximum(tl.max(key, 1), 1))
    room = kept - tl.sum((key > threshold[:, None]).to(tl.int32), 1)
    # of equal numbers those of the lowest columns, up to `high`
    low = tl.zeros([LINES], tl.int32)
    high = tl.full([LINES], BLOCK, tl.int32)
    if tl.max(tl.sum((key == threshold[:, None]).to(tl.int32), 1) - room, 0) > 0:
        while tl.max((low < high).to(tl.int32), 0) > 0:
            middle = (low + high) // 2
            equal = (key == threshold[:, None]) & (column < middle[:, None])
            enough = tl.sum(equal.to(tl.int32), 1) >= room
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, tl.minimum(middle + 1, high))
    chosen = (key > threshold[:, None]) | ((key == threshold[:, None]) & (column < high[:, None]))
    # what is kept is positive or NaN, and its key its bits: the numbers themselves need no registers
    value = tl.where(chosen, key << SHIFT, 0).to(tl.float32, bitcast=True)
    tl.store(at, value.to(z.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R", "M"])
def _grads(
    grad,
    W,
    z,
    sums,
    R,
    M,
    D,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row_blocks = tl.cdiv(R, ROWS)
    row_block = tl.program_id(0) % row_blocks
    row = row_block * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) // row_blocks * COLUMNS + tl.arange(0, COLUMNS)
    # past the end the last row and column are read again, as in the encoder's sweep
    grad_rows = grad + tl.minimum(row, R - 1).to(tl.int64)[:, None] * D
    W_rows = W + tl.minimum(column, M - 1).to(tl.int64)[None, :] * D
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for left in range(0, D, DEPTH):
        d = left + tl.arange(0, DEPTH)
        grad_part = tl.load(grad_rows + d[None, :], mask=(d < D)[None, :], other=0.0)
        W_part = tl.load(W_rows + d[:, None], mask=(d < D)[:, None], other=0.0)
        if WIDEN:  # the interpreter has no bfloat16 to multiply in
            grad_part = grad_part.to(tl.float32)
            W_part = W_part.to(tl.float32)
        total = tl.dot(grad_part, W_part, total, input_precision="ieee")
    at = z + row.to(tl.int64)[:, None] * stride + column[None, :]
    inside = (row < R)[:, None] & (column < stride)[None, :]
    value = tl.load(at, mask=inside, other=0.0)
    # NaN is not cut: it reaches the gradients, as by torch's own backward of relu
    cut = tl.where(value <= 0.0, 0.0, total).to(z.dtype.element_ty)
    tl.store(at, cut, mask=inside)
    part = tl.sum(tl.where((row < R)[:, None], cut.to(tl.float32), 0.0), 0)
    tl.store(sums + row_block.to(tl.int64) * M + column, part, mask=column < M)


@cost_of("_grads")
def _(given: Given) -> Cost:
    rows, dead, width = given["R"], given["M"], given["D"]
    moved = sum(given[name].nbytes for name in ("grad", "W", "sums"))
    return Cost(2.0 * rows * dead * width, moved + 2 * rows * dead * given["z"].element_size())


def grads_of_codes(grad: Tensor, W: Tensor, z: Tensor) -> Tensor:
    """Replace z [B, M] by its gradient, `grad @ W.T` where z is above 0 and 0 elsewhere; gives its sums [M].

    Args:
        grad: [B, D], of z's type, as W.
        W: [M, D].
        z: As for `keep_best`.
    """
    (rows, width), dead = grad.shape, len(W)
    if not z.numel():
        return torch.zeros(dead, dtype=torch.float32, device=z.device)
    sums = torch.empty(cdiv(rows, ROWS), dead, dtype=torch.float32, device=z.device)
    sizes = (rows, dead, width, z.stride(0))
    shape = {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH, "WIDEN": interpreted(), "num_warps": 8}
    grid = (len(sums) * cdiv(dead, COLUMNS),)
    launch(_grads, grid, grad.contiguous(), W.contiguous(), z, sums, *sizes, **shape)
    return sums.sum(0)


@triton.jit(do_not_specialize=["R"])
def _errors(
    given,
    e,
    weights,
    grad,
    shares,
    means,
    sums,
    R,
    D,
    stride,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    part = tl.program_id(0)
    row = part * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < R)[:, None] & (d < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + d[None, :]
    target = tl.load(e + at, mask=inside, other=0.0)
    there = given + row.to(tl.int64)[:, None] * stride + d[None, :]
    error = tl.load(there, mask=inside, other=0.0).to(tl.float32) - target
    weight = tl.load(weights + row, mask=row < R, other=0.0)
    twice = 2 * weight[:, None] * error
    # 0 times what is not finite would be NaN, whatever the term's scale is set to
    finite = tl.where(tl.abs(twice) < float("inf"), twice, 0.0)
    tl.store(grad + at, narrow(finite, grad.dtype.element_ty), mask=inside)
    share = tl.sum(weight, axis=0)
    # about the mean of these rows: the difference of two sums of squares would cancel
    mean = tl.sum(weight[:, None] * target, axis=0) / tl.where(share > 0, share, 1.0)
    apart = target - mean[None, :]
    tl.store(means + part.to(tl.int64) * D + d, mean, mask=d < D)
    # all programs of these rows find the same share
    tl.store(shares + part, share, mask=tl.program_id(1) == 0)
    place = 2 * (part * tl.num_programs(1) + tl.program_id(1))
    tl.store(sums + place, tl.sum(tl.sum(weight[:, None] * error * error, axis=1), axis=0))
    # columns past the end have a mean of 0, and 0 is their number
    tl.store(sums + place + 1, tl.sum(tl.sum(weight[:, None] * apart * apart, axis=1), axis=0))


@cost_of("_errors")
def _(given: Given) -> Cost:
    return Cost(streamed=sum(given[name].nbytes for name in ("given", "e", "grad", "means", "sums")))


def errors(given: Tensor, e: Tensor, weights: Tensor, dtype: torch.dtype) -> Errors:
    """See `Errors`.

    Args:
        given: [B, O]; rows have consecutive numbers.
        e: float32 [B, O].
        weights: float32 [B].
        dtype: Of the gradient.
    """
    rows, width = e.shape
    parts, block = cdiv(rows, ERROR_ROWS), block_of(width, ERROR_BLOCK)
    across = cdiv(width, block)
    grad = torch.empty(rows, width, dtype=dtype, device=e.device)
    shares, means, sums = (e.new_empty(size) for size in ((parts,), (parts, width), (parts, across, 2)))
    if grad.numel():
        shape = {"ROWS": ERROR_ROWS, "BLOCK_D": block, "num_warps": 4}
        operands = (given, e.contiguous(), weights.contiguous(), grad, shares, means, sums)
        launch(_errors, (parts, across), *operands, rows, width, given.stride(0), **shape)
    weight = shares.sum()
    # a rank may have no rows
    mean = (shares @ means) / torch.where(weight > 0, weight, 1.0)
    error, within = sums.sum((0, 1)).unbind()
    apart = means - mean
    return Errors(grad, error, weight, mean, within + shares @ (apart * apart).sum(1))


@cost_of("_keep_best")
def _(given: Given) -> Cost:
    return Cost(streamed=2 * given["R"] * given["M"] * given["z"].element_size())


def keep_best(z: Tensor, k: int) -> None:
    """Cut z [B, M], in place, to the best k of each row that are above 0; NaN counts as largest.

    Args:
        z: float32 or bfloat16, M at most `fused_ops.WIDEST_DEAD`. Rows have consecutive numbers; what lies
            between a row and the next is overwritten.
        k: Kept per row: of equal numbers those of the lowest columns.
    """
    rows, width = z.shape
    if not z.numel():
        return
    block = max(16, power_of_two(width))
    # the interpreter's time is by programs, not by numbers
    lines = power_of_two(rows) if interpreted() else max(1, SMALLEST // block)
    sizes = (rows, width, z.stride(0), k)
    warps = min(16, max(4, lines * block // 1024))
    shift = 16 if z.dtype == torch.bfloat16 else 0
    launch(
        _keep_best, (cdiv(rows, lines),), z, *sizes, SHIFT=shift, LINES=lines, BLOCK=block, num_warps=warps
    )


@example
def _example(shape: Shape) -> None:
    dead = shape.latents // 10
    z = aligned(shape.rows, dead, shape.empty(0))
    keep_best(z, 256)
    grads_of_codes(shape.empty(shape.rows, shape.width), shape.empty(dead, shape.width), z)
    e = shape.empty(shape.rows, shape.width, dtype=torch.float32)
    errors(shape.empty(*e.shape), e, e[:, 0], shape.dtype)
