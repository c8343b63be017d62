"""Which latents are kept: of each row the best k, or of whole groups of rows the best k per row.

Legend: B rows of this rank, w candidates per row, G groups of rows, S shards, k kept per row, N latents,
n of this shard.

Both choices are exact. If this rank has all latents and all rows of a group, it selects alone (`best_of_rows`
slices, `LocalGroups`); otherwise the ranks select together (`mesh.topk`, `JoinedGroups`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.sae.codes import best_of_groups
from winnow.trainer.kernels.step_ops import StepOps
from winnow.trainer.mesh.edge import edge_of, order_bits
from winnow.trainer.mesh.topk import Codes, count_kept, keep
from winnow.trainer.mesh.world import Axis, World

BATCH_CANDIDATES = 4
"""Candidates per row that BatchTopK considers first, as a multiple of K; rows that need more get more."""


class Chosen(NamedTuple):
    """This shard's codes, and rows of this rank that took a second round."""

    codes: Codes
    second_rounds: int


def best_of_rows(found: Codes, k: int, available: list[int], latent: Axis) -> Chosen:
    """The best k of each row over all shards, negatives cut to 0.

    Args:
        found: This shard's best [B, m], by (value descending, latent ascending); cut in place.
        k: Kept per row.
        available: m of each shard.
        latent: The latent axis.
    """
    if latent.size == 1:
        # Multi-TopK gives 4k candidates, of which the slice would keep the strides
        return Chosen(Codes(found.values[:, :k].relu_().contiguous(), found.indices[:, :k].contiguous()), 0)
    values = found.values[:, :k]
    counts = count_kept(values, k, available, latent)
    return Chosen(keep(values, found.indices, counts.kept), counts.second_rounds)


class Groups(Protocol):
    """Groups of rows in which the best k per row are selected."""

    def taken(self, values: Tensor) -> Tensor:
        """How many int64 [B] of each row's first candidates [B, w], descending, are taken; all above 0."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether it is set for any rank that shares these groups."""
        ...


class Candidates(NamedTuple):
    """The best latents of each row of one dictionary, and what they are codes of."""

    found: Codes
    """In order [B, w]."""
    centred: Tensor
    """[B, D]."""
    W_enc: Tensor
    """[n, D]."""
    b_enc: Tensor

    @property
    def narrow(self) -> bool:
        """Whether there are latents that are no candidates."""
        return self.found.values.shape[1] < len(self.W_enc)

    def wider(self, ops: StepOps, rows: Tensor) -> Candidates:
        """With more candidates for some rows [r], four times as many, so that few rounds suffice."""
        (values, indices), width = self.found, self.found.values.shape[1]
        wide = min(4 * width, len(self.W_enc))
        more = ops.encode(self.centred[rows], self.W_enc, self.b_enc, wide, None)
        values = F.pad(values, (0, wide - width)).index_copy_(0, rows, more.values)
        indices = F.pad(indices, (0, wide - width)).index_copy_(0, rows, more.indices)
        return self._replace(found=Codes(values, indices))


def best_of_batch(ops: StepOps, layers: Sequence[Candidates], groups: Groups) -> tuple[list[Codes], int]:
    """The best k per row of each group of rows, from candidates of each row.

    Rows whose candidates are all taken are encoded again with more of them, until no rank has any: exact,
    whatever the rows.

    Args:
        ops: The backend.
        layers: Of one dictionary, or of all layers of a set, whose latents compete: of equal values those
            of the lower layer come first.
        groups: See `groups_of`.

    Returns:
        Padded codes of each layer, at least 0, and the rows that took a second round.
    """
    layers, again = list(layers), 0
    while True:
        taken = _taken_of_layers([layer.found.values for layer in layers], groups)
        # the k-th best of a part is a lower bound for that of the whole, so a row whose last candidate is not
        # taken has no more to give
        full = [
            (count == layer.found.values.shape[1]).nonzero().flatten() if layer.narrow else count[:0]
            for layer, count in zip(layers, taken, strict=True)
        ]
        # the same answer on every rank, since the next round is a collective
        if not groups.any(any(len(rows) for rows in full)):
            codes = [keep(*layer.found, count) for layer, count in zip(layers, taken, strict=True)]
            return codes, again
        again += sum(map(len, full))
        # only the full rows are encoded again
        layers = [
            layer.wider(ops, rows) if len(rows) else layer for layer, rows in zip(layers, full, strict=True)
        ]


def _taken_of_layers(values: list[Tensor], groups: Groups) -> list[Tensor]:
    """How many int64 [B] of each row's first candidates [B, w], descending, are taken, of each layer."""
    if len(values) == 1:
        return [groups.taken(values[0])]
    # stable, so that of each layer's equal values the first are taken: what is taken stays a prefix
    ordered, at = torch.cat(values, 1).sort(dim=1, descending=True, stable=True)
    slot = torch.arange(ordered.shape[1], device=ordered.device)
    chosen = (slot < groups.taken(ordered)[:, None]).to(torch.uint8)
    chosen = torch.zeros_like(chosen).scatter_(1, at, chosen)
    return [part.sum(1) for part in chosen.split([layer.shape[1] for layer in values], 1)]


def groups_of(rows: tuple[int, ...], k: int, count: int, world: World, device: torch.device) -> Groups:
    """The groups that this rank's rows are in.

    Args:
        rows: This rank's rows in each of its groups; of one group or a part of it if the data axis is
            longer than `count`.
        k: Kept per row on average.
        count: Groups of the whole batch.
        world: The mesh.
        device: Where the rows are.
    """
    if world.latent.size == 1 and count >= world.data.size:
        return LocalGroups(rows, k)
    return JoinedGroups.of(rows, k, count, world, device)


class LocalGroups(NamedTuple):
    """Groups whose rows and latents are all on this rank."""

    rows: tuple[int, ...]
    k: int

    def taken(self, values: Tensor) -> Tensor:
        """See `Groups.taken`."""
        # alone a top-k is cheaper than the digit counts of `edge_of`
        return (best_of_groups(values, self.k, self.rows) > 0).sum(1)

    def any(self, flag: bool) -> bool:
        """See `Groups.any`."""
        return flag


class JoinedGroups(NamedTuple):
    """The groups that this rank's rows are in, and who else has rows or latents of them.

    The order is that of one process: value descending, then row, then latent.
    """

    of_row: Tensor
    """int64 [B], ascending."""
    quotas: Tensor
    """int64 [G]: entries kept of each."""
    latent: Axis
    data: Axis
    """Of one rank if no group has rows on several."""

    @classmethod
    def of(
        cls, rows: tuple[int, ...], k: int, count: int, world: World, device: torch.device
    ) -> JoinedGroups:
        """The groups of a batch.

        Args:
            rows: This rank's rows in each of its groups; of one group or a part of it if the data axis
                is longer than `count`.
            k: Kept per row on average.
            count: Groups of the whole batch.
            world: The mesh.
            device: Where the rows are.
        """
        sizes, data = torch.tensor(rows, device=device), Axis()
        if count < world.data.size:
            data, shared = world.data, sizes
            sizes = shared.new_zeros(count)
            # consecutive ranks share a group, as consecutive lanes do
            sizes[data.rank * count // data.size] = shared[0]
        of_row = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
        return cls(of_row, k * data.sum(sizes.clone()), world.latent, data)

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over everybody who shares these groups, in place."""
        return self.data.sum(self.latent.sum(tensor))

    def any(self, flag: bool) -> bool:
        """Whether it is set for any of them."""
        # one axis after the other reaches all ranks that share the groups
        told = torch.tensor(flag, dtype=torch.uint8)
        return bool(self.data.largest(self.latent.largest(told)))

    def taken(self, values: Tensor) -> Tensor:
        """How many int64 [B] of each row's first candidates [B, w], descending, are taken; all above 0."""
        # not `values > 0`: NaN counts as largest, as in torch, and so reaches the loss and stops the run
        there = ~(values <= 0)
        group = self.of_row[:, None].expand_as(there)
        edge = edge_of(values[there], group[there], self.quotas, self.add)
        # -1 is below every edge, so what is not above 0 is never taken
        bits = torch.where(there, order_bits(values), -1)
        at = edge.bits[self.of_row][:, None]
        above, tied = (bits > at).sum(1), (bits == at).sum(1)
        if bool((edge.ties > edge.room).any()):
            # only then do shards exchange counts per row: the edge alone settles all other groups
            tied = self._first(tied, edge.room)
        return above + tied

    def _first(self, tied: Tensor, room: Tensor) -> Tensor:
        """How many [B] of `tied` [B] entries of each row have room [G], by row, then by latent."""
        shards = self.latent.gather(tied)
        rows = shards.sum(0)
        own = torch.zeros_like(room).index_add_(0, self.of_row, rows)
        # ranks hold ascending rows, so the entries of earlier ranks come first
        before = self.data.gather(own)[: self.data.rank].sum(0)
        starts = own.cumsum(0) - own  # of each group among this rank's entries
        # and shards ascending latents, so of one row the entries of earlier shards come first
        earlier = rows.cumsum(0) - rows + (before - starts)[self.of_row] + shards[: self.latent.rank].sum(0)
        return (room[self.of_row] - earlier).clamp_min(0).minimum(tied)
