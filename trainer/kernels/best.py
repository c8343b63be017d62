"""The best k of each row of a matrix seen one block of columns at a time, exactly, ties included.

Legend: R rows, C columns of a block, k kept per row, H hits.

The order is value descending, then column ascending; NaN counts as the largest number, as in torch.
The k-th best of any part of a row is a lower bound (tau) for the k-th best of the whole, so of every
block only what reaches tau is considered: a comparison, a scan for hits eight at a time, and a top-k
over the few that remain.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SPARSE_BLOCK = 16
"""Columns per kept entry from which a first block is filtered before its top-k."""
_HITS_PER_KEPT = 8
"""A block with more hits per kept entry is sorted whole, because tau did not filter it."""
_NO_HITS = 0x0101010101010101  # eight times True, as one integer
_LAST = 2**63 - 1


class Best:
    """The running best k of each of R rows.

    Args:
        k: Entries kept per row; the caller feeds at least that many columns in all.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.values: Tensor | None = None
        """[R, min(k, columns so far)], unordered."""
        self.ids = torch.empty(0, dtype=torch.int64)
        """int64, of the shape of `values`."""

    def feed(self, z: Tensor, first: int) -> None:
        """Take in a contiguous block [R, C] whose columns are first, first + 1, ...

        Blocks come in ascending order of columns.
        """
        if self.values is None or self.values.shape[1] < self.k:
            # no tau yet: group maxima give one, which costs less than the top-k over the block that it saves
            wide = z.shape[1] >= _SPARSE_BLOCK * self.k
            found = self._hits(z, first, _lower_bound(z, self.k), strict=False) if wide else None
        else:
            # strict: a later column that only equals tau loses to the k earlier ones
            found = self._hits(z, first, self.values.amin(1), strict=True)
        # the filter did not pay (columns that rise make every block better than the last): sort it whole
        if found is None:
            values, at = best(z, min(self.k, z.shape[1]))
            found = values, at + first
        self._merge(*found)

    def codes(self) -> tuple[Tensor, Tensor]:
        """The best so far, unordered: values [R, k], and their columns int64 [R, k]."""
        assert self.values is not None, "nothing was fed"
        return self.values, self.ids

    def ordered(self) -> tuple[Tensor, Tensor]:
        """Values [R, k] descending, and their columns int64 [R, k], ascending among equals."""
        values, ids = self.codes()
        values, at = values.sort(dim=1, descending=True)
        ids = ids.gather(1, at)
        # rows without ties need one sort, not two: only the others are ordered by column as well. NaN equals
        # nothing, so it is asked for by name
        tied = (values[:, 1:] == values[:, :-1]).any(1) | values.isnan().any(1)
        if bool(tied.any()):
            rows = tied.nonzero().flatten()
            values[rows], ids[rows] = sort_pairs(values[rows], ids[rows])
        return values, ids

    def _merge(self, values: Tensor, ids: Tensor) -> None:
        if self.values is not None:
            values, ids = torch.cat([self.values, values], 1), torch.cat([self.ids, ids], 1)
        if values.shape[1] > self.k:
            values, at = best(values, self.k, ids)
            ids = ids.gather(1, at)
        self.values, self.ids = values, ids

    def _hits(self, z: Tensor, first: int, tau: Tensor, *, strict: bool) -> tuple[Tensor, Tensor] | None:
        """What reaches tau [R], packed to the left and padded with -inf; None if that is too much."""
        # the comparison and the scan for hits are what selection costs, not the sorting (docs/kernels.md), so
        # the scan reads the mask eight bytes at a time
        rows, columns = z.shape
        size = rows * columns
        mask = torch.empty(-(-size // 8) * 8, dtype=torch.bool)
        mask[size:] = True
        # compares what is *below*, so that NaN, for which every comparison is false, is a hit
        (torch.le if strict else torch.lt)(z, tau[:, None], out=mask[:size].view(rows, columns))
        words = mask.view(torch.int64).ne(_NO_HITS).nonzero().flatten()
        limit = _HITS_PER_KEPT * self.k + 8
        # on words first: a block that tau does not filter would otherwise list most of its entries below
        if len(words) > rows * limit:
            return None
        hit = mask.view(-1, 8).index_select(0, words).logical_not_().flatten().nonzero().flatten()
        at = words.index_select(0, hit >> 3).mul_(8).add_(hit.bitwise_and_(7))
        row = at.div(columns, rounding_mode="floor")
        counts = torch.bincount(row, minlength=rows)
        width = int(counts.max()) if rows else 0
        if width > limit:
            return None
        before = torch.arange(rows).mul_(width) - (counts.cumsum(0) - counts)
        slot = torch.arange(len(at)).add_(before.index_select(0, row))
        values = z.new_full((rows, width), -torch.inf)
        # padding gets the last id of all, so that a real -inf goes before it
        ids = torch.full((rows, width), _LAST)
        values.view(-1)[slot] = z.view(-1).index_select(0, at)
        ids.view(-1)[slot] = at.sub_(row.mul_(columns)).add_(first)
        return values, ids


def _lower_bound(z: Tensor, k: int) -> Tensor:
    """A value [R] that at least k entries of each row of z [R, C] reach, C >= 2k."""
    # the k-th best of the maxima of about 2k groups: each of the k best groups holds an entry that reaches it
    size = max(1, z.shape[1] // (2 * k))
    groups = z.shape[1] // size
    maxima = z[:, : size * groups].unflatten(1, (size, groups)).amax(1)
    return maxima.topk(k, dim=1, sorted=False).values.amin(1)


def best(values: Tensor, k: int, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best k of each row of values [R, C], unordered, and their positions int64 [R, k].

    Args:
        values: [R, C], C >= k.
        k: Entries kept per row.
        ids: int64 [R, C]: among equal values the lower id wins; None takes the position.
    """
    kept, at = values.topk(k, dim=1, sorted=False)
    if k == 0:
        return kept, at
    # torch may choose any of the equals at the edge: such rows (and those with NaN) are redone in full order
    doubtful = (values >= kept.amin(1, keepdim=True)).sum(1, dtype=torch.int32) != k
    if bool(doubtful.any()):
        # 64 rows at a time, which bounds the sorted copies (value, position of every column) if all rows tie
        for rows in doubtful.nonzero().flatten().split(64):
            part = values[rows]
            place = torch.arange(values.shape[1], device=values.device).expand_as(part)
            order = place if ids is None else ids[rows].argsort(dim=1)
            by_value = part.gather(1, order).sort(dim=1, descending=True, stable=True)
            kept[rows] = by_value.values[:, :k]
            at[rows] = order.gather(1, by_value.indices[:, :k])
    return kept, at


def sort_pairs(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sort rows [R, k] by value descending, then id ascending."""
    # by the second key first: the stable sort by value keeps that order among equals
    ids, by_id = ids.sort(dim=1)
    values, by_value = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, by_value)
