"""`segment_grad` on a GPU: sums over sorted entries, without atomics.

A latent with up to CHUNK entries is summed by one program per block of D. A hot one is split into chunks of
CHUNK entries, whose partial sums another program adds in order: the load is even, and the bits are the same
every run.

Legend: B rows, D width, N latents, E entries (B*K), H chunks of hot latents.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.trainer.kernels.cost import Cost, Given, cost_of, size_of
from winnow.trainer.kernels.segment_grad import Segments
from winnow.trainer.kernels.support_triton import block_of, cdiv, launch

LARGEST_BLOCK = 1024
CHUNK = 128


@triton.jit
def _sum_entries(values, row, rows, low, high, d, D, BLOCK_D: tl.constexpr):
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for entry in range(low, high):
        value = tl.load(values + entry).to(tl.float32)
        data = tl.load(rows + tl.load(row + entry) * D + d, mask=d < D, other=0.0)
        total += value * data.to(tl.float32)
    return total


@triton.jit
def _whole(values, row, ends, rows, out, D, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr):
    latent = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    low = tl.load(ends + latent)
    high = tl.load(ends + latent + 1)
    # a hot latent would keep one program busy long after all others: `_chunk` and `_join` do it
    if high - low <= CHUNK:
        total = _sum_entries(values, row, rows, low, high, d, D, BLOCK_D)
        tl.store(out + latent * D + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _chunk(
    values, row, ends, rows, latents, first, partial, N, D, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr
):
    chunk = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    latent = tl.load(latents + chunk)
    # the grid is an upper bound: programs past the last chunk find no owner
    if latent < N:
        low = tl.load(ends + latent) + (chunk - tl.load(first + latent)) * CHUNK
        high = tl.minimum(low + CHUNK, tl.load(ends + latent + 1))
        total = _sum_entries(values, row, rows, low, high, d, D, BLOCK_D)
        # in float32 whatever the rows are: a partial sum is not rounded before it is added
        tl.store(partial + chunk * D + d, total, mask=d < D)


@triton.jit
def _join(first, partial, out, D, BLOCK_D: tl.constexpr):
    latent = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    low = tl.load(first + latent)
    high = tl.load(first + latent + 1)
    if low < high:
        total = tl.zeros([BLOCK_D], dtype=tl.float32)
        for chunk in range(low, high):
            total += tl.load(partial + chunk * D + d, mask=d < D, other=0.0)
        tl.store(out + latent * D + d, total.to(out.dtype.element_ty), mask=d < D)


@cost_of("_whole")
def _whole_cost(given: Given) -> Cost:
    ends, values = given["ends"], given["values"]
    # `ends` is a slice of those of all latents, whose number only its storage tells
    of_all = max(1, ends.untyped_storage().nbytes() // ends.element_size() - 1)
    # as many entries as fall to the slice if latents are equally active
    entries = len(values) * (len(ends) - 1) // of_all
    row = given["D"] * given["rows"].element_size()
    read = entries * (values.element_size() + given["row"].element_size())
    return Cost(streamed=read + size_of(ends) + size_of(given["out"]), gathered=entries * row)


@cost_of("_chunk")
def _chunk_cost(given: Given) -> Cost:
    # no latent is hot in a usual step: programs find no owner
    return Cost(streamed=size_of(given["latents"]))


@cost_of("_join")
def _join_cost(given: Given) -> Cost:
    return Cost(streamed=size_of(given["first"]))


def segment_sums(
    values: Tensor, segments: Segments, rows: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Sums [N, D] of type `dtype` (None takes rows'), from values [E] in the segments' order."""
    latents, width = len(segments.ends) - 1, rows.shape[1]
    out = rows.new_empty(latents, width, dtype=dtype or rows.dtype)
    if not out.numel():
        return out
    block = block_of(width, LARGEST_BLOCK)
    across = cdiv(width, block)
    values, rows, entry_row = values.contiguous(), rows.contiguous(), segments.row
    launch(
        _whole,
        (latents, across),
        values,
        entry_row,
        segments.ends,
        rows,
        out,
        width,
        CHUNK=CHUNK,
        BLOCK_D=block,
    )
    if len(values) <= CHUNK:
        return out  # no latent can be hot
    counts = segments.ends.diff()
    chunks = torch.where(counts > CHUNK, (counts + CHUNK - 1).div(CHUNK, rounding_mode="floor"), 0)
    first = torch.nn.functional.pad(chunks.cumsum(0), (1, 0))
    # a hot latent of n entries has at most 2 n / CHUNK chunks: a bound that needs no number from the GPU, and
    # therefore no wait for it
    most = 2 * len(values) // CHUNK
    owner = torch.searchsorted(first[1:], torch.arange(most, device=rows.device), right=True)
    partial = torch.empty(most, width, dtype=torch.float32, device=rows.device)
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
        latents,
        width,
        CHUNK=CHUNK,
        BLOCK_D=block,
    )
    launch(_join, (latents, across), first, partial, out, width, BLOCK_D=block)
    return out
