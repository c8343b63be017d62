"""What the index holds about latents, from all their entries: figures, examples, co-activation. Pure.

Letters: R rows of a window that are read (context length minus the dropped positions), T context length,
P latents of a part, E entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from winnow.explorer.index.blocks import Block
from winnow.schemas.features import IndexSpec

BINS = 40
_TOP_TOKENS = 8
TOP_BAND = -1
"""Band number of examples that are chosen as the strongest, not drawn from a band."""


class Windows(NamedTuple):
    """The tokens at which rows were read."""

    tokens: Sequence[NDArray[np.uint32]]
    """Token ids per block, [W, T]."""
    drop: int
    """Leading positions without a row."""

    @property
    def length(self) -> int:
        """T."""
        return self.tokens[0].shape[1]

    @property
    def rows(self) -> int:
        """Rows per window, R."""
        return self.length - self.drop

    def of(self, window: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Token ids at positions of windows, in the shape of `window`."""
        per_block = self.tokens[0].shape[0]
        # By block, since each is a file of its own: joining them would load the tokens of all units.
        out = np.empty(window.shape, dtype=np.uint32)
        block, number = np.divmod(window, per_block)
        for which in np.unique(block):
            chosen = block == which
            out[chosen] = self.tokens[which][number[chosen], position[chosen]]
        return out


class Figures(NamedTuple):
    """Scalars and short vectors of one latent; activations are in units of the normalised space."""

    fires: int
    largest: float
    mean: float
    """Over the rows on which it is active."""
    mean_square: float
    """Over the same rows."""
    quantiles: NDArray[np.float32]
    """Edges of the bands, over the same rows, [bands + 1]."""
    histogram: NDArray[np.uint32]
    """Counts in equal widths from 0 to `largest`, [BINS]."""
    token_ids: NDArray[np.uint32]
    """The tokens that carry most of its activation, at most TOP_TOKENS."""
    token_shares: NDArray[np.float32]
    """Share of the summed activation that each carries."""


def figures(value: NDArray[np.float32], tokens: NDArray[np.uint32], bands: int) -> Figures:
    """Figures of one latent from its activations [E] and the tokens [E] at which they occur."""
    # A silent latent gets zeros, not NaN: JSON has no NaN, and sorting by a column must place it.
    if not len(value):
        none = np.zeros(0, np.float32)
        return Figures(
            0,
            0.0,
            0.0,
            0.0,
            np.zeros(bands + 1, np.float32),
            np.zeros(BINS, np.uint32),
            none.astype(np.uint32),
            none,
        )
    # Sums over millions of activations, stored as float32: float64 keeps their error below that rounding.
    exact = value.astype(np.float64)
    largest = float(exact.max())
    # The largest activation itself is at the upper edge, in the last bin.
    bins = np.minimum((exact * (BINS / largest)).astype(np.int64), BINS - 1)
    ids, where = np.unique(tokens, return_inverse=True)
    mass = np.bincount(where, weights=exact)
    # Ties by id: a resumed or divided index must give the same bytes.
    best = np.lexsort((ids, -mass))[:_TOP_TOKENS]
    return Figures(
        len(value),
        largest,
        float(exact.mean()),
        float(np.square(exact).mean()),
        np.quantile(exact, np.linspace(0, 1, bands + 1)).astype(np.float32),
        np.bincount(bins, minlength=BINS).astype(np.uint32),
        ids[best],
        (mass[best] / mass.sum()).astype(np.float32),
    )


class _Choice(NamedTuple):
    """Entries of one latent that become examples: their numbers and bands."""

    entry: NDArray[np.int64]
    band: NDArray[np.int8]


def choose(
    row: NDArray[np.int64], value: NDArray[np.float32], spec: IndexSpec, window_rows: int, latent: int
) -> _Choice:
    """The examples of one latent: its best windows exactly, then a draw from each band of its activations.

    Band j holds the entries between the quantiles j/bands and (j+1)/bands. A latent with fewer entries than
    bands gets none drawn.

    Args:
        row: Rows of the entries, ascending, [E].
        value: Their activations, [E].
        spec: How many examples of each kind.
        window_rows: Rows per window, R.
        latent: Number of the latent, which seeds its draws.
    """
    if not len(row):
        return _Choice(np.zeros(0, np.int64), np.zeros(0, np.int8))
    # One example per window: the strongest tokens of a latent are often neighbours in one text.
    window = row // window_rows
    starts = np.flatnonzero(np.diff(window, prepend=-1))
    peaks = np.maximum.reduceat(value, starts)
    best = np.lexsort((starts, -peaks))[: spec.top]
    ends = np.append(starts, len(row))
    entries = [int(starts[i] + value[starts[i] : ends[i + 1]].argmax()) for i in best]
    bands = [TOP_BAND] * len(entries)
    if len(row) >= spec.bands and spec.per_band:
        # Seeded by latent, so that the draws do not depend on which worker makes the part, or when.
        draw = np.random.default_rng([spec.seed, latent])
        # By rank, not by value: equal activations may straddle an edge, and bands must be of equal count.
        order = np.lexsort((row, value))
        edges = np.linspace(0, len(row), spec.bands + 1).astype(np.int64)
        for band in range(spec.bands):
            low, high = edges[band], edges[band + 1]
            picked = draw.choice(high - low, size=min(spec.per_band, int(high - low)), replace=False)
            # Sorted: `order` is by value, so a band's examples are shown from weak to strong.
            entries += order[low + np.sort(picked)].tolist()
            bands += [band] * len(picked)
    return _Choice(np.asarray(entries, np.int64), np.asarray(bands, np.int8))


class Examples(NamedTuple):
    """Examples of one latent; their tokens and activations are concatenated."""

    band: NDArray[np.int8]
    window: NDArray[np.int64]
    position: NDArray[np.int64]
    """Position, in its window, of the token that an example is about."""
    first: NDArray[np.int64]
    """Position of the first token shown."""
    length: NDArray[np.int64]
    """Tokens shown."""
    tokens: NDArray[np.uint32]
    values: NDArray[np.float32]
    """The latent's activation at each token shown; of a crosscoder [tokens, 1 + H], with what each part
    contributes."""


def examples(
    row: NDArray[np.int64], value: NDArray[np.float32], choice: _Choice, spec: IndexSpec, windows: Windows
) -> Examples:
    """Cut the context of the chosen entries out of their windows; `value` is [E], or [E, 1 + H]."""
    window, at = np.divmod(row[choice.entry], windows.rows)
    position = at + windows.drop
    first = np.maximum(position - spec.before, 0)
    length = np.minimum(position + spec.after + 1, windows.length) - first
    starts = np.concatenate([[0], np.cumsum(length)])
    place = np.repeat(first - starts[:-1], length) + np.arange(starts[-1])
    tokens = windows.of(np.repeat(window, length), place)
    # 0 unless an entry says otherwise: at dropped positions, at sinks, and where the latent is silent.
    values = np.zeros((starts[-1], *value.shape[1:]), dtype=np.float32)
    # Row minus `base` is the position in the window. The search starts at the first position with a row:
    # before it, the numbers would be rows of the window before.
    base = window * windows.rows - windows.drop
    low = np.searchsorted(row, base + np.maximum(first, windows.drop))
    high = np.searchsorted(row, base + first + length)
    for i in range(len(window)):
        values[starts[i] + row[low[i] : high[i]] - base[i] - first[i]] = value[low[i] : high[i]]
    return Examples(choice.band, window, position, first, length, tokens, values)


class Near(NamedTuple):
    """Neighbours of each latent of a part, best first."""

    ids: NDArray[np.int64]
    """Their numbers [P, M]; -1 is padding."""
    scores: NDArray[np.float32]
    """Their scores [P, M]."""


def coactive(
    blocks: Sequence[Block],
    start: NDArray[np.int64],
    row: NDArray[np.int64],
    counts: NDArray[np.int64],
    first: int,
    spec: IndexSpec,
) -> Near:
    """The latents that are active on the same rows as each latent of a part.

    The score of latents n and m is rows(n and m) / sqrt(rows(n) * rows(m)): 1 if they always fire together.
    It is exact if n fires on at most `coactivation_rows` rows, otherwise estimated from as many drawn ones.

    Args:
        blocks: All blocks.
        start: First entry of each latent of the part, from `merge`, [P + 1].
        row: Rows of the entries, from `merge`, [E].
        counts: Rows on which each latent fires, [N].
        first: The part's first latent.
        spec: How many neighbours are kept, and how many rows are counted.
    """
    size, latents = len(blocks[0].row_start) - 1, len(counts)
    own, looked = _looked_at(start, row, first, spec)
    # Pairs (n, m) as one number n N + m: a dense table of int64 [P, N] would be 8.6 GB at a million latents,
    # of which at most 512 K entries per latent are not 0.
    keys, tallies = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for number, block in enumerate(blocks):
        here = looked // size == number
        if not here.any():
            continue
        rows = looked[here] - number * size
        begin, end = block.row_start[rows], block.row_start[rows + 1]
        lengths = end - begin
        # All entries of all rows at once: each row's start, repeated and counted up, without a Python loop.
        places = np.repeat(begin - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
        others = block.latent[places + np.arange(len(places))].astype(np.int64)
        key, tally = np.unique(np.repeat(own[here], lengths) * latents + others, return_counts=True)
        # Summed block by block, so that memory holds one block's pairs and the distinct ones so far.
        keys, where = np.unique(np.concatenate([keys, key]), return_inverse=True)
        tallies = np.bincount(where, weights=np.concatenate([tallies, tally]), minlength=len(keys)).astype(
            np.int64
        )
    mine, other = np.divmod(keys, latents)
    keep = other != mine + first
    mine, other, tallies = mine[keep], other[keep], tallies[keep]
    # Extrapolated from the drawn rows to all rows of n, of which `seen` were counted.
    seen = np.bincount(own, minlength=len(start) - 1)
    together = tallies / seen[mine] * counts[mine + first]
    score = together / np.sqrt(counts[mine + first].astype(np.float64) * counts[other])
    return _best(mine, other, score, len(start) - 1, spec.neighbours)


def _looked_at(
    start: NDArray[np.int64], row: NDArray[np.int64], first: int, spec: IndexSpec
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(latent within the part, row) of every firing that is counted."""
    own, looked = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for i in range(len(start) - 1):
        mine = row[start[i] : start[i + 1]]
        if len(mine) > spec.coactivation_rows:
            # The 1 separates this stream from the draws of `choose`. At most 512 rows: the standard error
            # of a share is then at most 0.022, and a dense latent does not visit every row of the dataset.
            draw = np.random.default_rng([spec.seed, first + i, 1])
            mine = mine[draw.choice(len(mine), size=spec.coactivation_rows, replace=False)]
        own.append(np.full(len(mine), i))
        looked.append(mine)
    return np.concatenate(own), np.concatenate(looked)


def _best(
    mine: NDArray[np.int64], other: NDArray[np.int64], score: NDArray[Any], latents: int, count: int
) -> Near:
    """The `count` highest scores per latent; equal ones by ascending number."""
    order = np.lexsort((other, -score, mine))
    mine, other, score = mine[order], other[order], score[order]
    begin = np.searchsorted(mine, np.arange(latents))
    rank = np.arange(len(mine)) - begin[mine]
    keep = rank < count
    near = Near(np.full((latents, count), -1, np.int64), np.zeros((latents, count), np.float32))
    near.ids[mine[keep], rank[keep]] = other[keep]
    near.scores[mine[keep], rank[keep]] = score[keep]
    return near
