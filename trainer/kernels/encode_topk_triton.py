"""`encode_topk` on a GPU: sweep, select, finish, order.

Sweep: one pass of products, of which each group of G columns keeps its largest number, that one's column,
and a bound on its runner-up; never [B, N]. Columns that are wanted beside, all of their numbers, are written
by the way. Select: per row, the k groups with the best maxima. These maxima
are the k best numbers unless a group's runner-up reaches the k-th of them. Finish: such groups are multiplied
again, G columns each, and their numbers merged. Order: value descending, then column ascending. Exact, with
ties and NaN, in whatever order the latents are; no atomics, and nothing that the host waits for.

Which numbers are compared: a group's maximum is always the sweep's. The others of a group that is multiplied
again are the finish's, whose sums may differ in the last bits; they are cut to their group's maximum, so that
none passes the one that the sweep found largest. So no latent is lost or named twice by a rounding.

Legend: R rows of a chunk, B rows, D width, N latents, K kept per row, G columns of a group.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.trainer.kernels.best import best, sort_pairs
from winnow.trainer.kernels.cost import Cost, cost_of
from winnow.trainer.kernels.encode_topk import Wanted, places_of
from winnow.trainer.kernels.examples import Shape, example
from winnow.trainer.kernels.groups import COLUMNS, LARGEST_K, ROWS, chunk_rows, group_size, groups_of
from winnow.trainer.kernels.reference import accumulator
from winnow.trainer.kernels.rounding_triton import narrow
from winnow.trainer.kernels.step_ops import aligned
from winnow.trainer.kernels.support_triton import cdiv, interpreted, launch, power_of_two

DEPTH = 32
PIECE = 8192
"""Most groups among which one program selects; of more the best of each piece are selected from again."""
SMALL_PIECE = 1024
# 16 KiB of float32 spilled 24 bytes on sm_120
MEMBER_BYTES = 8192
"""Bytes of W_enc that the finish reads at a time."""
EXACT_COLUMNS = 8192
EXACT_ROWS = 2048
_LEAST = tl.constexpr(-(2**31))
_PADDING = tl.constexpr(2**63 - 1)


@triton.jit
def _key(z):
    """An int32 that orders as the float32 does, NaN largest, both zeros equal."""
    bits = tl.where(z == z, z.to(tl.int32, bitcast=True), 0x7FC00000)
    bits = tl.where(z == 0.0, 0, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["R", "N"])
def _sweep(
    x,
    W_enc,
    b,
    row_slack,
    row_norms,
    column_norms,
    column_lost,
    places,
    beside,
    maxima,
    words,
    R,
    N,
    D,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    STEP: tl.constexpr = COLUMNS // GROUP
    # rows run fastest: the programs of one block of W_enc run together, so that it is read once
    row_blocks = tl.cdiv(R, ROWS)
    row_block = tl.program_id(0) % row_blocks
    row = row_block * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) // row_blocks
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    # past the end the last row and column are read again, which needs no mask; 64 bits: row * D passes 2**31
    x_rows = x + tl.minimum(row, R - 1).to(tl.int64)[:, None] * D
    W_rows = W_enc + tl.minimum(column, N - 1).to(tl.int64)[None, :] * D
    z = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for left in range(0, D, DEPTH):
        d = left + tl.arange(0, DEPTH)
        x_part = tl.load(x_rows + d[None, :], mask=(d < D)[None, :], other=0.0)
        W_part = tl.load(W_rows + d[:, None], mask=(d < D)[:, None], other=0.0)
        if WIDEN:  # the interpreter has no bfloat16 to multiply in
            x_part = x_part.to(tl.float32)
            W_part = W_part.to(tl.float32)
        # "ieee": float32 operands are multiplied in float32, not silently in TF32
        z = tl.dot(x_part, W_part, z, input_precision="ieee")
    z += tl.load(b + tl.minimum(column, N - 1)).to(tl.float32)[None, :]
    if row_slack is not None:
        at_row, at_column = tl.minimum(row, R - 1), tl.minimum(column, N - 1)
        z += tl.load(row_slack + at_row)[:, None] * tl.load(column_norms + at_column)[None, :]
        z += tl.load(row_norms + at_row)[:, None] * tl.load(column_lost + at_column)[None, :]
    key = tl.where((column < N)[None, :], _key(z), _LEAST)
    # a group's columns are STEP apart, because then a thread holds them all: tensor cores leave a thread with
    # pairs of columns 8 apart, and nothing goes through shared memory
    grouped = tl.reshape(key, [ROWS, GROUP, STEP])
    member = tl.arange(0, GROUP)[None, :, None]
    largest = tl.max(grouped, 1)
    first = tl.min(tl.where(grouped == largest[:, None, :], member, GROUP), 1)
    runner_up = tl.max(tl.where(member == first[:, None, :], _LEAST, grouped), 1)
    at = (
        (row.to(tl.int64) * (tl.cdiv(N, COLUMNS) * STEP))[:, None]
        + block * STEP
        + tl.arange(0, STEP)[None, :]
    )
    inside = (row < R)[:, None]
    tl.store(maxima + at, largest, mask=inside)
    # the member's number replaces the runner-up's last bits; with these set it is the finish's bound
    tl.store(words + at, (runner_up & -GROUP) | first, mask=inside)
    if places is not None:
        # At the end, from the keys, with 32 bits for what is inside a block of rows: 128 registers on sm_90.
        # Of z before it has keys it took 199, with 64 bits 400 bytes were spilled. 0 loses its sign.
        z = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        place = tl.load(places + column, mask=column < N, other=-1)
        of_block = beside + (row_block * ROWS).to(tl.int64) * stride
        there = tl.arange(0, ROWS)[:, None] * stride + place[None, :]
        tl.store(of_block + there, narrow(z, beside.dtype.element_ty), mask=inside & (place >= 0)[None, :])


@triton.jit
def _threshold(key, kept, low, high):
    """Per row of keys, a number that exactly `kept` of them reach; if there is none, the kept-th largest."""
    while tl.max((low < high).to(tl.int32), 0) > 0:
        middle = (low | high) - ((low ^ high) >> 1)
        count = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
        # the number before the least is the largest: a row that is done would begin again, and two rows by
        # turns for ever
        below = tl.where(low < high, middle - 1, high)
        low = tl.where(count >= kept, middle, low)
        high = tl.where(count > kept, high, tl.where(count == kept, middle, tl.maximum(below, low)))
    return low


@triton.jit
def _column(place, word, COLUMNS, GROUP):
    """The column of a group's maximum."""
    step = COLUMNS // GROUP
    return place // step * COLUMNS + place % step + (word & (GROUP - 1)) * step


@triton.jit(do_not_specialize=["R", "entries", "width", "pieces", "groups", "kept", "group"])
def _select(
    keys,
    places,
    words,
    out_keys,
    out_places,
    R,
    entries,
    width,
    pieces,
    groups,
    kept,
    group,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    LINES: tl.constexpr,
):
    # a line is a piece of a row
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    row = (line // pieces).to(tl.int64)[:, None]
    at = (line % pieces * width)[:, None] + tl.arange(0, BLOCK)[None, :]
    inside = (row < R) & (tl.arange(0, BLOCK) < width)[None, :] & (at < entries)
    key = tl.load(keys + row * entries + at, mask=inside, other=_LEAST)
    lowest = tl.min(tl.where(inside, key, 0x7FFFFFFF), 1)
    highest = tl.max(key, 1)
    # the kept-th of the maxima of 16 is a lower bound that only a few keys too many reach, so nearly all of
    # the search looks at a sixteenth of the keys
    bound = _threshold(tl.max(tl.reshape(key, [LINES, 16, BLOCK // 16]), 1), kept, lowest, highest)
    threshold = _threshold(key, kept, bound, highest)
    chosen = inside & (key >= threshold[:, None])
    if tl.max(tl.sum(chosen.to(tl.int32), 1), 0) > kept:
        # of equal maxima those of the lowest columns
        above = key > threshold[:, None]
        equal = inside & (key == threshold[:, None])
        place = at
        if not FIRST:
            place = tl.load(places + row * entries + at, mask=equal, other=0)
        word = tl.load(words + row * groups + place, mask=equal, other=0)
        early = tl.where(equal, -_column(place, word, COLUMNS, group), _LEAST)
        needed = kept - tl.sum(above.to(tl.int32), 1)
        earliest = _threshold(early, needed, tl.full([LINES], _LEAST, tl.int32), tl.zeros([LINES], tl.int32))
        chosen = above | (equal & (early >= earliest[:, None]))
    slot = line.to(tl.int64)[:, None] * kept + tl.cumsum(chosen.to(tl.int32), 1) - 1
    place = at
    if not FIRST:
        place = tl.load(places + row * entries + at, mask=chosen, other=0)
    tl.store(out_keys + slot, key, mask=chosen)
    tl.store(out_places + slot, place, mask=chosen)


@triton.jit
def _entry(key, column):
    """One int64 that orders by key descending, then by column ascending."""
    return ((-1 - key).to(tl.int64) << 32) | column.to(tl.int64)


@triton.jit(do_not_specialize=["N", "groups", "kept", "K"])
def _finish(
    x,
    W_enc,
    b,
    keys,
    places,
    words,
    found,
    N,
    D,
    groups,
    kept,
    K,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    STEP: tl.constexpr = COLUMNS // GROUP
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    inside = slot < kept
    key = tl.load(keys + row * kept + slot, mask=inside, other=_LEAST)
    place = tl.load(places + row * kept + slot, mask=inside, other=0)
    word = tl.load(words + row * groups + place, mask=inside, other=0)
    column = _column(place, word, COLUMNS, GROUP)
    # a group whose first maximum is past the end has no column inside
    inside &= column < N
    # slots without a group, each with a number of its own, come after all entries
    entry = tl.where(inside, _entry(key, column), _PADDING - slot.to(tl.int64))
    worst = tl.max(tl.where(slot < K, entry, -1 - _PADDING))
    # with fewer groups than K the worst is padding, which every runner-up reaches
    again = inside & ((word | (GROUP - 1)) >= (-1 - (worst >> 32)).to(tl.int32))
    group = tl.min(tl.where(again, slot, SLOTS))
    while group < SLOTS:
        mine = slot == group
        limit = tl.sum(tl.where(mine, key, 0))
        own = tl.sum(tl.where(mine, column, 0))
        first = tl.sum(tl.where(mine, column - (word & (GROUP - 1)) * STEP, 0))
        member = first + tl.arange(0, GROUP) * STEP
        at = tl.minimum(member, N - 1)
        z = tl.load(b + at).to(tl.float32)
        for left in range(0, D, BLOCK_D):
            d = left + tl.arange(0, BLOCK_D)
            x_part = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
            W_at = W_enc + at.to(tl.int64)[:, None] * D + d[None, :]
            W_part = tl.load(W_at, mask=(d < D)[None, :], other=0.0).to(tl.float32)
            z += tl.sum(W_part * x_part[None, :], axis=1)
        new = _entry(tl.minimum(_key(z), limit), member)
        new = tl.where((member < N) & (member != own), new, _PADDING)
        best = tl.min(new)
        while best < worst:
            entry = tl.where(entry == worst, best, entry)
            worst = tl.max(tl.where(slot < K, entry, -1 - _PADDING))
            new = tl.where(new == best, _PADDING, new)
            best = tl.min(new)
        again &= slot != group
        group = tl.min(tl.where(again, slot, SLOTS))
    tl.store(found + row * K + slot, entry, mask=slot < K)


@triton.jit(do_not_specialize=["K"])
def _order(found, values, indices, K, SLOTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    entry = tl.load(found + row * K + slot, mask=slot < K, other=_PADDING)
    rank = tl.zeros([SLOTS], dtype=tl.int32)
    # entries differ, because no two have the same column
    for other in range(K):
        rank += (tl.load(found + row * K + other) < entry).to(tl.int32)
    key = (-1 - (entry >> 32)).to(tl.int32)
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    tl.store(values + row * K + rank, value, mask=slot < K)
    tl.store(indices + row * K + rank, entry & 0xFFFFFFFF, mask=slot < K)


@torch.no_grad()
def encode_topk(
    x: Tensor, W_enc: Tensor, b: Tensor, k: int, wanted: Wanted | None = None
) -> tuple[Tensor, Tensor]:
    """See `winnow.trainer.kernels.encode_topk`; float64 and k > LARGEST_K are left to `exact`.

    What is `wanted` beside the best is written by the sweep.
    """
    if x.dtype == torch.float64 or k > LARGEST_K or not k or not x.numel():
        multiply(x, W_enc, b, wanted)
        return exact(x, W_enc, b, k)
    x, W_enc, b = x.contiguous(), W_enc.contiguous(), b.contiguous()
    values = torch.empty(len(x), k, dtype=torch.float32, device=x.device)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    places = None if wanted is None else places_of(wanted.ids, len(W_enc))
    chunk = chunk_rows(len(W_enc), group_size(len(W_enc), k))
    for first in range(0, len(x), chunk):
        rows = slice(first, first + chunk)
        beside = None if wanted is None or places is None else (places, wanted.z[rows])
        _encode(x[rows], W_enc, b, values[rows], indices[rows], beside)
    return values, indices


def multiply(x: Tensor, W_enc: Tensor, b: Tensor, wanted: Wanted | None) -> None:
    """Fill `wanted` by a product of its own, where no sweep has its numbers."""
    if wanted is not None:
        ids = wanted.ids
        torch.addmm(b[ids].to(x.dtype), x, W_enc[ids].T, out=wanted.z)


def _encode(
    x: Tensor,
    W_enc: Tensor,
    b: Tensor,
    values: Tensor,
    indices: Tensor,
    beside: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Encode the rows of a chunk into `values` and `indices` [R, K]."""
    k, latents = values.shape[1], len(W_enc)
    maxima, words, group = sweep(x, W_enc, b, k, beside=beside)
    groups = maxima.shape[1]
    kept = min(k, groups)
    keys, places = select(maxima, words, kept, group)
    found, slots = torch.empty_like(indices), max(64, power_of_two(k))
    launch(
        _finish,
        (len(x),),
        *(x, W_enc, b, keys, places, words, found, latents, x.shape[1], groups, kept, k),
        COLUMNS=COLUMNS,
        GROUP=group,
        SLOTS=slots,
        # with 256 columns, 256 slots spill 16 bytes on sm_80
        BLOCK_D=min(128, MEMBER_BYTES // (group * x.element_size())),
        num_warps=4,
    )
    order(found, values, indices)


Bounds = tuple[Tensor, Tensor, Tensor, Tensor]
"""float32: two factors [R] of a row, and those [N] of a column that they are multiplied by."""


def sweep(
    x: Tensor,
    W_enc: Tensor,
    b: Tensor,
    k: int,
    *,
    bounds: Bounds | None = None,
    beside: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Keys of the groups' maxima and their words, int32 [R, groups], and the columns of a group.

    Args:
        x: [R, D].
        W_enc: [N, D].
        b: [N].
        k: Groups that will be selected.
        bounds: What to add to each number, so that it bounds another one from above.
        beside: int32 [N], and [R, M]: receives the numbers of the columns whose place, the first, is not
            below 0. Its rows have consecutive numbers.
    """
    (rows, width), latents = x.shape, len(W_enc)
    group = group_size(latents, k)
    size = rows, groups_of(latents, group)
    maxima, words = (torch.empty(size, dtype=torch.int32, device=x.device) for _ in range(2))
    places, z = beside or (None, None)
    stride = 0 if z is None else z.stride(0)
    cut = {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH, "GROUP": group, "WIDEN": interpreted()}
    operands = (x, W_enc, b, *(bounds or (None,) * 4), places, z, maxima, words, rows, latents, width, stride)
    launch(_sweep, (cdiv(rows, ROWS) * cdiv(latents, COLUMNS),), *operands, num_warps=8, **cut)
    return maxima, words, group


def order(found: Tensor, values: Tensor, indices: Tensor) -> None:
    """Write the entries found int64 [R, K] in order to values and indices [R, K]."""
    k = found.shape[1]
    slots = max(64, power_of_two(k))
    launch(_order, (len(found),), found, values, indices, k, SLOTS=slots, num_warps=cdiv(slots, 512))


def select(maxima: Tensor, words: Tensor, kept: int, group: int) -> tuple[Tensor, Tensor]:
    """The best groups of each row by their maxima int32 [R, groups]: keys and places int32 [R, kept]."""
    rows, groups = maxima.shape
    keys, places, entries = maxima, words, groups
    # pieces of equal width, so that each has more entries than are kept of it (PIECE / 2 > 2 LARGEST_K)
    while entries > kept or keys is maxima:
        pieces = cdiv(entries, PIECE)
        out = [torch.empty(rows, pieces * kept, dtype=torch.int32, device=maxima.device) for _ in range(2)]
        sizes = (rows, entries, cdiv(entries, pieces), pieces, groups, kept, group)
        # with 8 warps a large piece takes 208 registers of a thread on sm_90, with 16 it takes 97
        # four lines of a small one spill 24 bytes on sm_120, and take 159 registers on sm_90; two take 79
        block, lines, warps = (SMALL_PIECE, 2, 8) if sizes[2] <= SMALL_PIECE else (PIECE, 1, 16)
        # the interpreter's time is by programs, not by numbers
        lines = 64 if interpreted() else lines
        constants = {"FIRST": keys is maxima, "BLOCK": block, "LINES": lines, "num_warps": warps}
        grid = (cdiv(rows * pieces, lines),)
        launch(_select, grid, keys, places, words, *out, *sizes, COLUMNS=COLUMNS, **constants)
        (keys, places), entries = out, pieces * kept
    return keys, places


@example
def _encode_example(shape: Shape) -> None:
    x, W_enc = shape.empty(shape.rows, shape.width), shape.empty(shape.latents, shape.width)
    encode_topk(x, W_enc, shape.empty(shape.latents, dtype=torch.float32), shape.k)


@example
def _beside_example(shape: Shape) -> None:
    """With dead latents."""
    x, W_enc = shape.empty(shape.rows, shape.width), shape.empty(shape.latents, shape.width)
    b = shape.empty(shape.latents, dtype=torch.float32)
    places = shape.empty(shape.latents, dtype=torch.int32)
    sweep(x, W_enc, b, shape.k, beside=(places, aligned(shape.rows, cdiv(shape.latents, 10), x)))


@example
def _many_example(shape: Shape) -> None:
    """Of 256 per row."""
    _encode_example(shape._replace(k=256))


@cost_of("_sweep")
def _sweep_cost(given: Mapping[str, Any]) -> Cost:
    vectors = ("b", "row_slack", "row_norms", "column_norms", "column_lost", "places", "beside")
    tensors = [given[name] for name in ("x", "W_enc", *vectors, "maxima", "words")]
    moved = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return Cost(flops=2.0 * given["R"] * given["N"] * given["D"], streamed=moved)


@cost_of("_select")
def _select_cost(given: Mapping[str, Any]) -> Cost:
    # without ties, for which words are read as well; a later round reads the places of what it chooses only
    return Cost(streamed=given["keys"].nbytes + given["out_keys"].nbytes + given["out_places"].nbytes)


@cost_of("_finish")
def _finish_cost(given: Mapping[str, Any]) -> Cost:
    rows, k, group = len(given["found"]), given["K"], given["GROUP"]
    streamed = sum(given[name].nbytes for name in ("keys", "places", "found"))
    # a sector of `words` per group chosen; groups done again as if active latents were spread evenly
    again = k**2 * group / (2 * given["N"])
    W = given["W_enc"]
    return Cost(
        streamed=streamed, gathered=int(rows * (32 * k + again * group * W.shape[1] * W.element_size()))
    )


@cost_of("_order")
def _order_cost(given: Mapping[str, Any]) -> Cost:
    return Cost(streamed=sum(given[name].nbytes for name in ("found", "values", "indices")))


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
