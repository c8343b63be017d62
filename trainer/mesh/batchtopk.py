"""The best entries of whole groups of rows over all shards and ranks, exactly: BatchTopK's selection.

Legend: B rows of this rank, w candidates of each, G groups of rows, S shards, P ranks of the data axis,
k kept a row on average, n latents of this shard.

No value travels. The bits of a positive number, read as an integer, stand in the order of the numbers, so
the quota-th best of a group is found digit by digit from the top: every rank counts its own entries in
2^DIGIT_BITS buckets, the counts are summed, and all see alike in which bucket the quota ends. That takes 3
rounds in float32, whatever B, k and N. The order is that of one process: value descending, then row, then
latent; where more entries equal the edge than there is room for, the shards also tell how many each row has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.trainer.kernels.step_ops import StepOps
from winnow.trainer.mesh.topk import Codes, keep
from winnow.trainer.mesh.world import Axis, World

DIGIT_BITS = 11
"""Bits settled by one round: 8 KiB of counts a group."""


class Edge(NamedTuple):
    """Where a group's quota ends."""

    bits: Tensor
    """int64 [G]: the last value taken, as an integer; see `order_bits`."""
    ties: Tensor
    """int64 [G]: entries of that value, on all ranks."""
    room: Tensor
    """int64 [G]: how many of them are taken."""


class Groups(NamedTuple):
    """The groups that this rank's rows are in, and who else has rows or latents of them."""

    of_row: Tensor
    """int64 [B], ascending."""
    quotas: Tensor
    """int64 [G]: entries kept of each."""
    latent: Axis
    data: Axis
    """Alone where no group has rows on several ranks."""

    @classmethod
    def of(cls, rows: tuple[int, ...], k: int, count: int, world: World, device: torch.device) -> Groups:
        """The groups of a batch.

        Args:
            rows: This rank's rows in each of its groups; of one group or a part of it where the data axis
                is longer than `count`.
            k: Kept a row on average.
            count: Groups of the whole batch.
            world: The mesh.
            device: Where the rows are.
        """
        sizes, data = torch.tensor(rows, device=device), Axis()
        if count < world.data.size:
            data, shared = world.data, sizes
            sizes = shared.new_zeros(count)
            sizes[data.rank * count // data.size] = shared[0]
        of_row = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
        return cls(of_row, k * data.sum(sizes.clone()), world.latent, data)

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over everybody who shares these groups, in place."""
        return self.data.sum(self.latent.sum(tensor))

    def any(self, flag: bool) -> bool:
        """Whether it is set for any of them."""
        told = torch.tensor(flag, dtype=torch.uint8)
        return bool(self.data.largest(self.latent.largest(told)))

    def taken(self, values: Tensor) -> Tensor:
        """How many int64 [B] of each row's first candidates [B, w], descending, are taken; all above 0."""
        there = ~(values <= 0)
        group = self.of_row[:, None].expand_as(there)
        edge = edge_of(values[there], group[there], self.quotas, self.add)
        bits = torch.where(there, order_bits(values), -1)
        at = edge.bits[self.of_row][:, None]
        above, tied = (bits > at).sum(1), (bits == at).sum(1)
        if bool((edge.ties > edge.room).any()):
            tied = self._first(tied, edge.room)
        return above + tied

    def _first(self, tied: Tensor, room: Tensor) -> Tensor:
        """How many [B] of `tied` [B] entries of each row have room [G], by row, then by latent."""
        shards = self.latent.gather(tied)
        rows = shards.sum(0)
        own = torch.zeros_like(room).index_add_(0, self.of_row, rows)
        before = self.data.gather(own)[: self.data.rank].sum(0)  # ranks hold ascending rows
        starts = own.cumsum(0) - own  # of each group among this rank's entries
        earlier = rows.cumsum(0) - rows + (before - starts)[self.of_row] + shards[: self.latent.rank].sum(0)
        return (room[self.of_row] - earlier).clamp_min(0).minimum(tied)


def order_bits(values: Tensor) -> Tensor:
    """int64 of the order of values at least 0; NaN is the largest."""
    return values.abs().view(_integers(values.dtype)).to(torch.int64)


def _integers(kind: torch.dtype) -> torch.dtype:
    return {4: torch.int32, 8: torch.int64}[kind.itemsize]


def digits(kind: torch.dtype) -> list[tuple[int, int]]:
    """(first bit, number of bits) of each digit of `order_bits`, from the top."""
    bits = torch.finfo(kind).bits - 1
    return [(max(0, top - DIGIT_BITS), min(top, DIGIT_BITS)) for top in range(bits, 0, -DIGIT_BITS)]


def edge_of(values: Tensor, group: Tensor, quotas: Tensor, add: Callable[[Tensor], Tensor]) -> Edge:
    """The quota-th best of each group, among what all ranks have; the least where there are fewer.

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
        from_top = add(counts.to(torch.int32)).flip(1).long().cumsum(1)
        left = left.minimum(from_top[:, -1])
        place = (from_top < left[:, None]).sum(1, keepdim=True)
        before = torch.where(place > 0, from_top.gather(1, (place - 1).clamp_min(0)), 0).squeeze(1)
        ties, left = from_top.gather(1, place).squeeze(1) - before, left - before
        chosen = (1 << size) - 1 - place.squeeze(1)
        found = (found << size) + chosen
        alive = digit == chosen[group]
        bits, group = bits[alive], group[alive]
    return Edge(found, ties, left)


def best_of_groups(
    ops: StepOps, best: Codes, centred: Tensor, W_enc: Tensor, b_enc: Tensor, groups: Groups
) -> tuple[Codes, int]:
    """This shard's part of `codes.best_of_groups`, and how many rows needed more than their candidates.

    A row whose last candidate is not taken has no more to give. The others are encoded again with four
    times the candidates, until that holds on every rank: exact, whatever the rows.

    Args:
        ops: The backend.
        best: The best w latents of each row, in order.
        centred: What they are codes of [B, D].
        W_enc: [n, D].
        b_enc: [n].
        groups: See `Groups.of`.
    """
    (values, indices), latents, again = best, len(W_enc), 0
    while True:
        taken, width = groups.taken(values), values.shape[1]
        full = (taken == width).nonzero().flatten() if width < latents else taken[:0]
        if not groups.any(len(full) > 0):
            return keep(values, indices, taken), again
        if len(full):
            again += len(full)
            wider = min(4 * width, latents)
            more = ops.encode(centred[full], W_enc, b_enc, wider, None)
            values = _widen(values, wider).index_copy_(0, full, more.values)
            indices = _widen(indices, wider).index_copy_(0, full, more.indices)


def nth_best(values: Tensor, rank: int, latent: Axis) -> Tensor:
    """The rank-th best [] (from 1) of values at least 0 of all shards; 0 where not so many are above it."""
    flat = values[values > 0]
    group, quota = torch.zeros_like(flat, dtype=torch.int64), flat.new_tensor([rank], dtype=torch.int64)
    if latent.sum(torch.tensor(len(flat))) < rank:
        return values.new_zeros(())
    edge = edge_of(flat, group, quota, latent.sum)
    return edge.bits.to(_integers(values.dtype)).view(values.dtype)[0]


def _widen(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))
