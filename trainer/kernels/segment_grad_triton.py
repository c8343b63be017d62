"""`segment_grad` on a GPU: sums over sorted entries, without atomics, finished in the pass that writes them.

A latent with up to `chunk_size` entries is summed by one program per block of D. A hot one is split into
chunks of as many, whose partial sums another program adds in order: the load is even, and the bits are the
same every run.

What the gradient of a step's matrix needs beside its sums (see `Finish`) is done by the program that holds
the row; `finish_rows` does it in a pass of its own, for sums that are whole only after they crossed a mesh.

Legend: B rows, D width, N latents, E entries (B*K), H chunks of hot latents, M dead latents.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.trainer.kernels.cost import Cost, cost_of
from winnow.trainer.kernels.examples import Shape, example
from winnow.trainer.kernels.fused_ops import WIDE_TILE, WIDEST, Finish
from winnow.trainer.kernels.segment_grad import Segments, chunk_size
from winnow.trainer.kernels.support_triton import block_of, cdiv, launch

LARGEST_BLOCK = WIDEST


@triton.jit
def _sum_entries(values, row, rows, low, high, d, D, BLOCK_D: tl.constexpr):
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    weight = 0.0
    for entry in range(low, high):
        value = tl.load(values + entry).to(tl.float32)
        data = tl.load(rows + tl.load(row + entry) * D + d, mask=d < D, other=0.0)
        total += value * data.to(tl.float32)
        weight += value
    return total, weight


@triton.jit
def _end(total, out, at, more, directions, squares, latent, d, D, stride, ADD: tl.constexpr):
    inside = d < D
    here = latent * stride + d
    if ADD:
        total += tl.load(out + here, mask=inside, other=0.0)
    if at is not None:
        place = tl.load(at + latent).to(tl.int64)
        # a mask of the numbers & a flag of the row, which Triton 3.9's interpreter refuses, in one comparison
        total += tl.load(more + place * D + d, mask=d < tl.where(place >= 0, D, 0), other=0.0)
    if directions is not None:
        direction = tl.load(directions + here, mask=inside, other=0.0)
        total -= tl.sum(total * direction, axis=0) * direction
    if squares is not None:
        tl.store(squares + latent, tl.sum(total * total, axis=0))
    tl.store(out + here, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _whole(
    values,
    row,
    ends,
    rows,
    out,
    bias,
    at,
    more,
    directions,
    squares,
    D,
    stride,
    chunk_size,
    ADD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    low = tl.load(ends + latent)
    high = tl.load(ends + latent + 1)
    # a hot latent would keep one program busy long after all others: `_chunk` and `_join` do it
    if high - low <= chunk_size:
        total, weight = _sum_entries(values, row, rows, low, high, d, D, BLOCK_D)
        if bias is not None:
            tl.store(bias + latent, tl.load(bias + latent) + weight)
        _end(total, out, at, more, directions, squares, latent, d, D, stride, ADD)


@triton.jit
def _chunk(
    values,
    row,
    ends,
    rows,
    latents,
    first,
    partial,
    weights,
    N,
    D,
    chunk_size,
    BLOCK_D: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    latent = tl.load(latents + chunk)
    # the grid is an upper bound: programs past the last chunk find no owner
    if latent < N:
        low = tl.load(ends + latent) + (chunk - tl.load(first + latent)) * chunk_size
        high = tl.minimum(low + chunk_size, tl.load(ends + latent + 1))
        total, weight = _sum_entries(values, row, rows, low, high, d, D, BLOCK_D)
        # in float32 whatever the rows are: a partial sum is not rounded before it is added
        tl.store(partial + chunk * D + d, total, mask=d < D)
        tl.store(weights + chunk, weight)


@triton.jit
def _join(
    first,
    partial,
    weights,
    out,
    bias,
    at,
    more,
    directions,
    squares,
    D,
    stride,
    ADD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    low = tl.load(first + latent)
    high = tl.load(first + latent + 1)
    if low < high:
        total = tl.zeros([BLOCK_D], dtype=tl.float32)
        weight = 0.0
        for chunk in range(low, high):
            total += tl.load(partial + chunk * D + d, mask=d < D, other=0.0)
            weight += tl.load(weights + chunk)
        if bias is not None:
            tl.store(bias + latent, tl.load(bias + latent) + weight)
        _end(total, out, at, more, directions, squares, latent, d, D, stride, ADD)


@triton.jit
def _finish_row(grad, directions, squares, D, WIDE: tl.constexpr, BLOCK_D: tl.constexpr):
    latent = tl.program_id(0).to(tl.int64)
    if WIDE:
        along = 0.0
        if directions is not None:
            products = tl.zeros([BLOCK_D], dtype=tl.float32)
            for left in range(0, D, BLOCK_D):
                d = left + tl.arange(0, BLOCK_D)
                total = tl.load(grad + latent * D + d, mask=d < D, other=0.0)
                products += total * tl.load(directions + latent * D + d, mask=d < D, other=0.0)
            along = tl.sum(products, axis=0)
        square = tl.zeros([BLOCK_D], dtype=tl.float32)
        for left in range(0, D, BLOCK_D):
            d = left + tl.arange(0, BLOCK_D)
            total = tl.load(grad + latent * D + d, mask=d < D, other=0.0)
            if directions is not None:
                total -= along * tl.load(directions + latent * D + d, mask=d < D, other=0.0)
                tl.store(grad + latent * D + d, total, mask=d < D)
            square += total * total
        tl.store(squares + latent, tl.sum(square, axis=0))
    else:
        d = tl.arange(0, BLOCK_D)
        total = tl.load(grad + latent * D + d, mask=d < D, other=0.0)
        _end(total, grad, None, None, directions, squares, latent, d, D, D, ADD=False)


def _added(given: Mapping[str, Any]) -> int:
    """Bytes that finishing moves for each of N rows, beside writing them."""
    return 4 * given["D"] * (bool(given["ADD"]) + (given["directions"] is not None))


@cost_of("_whole")
def _(given: Mapping[str, Any]) -> Cost:
    latents, entries, width = len(given["ends"]) - 1, len(given["values"]), given["D"]
    own = latents * (width * given["out"].element_size() + _added(given)) + given["ends"].nbytes
    if given["more"] is not None:
        own += given["more"].nbytes + given["at"].nbytes
    # as if no latent were hot: the chunks then find no owner
    return Cost(0.0, own + entries * 12, entries * width * given["rows"].element_size())


@cost_of("_chunk")
def _(given: Mapping[str, Any]) -> Cost:
    return Cost(streamed=given["latents"].nbytes)


@cost_of("_join")
def _(given: Mapping[str, Any]) -> Cost:
    return Cost(streamed=given["first"].nbytes)


@cost_of("_finish_row")
def _(given: Mapping[str, Any]) -> Cost:
    passes = 2 if given["directions"] is None else 3
    if given["WIDE"]:
        # read twice, as if the second time did not hit the caches
        passes = 1 if given["directions"] is None else 5
    return Cost(streamed=passes * given["grad"].nbytes + given["squares"].nbytes)


def segment_sums(
    values: Tensor, segments: Segments, rows: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Sums [N, D] of type `dtype` (None takes rows'), from values [E] in the segments' order."""
    out = rows.new_empty(len(segments.ends) - 1, rows.shape[1], dtype=dtype or rows.dtype)
    add_sums(out, values, segments, rows)
    return out


def add_sums(
    out: Tensor,
    values: Tensor,
    segments: Segments,
    rows: Tensor,
    *,
    bias: Tensor | None = None,
    finish: Finish | None = None,
) -> None:
    """Write the sums to `out` [N, D], finished.

    Args:
        out: Each row contiguous; float32 if there is more to do than to sum.
        values: [E], in the segments' order.
        segments: Of the entries; those past the last end belong to no latent.
        rows: [B, D].
        bias: float32 [N], to which each latent's values are added.
        finish: With this or a bias, D is at most `fused_ops.WIDEST`. Its directions' rows are as far apart
            as those of `out`.
    """
    latents, width = out.shape
    finish = finish or Finish()
    if not out.numel():
        return
    block = block_of(width, LARGEST_BLOCK)
    across = cdiv(width, block)
    size = chunk_size(len(values), latents)
    values, rows, entry_row = values.contiguous(), rows.contiguous(), segments.row
    at, more = finish.more or (None, None)
    ends = (bias, at, more, finish.directions, finish.squares, width, out.stride(0))
    shape = {"BLOCK_D": block, "num_warps": max(4, block // 512)}
    launch(
        _whole,
        (latents, across),
        values,
        entry_row,
        segments.ends,
        rows,
        out,
        *ends,
        size,
        ADD=finish.add,
        **shape,
    )
    if len(values) <= size:
        return  # no latent can be hot
    counts = segments.ends.diff()
    chunks = torch.where(counts > size, (counts + size - 1).div(size, rounding_mode="floor"), 0)
    first = torch.nn.functional.pad(chunks.cumsum(0), (1, 0))
    # a hot latent of n entries has at most 2 n / size chunks: a bound that needs no number from the GPU, and
    # therefore no wait for it
    most = 2 * len(values) // size
    owner = torch.searchsorted(first[1:], torch.arange(most, device=rows.device), right=True)
    partial = torch.empty(most, width, dtype=torch.float32, device=rows.device)
    weights = torch.empty(most, dtype=torch.float32, device=rows.device)
    launch(
        _chunk,
        (most, across),
        values,
        entry_row,
        segments.ends,
        rows,
        owner,
        first,
        partial,
        weights,
        latents,
        width,
        size,
        **shape,
    )
    launch(_join, (latents, across), first, partial, weights, out, *ends, ADD=finish.add, **shape)


def finish_rows(grad: Tensor, directions: Tensor | None) -> Tensor:
    """Take from each row of grad [N, D] what is parallel to the unit `directions`; the squared norms [N].

    Arguments as for `Finish`; D may be any.
    """
    squares = grad.new_empty(len(grad))
    if grad.numel():
        width = grad.shape[1]
        wide = width > LARGEST_BLOCK
        block = WIDE_TILE if wide else block_of(width, LARGEST_BLOCK)
        shape = {"BLOCK_D": block, "num_warps": max(4, block // 512)}
        launch(_finish_row, (len(grad),), grad, directions, squares, width, WIDE=wide, **shape)
    return squares


@example
def _example(shape: Shape) -> None:
    entries = shape.rows * shape.k
    order, row, latent = (shape.empty(entries, dtype=torch.int64) for _ in range(3))
    segments = Segments(order, row, latent, shape.empty(shape.latents + 1, dtype=torch.int64))
    values, rows = shape.empty(entries, dtype=torch.float32), shape.empty(shape.rows, shape.width)
    # one of twelve targets, and whole rows of them
    wide = shape.empty(shape.latents, 12 * shape.width, dtype=torch.float32)
    add_sums(wide[:, shape.width : 2 * shape.width], values, segments, rows, finish=Finish(add=True))
    finish_rows(wide, wide)
    segment_sums(values, segments, rows, torch.float32)
    grad, directions = (shape.empty(shape.latents, shape.width, dtype=torch.float32) for _ in range(2))
    bias, squares = (shape.empty(shape.latents, dtype=torch.float32) for _ in range(2))
    dead = shape.empty(shape.latents, dtype=torch.int32), shape.empty(64, shape.width, dtype=torch.float32)
    finish = Finish(add=True, more=dead, directions=directions, squares=squares)
    add_sums(grad, values, segments, rows, bias=bias, finish=finish)
    finish_rows(grad, directions)
