"""The quota-th best number of each group over all ranks, exactly: the edge of BatchTopK's selection.

Legend: E entries of this rank, G groups.

No value is sent. The bits of a positive number, read as an integer, have the order of the numbers, so the
quota-th best of a group is found digit by digit from the top: every rank counts its own entries in
2^DIGIT_BITS buckets, the counts are summed, and every rank sees in which bucket the quota ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.trainer.mesh.world import Axis

# 31 bits are then three rounds in float32, whatever B, k and N
DIGIT_BITS = 11
"""Bits settled by one round: 8 KiB of counts per group."""


class Edge(NamedTuple):
    """Where a group's quota ends."""

    bits: Tensor
    """int64 [G]: the last value taken, as an integer; see `order_bits`."""
    ties: Tensor
    """int64 [G]: entries of that value, on all ranks."""
    room: Tensor
    """int64 [G]: how many of them are taken."""


def order_bits(values: Tensor) -> Tensor:
    """int64 of the order of values at least 0; NaN is the largest."""
    # without the sign bit, as that of -0.0 or of a NaN would turn the order around
    return values.abs().view(_integers(values.dtype)).to(torch.int64)


def _integers(kind: torch.dtype) -> torch.dtype:
    return {4: torch.int32, 8: torch.int64}[kind.itemsize]


def digits(kind: torch.dtype) -> list[tuple[int, int]]:
    """(first bit, number of bits) of each digit of `order_bits`, from the top."""
    # without the sign
    bits = torch.finfo(kind).bits - 1
    return [(max(0, top - DIGIT_BITS), min(top, DIGIT_BITS)) for top in range(bits, 0, -DIGIT_BITS)]


def edge_of(values: Tensor, group: Tensor, quotas: Tensor, add: Callable[[Tensor], Tensor]) -> Edge:
    """The quota-th best of each group, among the entries of all ranks; the least one if there are fewer.

    Args:
        values: [E], above 0 or NaN.
        group: int64 [E].
        quotas: int64 [G].
        add: Sums a tensor over the ranks, all of which call this.
    """
    bits = order_bits(values)
    count = len(quotas)
    found, left, ties = torch.zeros_like(quotas), quotas, torch.zeros_like(quotas)
    for first, size in digits(values.dtype):
        digit = (bits >> first) & ((1 << size) - 1)
        counts = torch.bincount((group << size) + digit, minlength=count << size).view(count, -1)
        # int32 halves what is sent; the sums are widened before they are accumulated
        from_top = add(counts.to(torch.int32)).flip(1).long().cumsum(1)
        # a group with fewer entries than its quota ends at its least
        left = left.minimum(from_top[:, -1])
        place = (from_top < left[:, None]).sum(1, keepdim=True)
        before = torch.where(place > 0, from_top.gather(1, (place - 1).clamp_min(0)), 0).squeeze(1)
        ties, left = from_top.gather(1, place).squeeze(1) - before, left - before
        chosen = (1 << size) - 1 - place.squeeze(1)
        found = (found << size) + chosen
        # entries of other buckets are decided: above the edge, or below it
        alive = digit == chosen[group]
        bits, group = bits[alive], group[alive]
    return Edge(found, ties, left)


def nth_best(values: Tensor, rank: int, latent: Axis) -> Tensor:
    """The rank-th best [] (from 1) of values at least 0 of all shards; 0 if fewer are above it."""
    flat = values[values > 0]
    group, quota = torch.zeros_like(flat, dtype=torch.int64), flat.new_tensor([rank], dtype=torch.int64)
    # a sum over shards, so that either all of them return here or none does
    if latent.sum(torch.tensor(len(flat))) < rank:
        return values.new_zeros(())
    edge = edge_of(flat, group, quota, latent.sum)
    return edge.bits.to(_integers(values.dtype)).view(values.dtype)[0]
