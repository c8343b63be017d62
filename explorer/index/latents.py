"""What the index says about latents, from all their entries: figures, examples, co-activation. Pure.

Letters: R rows of a window that are read (context length less the dropped positions), T context length,
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
TOP_TOKENS = 8
TOP_BAND = -1
"""Band number of examples chosen for their height, not drawn from a band."""


class Windows(NamedTuple):
    """The tokens that rows stand for."""

    tokens: Sequence[NDArray[np.uint32]]
    """Of each block, [W, T]."""
    drop: int
    """Leading positions without a row."""

    @property
    def length(self) -> int:
        """T."""
        return self.tokens[0].shape[1]

    @property
    def rows(self) -> int:
        """Rows R of a window."""
        return self.length - self.drop

    def of(self, window: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Token ids at some places, of the windows' shape."""
        per_block = self.tokens[0].shape[0]
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
    """[bands + 1] edges of the bands, over the same rows."""
    histogram: NDArray[np.uint32]
    """[BINS] counts in equal widths from 0 to `largest`."""
    token_ids: NDArray[np.uint32]
    """The tokens that carry most of its activation, at most TOP_TOKENS."""
    token_shares: NDArray[np.float32]
    """Share of the summed activation that each carries."""


def figures(value: NDArray[np.float32], tokens: NDArray[np.uint32], bands: int) -> Figures:
    """Figures of one latent from its activations [E] and the tokens [E] they stand on."""
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
    exact = value.astype(np.float64)
    largest = float(exact.max())
    bins = np.minimum((exact * (BINS / largest)).astype(np.int64), BINS - 1)
    ids, where = np.unique(tokens, return_inverse=True)
    mass = np.bincount(where, weights=exact)
    best = np.lexsort((ids, -mass))[:TOP_TOKENS]
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


class Choice(NamedTuple):
    """Entries of one latent that become examples: its entry numbers, and the band of each."""

    entry: NDArray[np.int64]
    band: NDArray[np.int8]


def choose(
    row: NDArray[np.int64], value: NDArray[np.float32], spec: IndexSpec, window_rows: int, latent: int
) -> Choice:
    """The examples of one latent: its best windows exactly, then a draw from each band of its activations.

    Band j holds the entries between the quantiles j/bands and (j+1)/bands. A latent with fewer entries than
    bands gets none drawn.

    Args:
        row: [E] ascending.
        value: [E].
        spec: How many of each.
        window_rows: R.
        latent: Its number: each latent has its own draws.
    """
    if not len(row):
        return Choice(np.zeros(0, np.int64), np.zeros(0, np.int8))
    window = row // window_rows
    starts = np.flatnonzero(np.diff(window, prepend=-1))
    peaks = np.maximum.reduceat(value, starts)
    best = np.lexsort((starts, -peaks))[: spec.top]
    ends = np.append(starts, len(row))
    entries = [int(starts[i] + value[starts[i] : ends[i + 1]].argmax()) for i in best]
    bands = [TOP_BAND] * len(entries)
    if len(row) >= spec.bands and spec.per_band:
        draw = np.random.default_rng([spec.seed, latent])
        order = np.lexsort((row, value))
        edges = np.linspace(0, len(row), spec.bands + 1).astype(np.int64)
        for band in range(spec.bands):
            low, high = edges[band], edges[band + 1]
            picked = draw.choice(high - low, size=min(spec.per_band, int(high - low)), replace=False)
            entries += order[low + np.sort(picked)].tolist()
            bands += [band] * len(picked)
    return Choice(np.asarray(entries, np.int64), np.asarray(bands, np.int8))


class Examples(NamedTuple):
    """Examples of one latent: E of them, their tokens and activations end to end."""

    band: NDArray[np.int8]
    window: NDArray[np.int64]
    position: NDArray[np.int64]
    """Of the token it is about, in its window."""
    first: NDArray[np.int64]
    """Position of the first token shown."""
    length: NDArray[np.int64]
    """Tokens shown."""
    tokens: NDArray[np.uint32]
    values: NDArray[np.float32]
    """The latent's activation at each token shown."""


def examples(
    row: NDArray[np.int64], value: NDArray[np.float32], choice: Choice, spec: IndexSpec, windows: Windows
) -> Examples:
    """Cut the chosen entries' surroundings out of their windows."""
    window, at = np.divmod(row[choice.entry], windows.rows)
    position = at + windows.drop
    first = np.maximum(position - spec.before, 0)
    length = np.minimum(position + spec.after + 1, windows.length) - first
    starts = np.concatenate([[0], np.cumsum(length)])
    place = np.repeat(first - starts[:-1], length) + np.arange(starts[-1])
    tokens = windows.of(np.repeat(window, length), place)
    values = np.zeros(starts[-1], dtype=np.float32)
    base = window * windows.rows - windows.drop
    low = np.searchsorted(row, base + np.maximum(first, windows.drop))
    high = np.searchsorted(row, base + first + length)
    for i in range(len(window)):
        values[starts[i] + row[low[i] : high[i]] - base[i] - first[i]] = value[low[i] : high[i]]
    return Examples(choice.band, window, position, first, length, tokens, values)


class Near(NamedTuple):
    """Other latents by latent of a part, best first; -1 fills up."""

    ids: NDArray[np.int64]
    """[P, M]"""
    scores: NDArray[np.float32]
    """[P, M]"""


def coactive(
    blocks: Sequence[Block],
    start: NDArray[np.int64],
    row: NDArray[np.int64],
    counts: NDArray[np.int64],
    first: int,
    spec: IndexSpec,
) -> Near:
    """The latents that are active on the rows on which each latent of a part is.

    The score of latents n and m is rows(n and m) / sqrt(rows(n) * rows(m)): 1 where they always fire
    together. At most `coactivation_rows` rows of n are looked at; below that it is exact.

    Args:
        blocks: All blocks.
        start: [P + 1], from `merge`.
        row: [E], from `merge`.
        counts: [N] rows on which each latent fires.
        first: The part's first latent.
        spec: How many are kept, and how many rows are looked at.
    """
    size, latents = len(blocks[0].row_start) - 1, len(counts)
    own, looked = _looked_at(start, row, first, spec)
    keys, tallies = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for number, block in enumerate(blocks):
        here = looked // size == number
        if not here.any():
            continue
        rows = looked[here] - number * size
        begin, end = block.row_start[rows], block.row_start[rows + 1]
        lengths = end - begin
        places = np.repeat(begin - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
        others = block.latent[places + np.arange(len(places))].astype(np.int64)
        key, tally = np.unique(np.repeat(own[here], lengths) * latents + others, return_counts=True)
        keys, where = np.unique(np.concatenate([keys, key]), return_inverse=True)
        tallies = np.bincount(where, weights=np.concatenate([tallies, tally]), minlength=len(keys)).astype(
            np.int64
        )
    mine, other = np.divmod(keys, latents)
    keep = other != mine + first
    mine, other, tallies = mine[keep], other[keep], tallies[keep]
    seen = np.bincount(own, minlength=len(start) - 1)
    together = tallies / seen[mine] * counts[mine + first]
    score = together / np.sqrt(counts[mine + first].astype(np.float64) * counts[other])
    return _best(mine, other, score, len(start) - 1, spec.neighbours)


def _looked_at(
    start: NDArray[np.int64], row: NDArray[np.int64], first: int, spec: IndexSpec
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(latent within the part, row) of every firing that is looked at."""
    own, looked = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for i in range(len(start) - 1):
        mine = row[start[i] : start[i + 1]]
        if len(mine) > spec.coactivation_rows:
            draw = np.random.default_rng([spec.seed, first + i, 1])
            mine = mine[draw.choice(len(mine), size=spec.coactivation_rows, replace=False)]
        own.append(np.full(len(mine), i))
        looked.append(mine)
    return np.concatenate(own), np.concatenate(looked)


def _best(
    mine: NDArray[np.int64], other: NDArray[np.int64], score: NDArray[Any], latents: int, count: int
) -> Near:
    order = np.lexsort((other, -score, mine))
    mine, other, score = mine[order], other[order], score[order]
    begin = np.searchsorted(mine, np.arange(latents))
    rank = np.arange(len(mine)) - begin[mine]
    keep = rank < count
    near = Near(np.full((latents, count), -1, np.int64), np.zeros((latents, count), np.float32))
    near.ids[mine[keep], rank[keep]] = other[keep]
    near.scores[mine[keep], rank[keep]] = score[keep]
    return near
