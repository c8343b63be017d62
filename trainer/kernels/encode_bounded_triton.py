"""`encode_topk` of float32 rows: all products in bfloat16 with a bound on their error, few in float32.

Round: a row x becomes x' in bfloat16; its norm and that of x - x' are kept. So do the rows w of W_enc. Sweep:
the products x'w' on tensor cores, each raised by what the number in float32 may be above it. Select: per row,
the groups with the best of these upper bounds, some more than k. Refine: the k best are multiplied in
float32; so is every latent, and every group of them, whose bound reaches the k-th number found so far: no
other can be among the best. Order: as in `encode_topk_triton`.

The bound, with u = 2^-24: by Cauchy's inequality |xw - x'w'| <= |x - x'| |w| + |x'| |w - w'|. A sum of D
products and b in float32, in any order, is within (D + 1) u (|x| |w| + |b|) of the exact one (Higham,
Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). Tensor cores cut off what they add instead
of rounding it: at most 2u of the largest addend, for each of D products and for two more of each block of at
least 4 of them, 3 D u in all (Fasi, Higham, Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor cores,
2021, for V100 to A100; assumed of later ones and of AMD's). 16 u are for the bound's own sums.

Legend: R rows of a chunk, B rows, D width, N latents, K kept per row, G columns of a group.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.trainer.kernels import encode_topk_triton as plain
from winnow.trainer.kernels.cost import Cost, cost_of
from winnow.trainer.kernels.encode_topk import Wanted
from winnow.trainer.kernels.encode_topk_triton import _column, _entry, _key, _threshold
from winnow.trainer.kernels.examples import Shape, example
from winnow.trainer.kernels.groups import (
    COLUMNS,
    LARGEST_K,
    SLACK,
    chunk_rows,
    group_size,
    groups_of,
    slack_of,
    slots_of,
)
from winnow.trainer.kernels.support_triton import block_of, cdiv, interpreted, launch

LEAST = 1e-30
"""Of a bound: products below 2^-126 are rounded by no share of their own."""
_SQUARED = tl.constexpr(2.0**-63)
"""Numbers below it have squares that float32 may round to 0."""
SCAN = 1024
"""Groups looked at at a time, if more may hold one of the best than were selected."""
MEMBERS = 1024
"""Numbers of W_enc that are read at a time of a group."""
WIDEST_PART, NUMBERS = 32, 8192
"""Numbers of a row of W_enc that are read at a time of what was selected, and of all these rows."""
_LEAST = tl.constexpr(-(2**31))
_PADDING = tl.constexpr(2**63 - 1)


class Rounded(NamedTuple):
    """A matrix in bfloat16, and how far it is from itself."""

    low: Tensor
    """bfloat16 [R, D]."""
    norms: Tensor
    """float32 [R], of the rows before they were rounded."""
    lost: Tensor
    """float32 [R]: norms of what was rounded away."""


@triton.jit(do_not_specialize=["R"])
def _round_rows(rows, low, norms, lost, R, D, LINES: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * LINES + tl.arange(0, LINES)
    square = tl.zeros([LINES, BLOCK_D], dtype=tl.float32)
    error = tl.zeros([LINES, BLOCK_D], dtype=tl.float32)
    for left in range(0, D, BLOCK_D):
        d = left + tl.arange(0, BLOCK_D)
        at = row.to(tl.int64)[:, None] * D + d[None, :]
        inside = (row < R)[:, None] & (d < D)[None, :]
        data = tl.load(rows + at, mask=inside, other=0.0)
        # whichever way it is rounded, the bound is of the error that was made
        rounded = data.to(tl.bfloat16)
        tl.store(low + at, rounded, mask=inside)
        apart = data - rounded.to(tl.float32)
        square += data * data
        error += apart * apart
    # what no square shows: D numbers below 2^-63 have a norm below D 2^-63
    unseen = _SQUARED * D
    tl.store(norms + row, tl.sqrt(tl.sum(square, axis=1)) + unseen, mask=row < R)
    tl.store(lost + row, tl.sqrt(tl.sum(error, axis=1)) + unseen, mask=row < R)


@triton.jit
def _numbers(x, W_enc, b, column, wanted, D, BLOCK_D: tl.constexpr):
    """What a row has in some columns, summed in float32; nothing is read for those that are not wanted."""
    columns: tl.constexpr = column.shape[0]
    total = tl.zeros([columns, BLOCK_D], dtype=tl.float32)
    W_rows = W_enc + column.to(tl.int64)[:, None] * D
    for left in range(0, D, BLOCK_D):
        d = left + tl.arange(0, BLOCK_D)
        x_part = tl.load(x + d, mask=d < D, other=0.0).to(tl.float32)
        W_part = tl.load(W_rows + d[None, :], mask=wanted[:, None] & (d < D)[None, :], other=0.0)
        # across threads only once, after the loop: loads need not wait for it
        total += W_part.to(tl.float32) * x_part[None, :]
    return tl.load(b + column, mask=wanted, other=0.0).to(tl.float32) + tl.sum(total, axis=1)


@triton.jit
def _insert(entry, held, worst, new):
    """Let those of the new entries that are better than the worst of those held take their places."""
    best = tl.min(new)
    while best < worst:
        entry = tl.where(held & (entry == worst), best, entry)
        worst = tl.max(tl.where(held, entry, -1 - _PADDING))
        new = tl.where(new == best, _PADDING, new)
        best = tl.min(new)
    return entry, worst


@triton.jit(do_not_specialize=["N", "groups", "kept", "K"])
def _refine(
    x,
    W_enc,
    b,
    maxima,
    words,
    keys,
    places,
    found,
    N,
    D,
    groups,
    kept,
    K,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    SCAN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MEMBER_D: tl.constexpr,
):
    STEP: tl.constexpr = COLUMNS // GROUP
    row = tl.program_id(0).to(tl.int64)
    x += row * D
    words += row * groups
    slot = tl.arange(0, SLOTS)
    inside = slot < kept
    key = tl.load(keys + row * kept + slot, mask=inside, other=_LEAST)
    place = tl.load(places + row * kept + slot, mask=inside, other=0)
    word = tl.load(words + place, mask=inside, other=0)
    column = _column(place, word, COLUMNS, GROUP)
    bound = _entry(key, column)
    # groups that were not selected come after this one
    last = tl.max(tl.where(inside, bound, -1 - _PADDING))
    inside &= column < N
    bound = tl.where(inside, bound, _PADDING)

    # the K with the best bounds: their numbers set what the others have to reach
    low = tl.min(tl.where(inside, key, 0x7FFFFFFF))
    high = tl.max(tl.where(inside, key, _LEAST))
    # one row, as `_threshold` searches
    line = tl.reshape(tl.where(inside, key, _LEAST), [1, SLOTS])
    edge = tl.max(_threshold(line, K, tl.full([1], 0, tl.int32) + low, tl.full([1], 0, tl.int32) + high))
    first = inside & (key >= edge)
    z = _numbers(x, W_enc, b, column, first, D, BLOCK_D)
    entry = tl.where(first, _entry(_key(z), column), _PADDING - slot.to(tl.int64))
    held = first
    # several at the edge may have the same bound
    while tl.sum(held.to(tl.int32)) > K:
        held &= entry != tl.max(tl.where(held, entry, -1 - _PADDING))
    # fewer, if there are fewer groups: places without an entry, which everything is better than
    free = (held == 0).to(tl.int32)
    held |= (free > 0) & (tl.cumsum(free, 0) <= K - tl.sum(held.to(tl.int32)))
    entry = tl.where(held, entry, _PADDING - slot.to(tl.int64))
    worst = tl.max(tl.where(held, entry, -1 - _PADDING))

    near = inside & (first == 0) & (bound < worst)
    if tl.max(near.to(tl.int32)) > 0:
        z = _numbers(x, W_enc, b, column, near, D, BLOCK_D)
        entry, worst = _insert(entry, held, worst, tl.where(near, _entry(_key(z), column), _PADDING))

    # the others of a group, if the bound of its runner-up reaches
    again = inside & ((word | (GROUP - 1)) >= (-1 - (worst >> 32)).to(tl.int32))
    group = tl.min(tl.where(again, slot, SLOTS))
    while group < SLOTS:
        mine = slot == group
        own = tl.sum(tl.where(mine, column, 0))
        member = tl.sum(tl.where(mine, column - (word & (GROUP - 1)) * STEP, 0)) + tl.arange(0, GROUP) * STEP
        wanted = (member < N) & (member != own)
        others = _numbers(x, W_enc, b, member, wanted, D, MEMBER_D)
        new = tl.where(wanted, _entry(_key(others), member), _PADDING)
        entry, worst = _insert(entry, held, worst, new)
        again &= (slot != group) & ((word | (GROUP - 1)) >= (-1 - (worst >> 32)).to(tl.int32))
        group = tl.min(tl.where(again, slot, SLOTS))

    # groups that were not selected: nearly never, but whatever the rows are
    if (kept < groups) & (last < worst):
        for left in range(0, groups, SCAN):
            at = left + tl.arange(0, SCAN)
            here = tl.load(maxima + row * groups + at, mask=at < groups, other=_LEAST)
            columns = _column(at, tl.load(words + at, mask=at < groups, other=0), COLUMNS, GROUP)
            bounds = tl.where((at < groups) & (columns < N), _entry(here, columns), _PADDING)
            bounds = tl.where(bounds > last, bounds, _PADDING)
            best = tl.min(bounds)
            while best < worst:
                first_of = tl.min(tl.where(bounds == best, at, groups))
                of_it = first_of // STEP * COLUMNS + first_of % STEP + tl.arange(0, GROUP) * STEP
                all_of_it = _numbers(x, W_enc, b, of_it, of_it < N, D, MEMBER_D)
                more = tl.where(of_it < N, _entry(_key(all_of_it), of_it), _PADDING)
                entry, worst = _insert(entry, held, worst, more)
                bounds = tl.where(at == first_of, _PADDING, bounds)
                best = tl.min(bounds)
    position = tl.cumsum(held.to(tl.int32), 0) - 1
    tl.store(found + row * K + position, entry, mask=held)


@torch.no_grad()
def encode_topk_bounded(
    x: Tensor, W_enc: Tensor, b: Tensor, k: int, wanted: Wanted | None = None
) -> tuple[Tensor, Tensor]:
    """See `winnow.trainer.kernels.encode_topk`: that of float32's own sums, ties included.

    Other types than float32 and k > LARGEST_K are left to `encode_topk_triton`. What is `wanted` beside the
    best has a product of its own in float32: the sweep has bounds of it only.
    """
    if x.dtype != torch.float32 or k > LARGEST_K or not k or not x.numel():
        return plain.encode_topk(x, W_enc, b, k, wanted)
    plain.multiply(x, W_enc, b, wanted)
    x, W_enc = x.contiguous(), W_enc.contiguous()
    values = torch.empty(len(x), k, dtype=torch.float32, device=x.device)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    b = b.to(torch.float32).contiguous()
    W, bias = round_rows(W_enc), _upper(b, x.shape[1])
    chunk = chunk_rows(len(W_enc), group_size(len(W_enc), k))
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        maxima, words, group = _sweep(round_rows(x[rows]), W, bias, k)
        kept = min(slots_of(k), maxima.shape[1])
        keys, places = plain.select(maxima, words, kept, group)
        found = torch.empty_like(indices[rows])
        _launch_refine(x[rows], W_enc, b, maxima, words, keys, places, found, group)
        plain.order(found, values[rows], indices[rows])
    return values, indices


def _upper(b: Tensor, width: int) -> Tensor:
    """What a bound adds for the bias [N]."""
    # an infinite bias is exact
    return torch.where(b.isfinite(), b + b.abs() * slack_of(width) + LEAST, b)


def round_rows(rows: Tensor) -> Rounded:
    """The rows float32 [R, D] in bfloat16, with norms."""
    low = torch.empty_like(rows, dtype=torch.bfloat16)
    norms, lost = rows.new_empty(len(rows)), rows.new_empty(len(rows))
    # the interpreter's time is by programs, not by numbers
    lines, block = 1024 if interpreted() else 4, block_of(rows.shape[1], 256)
    grid = (cdiv(len(rows), lines),)
    launch(_round_rows, grid, rows, low, norms, lost, *rows.shape, LINES=lines, BLOCK_D=block)
    return Rounded(low, norms, lost)


def _sweep(x: Rounded, W: Rounded, bias: Tensor, k: int) -> tuple[Tensor, Tensor, int]:
    """Bounds and words of all groups int32 [R, groups], and the columns of a group."""
    row_slack = SLACK * x.lost + slack_of(x.low.shape[1]) * x.norms
    row_norms = SLACK * (x.norms + x.lost)
    return plain.sweep(x.low, W.low, bias, k, bounds=(row_slack, row_norms, W.norms, W.lost))


def _launch_refine(
    x: Tensor,
    W_enc: Tensor,
    b: Tensor,
    maxima: Tensor,
    words: Tensor,
    keys: Tensor,
    places: Tensor,
    found: Tensor,
    group: int,
) -> None:
    slots = slots_of(found.shape[1])
    # with 4 warps it spills 68 bytes on sm_80, and 512 slots with 16 spill 152 on sm_90
    warps = 8 if slots <= 512 else 16
    sizes = (len(W_enc), x.shape[1], maxima.shape[1], keys.shape[1], found.shape[1])
    launch(
        _refine,
        (len(x),),
        *(x, W_enc, b, maxima, words, keys, places, found, *sizes),
        COLUMNS=COLUMNS,
        GROUP=group,
        SLOTS=slots,
        SCAN=SCAN,
        # with a quarter of them 128 and 512 slots spill 40 to 70 bytes on sm_90 or sm_100
        BLOCK_D=max(8, min(WIDEST_PART, NUMBERS // slots)),
        MEMBER_D=min(256, MEMBERS // group),
        num_warps=warps,
    )


@example
def _bounded_example(shape: Shape) -> None:
    """Of bounds."""
    x, W = (shape.empty(size, shape.width, dtype=torch.float32) for size in (shape.rows, shape.latents))
    b = shape.empty(shape.latents, dtype=torch.float32)
    maxima, words, group = _sweep(round_rows(x), round_rows(W), b, shape.k)
    keys = shape.empty(shape.rows, slots_of(shape.k), dtype=torch.int32)
    _launch_refine(x, W, b, maxima, words, keys, keys, shape.codes()[1], group)


@example
def _many_example(shape: Shape) -> None:
    """Of 256 per row."""
    x, W = (shape.empty(size, shape.width, dtype=torch.float32) for size in (shape.rows, shape.latents))
    many = shape._replace(k=256)
    group = group_size(shape.latents, many.k)
    maxima = shape.empty(shape.rows, groups_of(shape.latents, group), dtype=torch.int32)
    keys = shape.empty(shape.rows, slots_of(many.k), dtype=torch.int32)
    b = shape.empty(shape.latents, dtype=torch.float32)
    _launch_refine(x, W, b, maxima, maxima, keys, keys, many.codes()[1], group)


@cost_of("_round_rows")
def _(given: Mapping[str, Any]) -> Cost:
    return Cost(streamed=sum(given[name].nbytes for name in ("rows", "low", "norms", "lost")))


@cost_of("_refine")
def _(given: Mapping[str, Any]) -> Cost:
    rows, k, kept, group = len(given["found"]), given["K"], given["kept"], given["GROUP"]
    streamed = sum(given[name].nbytes for name in ("keys", "places", "found"))
    # as if half of the spare groups were near enough: docs/kernels.md says what a simulation found
    some = (k + min(kept, 2 * k)) / 2
    again = some**2 * group / (2 * given["N"]) * group
    row = given["D"] * given["W_enc"].element_size()
    return Cost(streamed=streamed, gathered=int(rows * (32 * kept + (some + again) * row)))
