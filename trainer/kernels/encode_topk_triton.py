"""`encode_topk` on a GPU by seed and sweep.

Seed: the exact k-th best of the first N/16 columns, tau, is a lower bound for the k-th best of all. Sweep:
one pass of products keeps what reaches tau, about 16 k per row, in slots per row and stripe of columns,
placed by prefix sums: no atomics, and never [B, N]. A top-k over the slots follows. A row that overflows a
stripe's slots, or has fewer than k because seed and sweep round differently, is redone by `exact` and
counted.

Legend: B rows, D width, N latents, K kept per row, S stripes of columns, C slots of a stripe.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.trainer.kernels.best import best, sort_pairs
from winnow.trainer.kernels.cost import Cost, Given, cost_of, size_of
from winnow.trainer.kernels.reference import accumulator
from winnow.trainer.kernels.support_triton import cdiv, interpreted, launch, power_of_two

# compiled for sm_90 in bfloat16, the sweep of these blocks takes 255 registers and spills 1,424 bytes (one
# block per SM); with 64 columns it does not spill (228 registers), but there are twice as many blocks
ROWS, COLUMNS, DEPTH = 128, 128, 32
"""Block of one product."""
STRIPE = 8
"""Blocks of columns that one program sweeps."""
SEED_SHARE = 16
SEED_PER_KEPT = 8
"""The seed is N / SEED_SHARE columns, and at least this many per latent kept."""
SLOT_BYTES = 1 << 28
"""Bytes of slots held at a time; rows are swept in chunks of that size."""
EXACT_COLUMNS = 8192
EXACT_ROWS = 2048


class Counted(NamedTuple):
    """Codes, and the number of rows that had to be redone."""

    values: Tensor
    indices: Tensor
    redone: int


@triton.jit
def _sweep(
    x,
    W_enc,
    b,
    tau,
    values,
    ids,
    counts,
    B,
    N,
    D,
    stripes,
    SLOTS: tl.constexpr,
    STRIPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    stripe = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    threshold = tl.load(tau + row, mask=row < B, other=float("inf"))
    found = tl.zeros([ROWS], dtype=tl.int32)
    # every row has its own slots in every stripe, so programs never share one: no atomics, a fixed order
    home = (row.to(tl.int64) * stripes + stripe) * SLOTS
    for block in range(STRIPE):
        column = (stripe * STRIPE + block) * COLUMNS + tl.arange(0, COLUMNS)
        z = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for left in range(0, D, DEPTH):
            d = left + tl.arange(0, DEPTH)
            x_inside = (row < B)[:, None] & (d < D)[None, :]
            W_inside = (column < N)[None, :] & (d < D)[:, None]
            x_part = tl.load(x + row.to(tl.int64)[:, None] * D + d[None, :], mask=x_inside, other=0.0)
            W_part = tl.load(W_enc + column.to(tl.int64)[None, :] * D + d[:, None], mask=W_inside, other=0.0)
            if WIDEN:  # the interpreter has no bfloat16 to multiply in
                x_part = x_part.to(tl.float32)
                W_part = W_part.to(tl.float32)
            # "ieee": float32 operands are multiplied in float32, not silently in TF32
            z = tl.dot(x_part, W_part, z, input_precision="ieee")
        z += tl.load(b + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        inside = (row < B)[:, None] & (column < N)[None, :]
        # not "at least tau": for NaN every comparison is false, and NaN must be seen
        hit = ((z < threshold[:, None]) == 0) & inside
        one = hit.to(tl.int32)
        slot = found[:, None] + tl.cumsum(one, axis=1) - one
        keep = hit & (slot < SLOTS)
        tl.store(values + home[:, None] + slot, z, mask=keep)
        tl.store(ids + home[:, None] + slot, column[None, :] + tl.zeros_like(slot), mask=keep)
        found += tl.sum(one, axis=1)
    # also the hits beyond the slots: a count above SLOTS is how the host learns of an overflow
    tl.store(counts + row.to(tl.int64) * stripes + stripe, found, mask=row < B)


@cost_of("_sweep")
def _sweep_cost(given: Given) -> Cost:
    rows, latents, width = given["B"], given["N"], given["D"]
    read = (rows + latents) * width * given["x"].element_size() + latents * given["b"].element_size()
    # SEED_SHARE * k entries of a row reach tau, if the first latents are like the others: about 12 % of the
    # slots, which are of size `expected + 6 sigma`, rounded up to a power of two
    written = size_of(given["values"]) + size_of(given["ids"])
    return Cost(2.0 * rows * latents * width, read + written // 8 + size_of(given["counts"]))


def encode_topk(x: Tensor, W_enc: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `winnow.trainer.kernels.encode_topk`."""
    found = encode_topk_counted(x, W_enc, b, k)
    return found.values, found.indices


@torch.no_grad()
def encode_topk_counted(x: Tensor, W_enc: Tensor, b: Tensor, k: int) -> Counted:
    """`encode_topk`, with the number of rows that were redone.

    float64, and dictionaries too small for a seed, are not swept but left to `exact`.
    """
    latents = len(W_enc)
    seed = max(-(-latents // SEED_SHARE), SEED_PER_KEPT * k)
    if x.dtype == torch.float64 or 2 * seed > latents or not k or not x.numel():
        return Counted(*exact(x, W_enc, b, k), 0)
    x, W_enc, b = x.contiguous(), W_enc.contiguous(), b.contiguous()
    stripes, slots = cdiv(latents, STRIPE * COLUMNS), _slots(latents, seed, k)
    chunk = max(ROWS, SLOT_BYTES // (8 * stripes * slots) // ROWS * ROWS)
    parts = [_swept(part, W_enc, b, k, seed, stripes, slots) for part in x.split(chunk)]
    if len(parts) == 1:
        return parts[0]
    values = torch.cat([part.values for part in parts])
    indices = torch.cat([part.indices for part in parts])
    return Counted(values, indices, sum(part.redone for part in parts))


def _slots(latents: int, seed: int, k: int) -> int:
    """Slots of a stripe: the expected number of hits and six standard deviations."""
    # expected if active latents are spread evenly. Simulated with N = 131,072 and K = 64: a prefix of 1,024
    # latents with 17 of the 64 overflows in every row, one with 5 in 27 % of them, a random order in none
    expected = k * latents / seed * min(1.0, STRIPE * COLUMNS / latents)
    return power_of_two(math.ceil(expected + 6 * math.sqrt(expected) + 4))


def _swept(x: Tensor, W_enc: Tensor, b: Tensor, k: int, seed: int, stripes: int, slots: int) -> Counted:
    rows, device = len(x), x.device
    pilot = torch.addmm(b[:seed].to(x.dtype), x, W_enc[:seed].T).float()
    tau = pilot.topk(k, dim=1, sorted=False).values.amin(1)
    # the pilot is rounded to x's type, the sweep is not: a little lower, or the sweep would miss the k-th
    tau -= 4 * torch.finfo(x.dtype).eps * tau.abs()
    # freed before the slots are made (268 MB for 8,192 rows at N = 131,072)
    del pilot
    values = torch.full((rows, stripes * slots), -torch.inf, device=device)
    ids = torch.zeros(rows, stripes * slots, dtype=torch.int32, device=device)
    counts = torch.empty(rows, stripes, dtype=torch.int32, device=device)
    launch(
        _sweep,
        (cdiv(rows, ROWS), stripes),
        x,
        W_enc,
        b,
        tau,
        values,
        ids,
        counts,
        rows,
        len(W_enc),
        x.shape[1],
        stripes,
        SLOTS=slots,
        STRIPE=STRIPE,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        WIDEN=interpreted(),
        num_warps=8,
    )
    # slots are in the order of their columns, so among equals the earlier position is the lower latent
    kept, at = best(values, k)
    kept, indices = sort_pairs(kept, ids.gather(1, at).long())
    # too many hits for a stripe's slots, or too few in all (tau was too high by a rounding)
    again = ((counts > slots).any(1) | (counts.sum(1) < k)).nonzero().flatten()
    if len(again):
        kept[again], indices[again] = exact(x[again], W_enc, b, k)
    return Counted(kept, indices, len(again))


def exact(x: Tensor, W_enc: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`encode_topk` by the library's product in tiles, each followed by its own top-k."""
    kind = accumulator(x.dtype)
    values = torch.empty(len(x), k, dtype=kind, device=x.device)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    for top in range(0, len(x), EXACT_ROWS):
        rows = x[top : top + EXACT_ROWS].to(kind)
        kept = values.new_empty(len(rows), 0)
        ids = indices.new_empty(len(rows), 0)
        for left in range(0, len(W_enc), EXACT_COLUMNS):
            columns = slice(left, left + EXACT_COLUMNS)
            z = torch.addmm(b[columns].to(kind), rows, W_enc[columns].to(kind).T)
            found, at = best(z, min(k, z.shape[1]))
            kept, ids = torch.cat([kept, found], 1), torch.cat([ids, at + left], 1)
            if kept.shape[1] > k:
                kept, at = best(kept, k, ids)
                ids = ids.gather(1, at)
        values[top : top + EXACT_ROWS], indices[top : top + EXACT_ROWS] = sort_pairs(kept, ids)
    return values, indices
