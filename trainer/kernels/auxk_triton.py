"""AuxK's dense codes on a GPU: each row of [B, M] cut to its best k in one pass, in place.

A program holds a whole row in its registers and looks for the k-th best by bisection over the numbers' bits,
so the row is read once and written once; the library's top-k alone reads it five times.

Legend: B rows, M dead latents, k kept per row.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.trainer.kernels.cost import Cost, Given, cost_of
from winnow.trainer.kernels.encode_topk_triton import _key, _threshold
from winnow.trainer.kernels.examples import Shape, example
from winnow.trainer.kernels.step_ops import aligned
from winnow.trainer.kernels.support_triton import cdiv, interpreted, launch, power_of_two

SMALLEST = 1024
"""Least numbers of a program: several rows, if these are short."""


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
    keep_best(aligned(shape.rows, shape.latents // 10, shape.empty(0)), 256)
