"""Where each latent is active: exact top windows, random positives and densities, in one streaming pass.

Letters: N latents, B rows in a chunk, S slots of the codes, E entries (active slots) of a chunk.
Memory is N x (top + positives) entries of 16 bytes and one chunk, however many rows are streamed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from winnow.common.hashing import keyed_hash
from winnow.evaluator.setting import Codes

EMPTY = -np.inf
"""Score of an empty place: below every score, so that anything displaces it."""


class Entries(NamedTuple):
    """Active slots as arrays of equal length E, one element per slot."""

    latents: NDArray[np.int64]
    values: NDArray[np.float32]
    """Above 0, in units of the normalised space."""
    windows: NDArray[np.int64]
    positions: NDArray[np.int64]


class Best:
    """The `count` entries of highest score per latent, exact and independent of their order of arrival.

    Args:
        latents: N.
        count: Places per latent.
        one_per_window: Keep only the best entry of each window.

    Attributes:
        scores: float32 [N, count], descending; `EMPTY` in an empty place.
        values: float32 [N, count].
        windows: int32 [N, count]; -1 in an empty place.
        positions: int32 [N, count]; -1 in an empty place.
    """

    def __init__(self, latents: int, count: int, *, one_per_window: bool) -> None:
        shape = (latents, count)
        self.one_per_window = one_per_window
        self.scores = np.full(shape, EMPTY, np.float32)
        self.values = np.zeros(shape, np.float32)
        self.windows = np.full(shape, -1, np.int32)
        self.positions = np.full(shape, -1, np.int32)

    def add(self, entries: Entries, scores: NDArray[np.float32]) -> None:
        """Offer entries with their scores [E]; of equal ones the earlier (window, position) goes first."""
        count = self.scores.shape[1]
        # Once the lists are full, few entries can still enter one; only those are sorted. `>=`, because an
        # equal score in an earlier window displaces a later one.
        keep = scores >= self.scores[entries.latents, -1]
        if not keep.any():
            return
        fresh = Entries(
            entries.latents[keep], entries.values[keep], entries.windows[keep], entries.positions[keep]
        )
        # The lists of the latents at hand are made anew from what they held and what is offered.
        touched = np.unique(fresh.latents)
        held = self.windows[touched] >= 0
        owner = np.repeat(touched, held.sum(1))
        latents = np.concatenate([owner, fresh.latents])
        windows = np.concatenate([self.windows[touched][held], fresh.windows])
        positions = np.concatenate([self.positions[touched][held], fresh.positions])
        values = np.concatenate([self.values[touched][held], fresh.values])
        offered = np.concatenate([self.scores[touched][held], scores[keep]]).astype(np.float32)
        # lexsort takes the last key first: by latent, best score first. Ties are settled by place in the
        # corpus, not by arrival, so that the chunk size changes nothing.
        order = np.lexsort((positions, windows, -offered, latents))
        if self.one_per_window:
            # np.unique gives the first index of each (latent, window), which in this order is the best entry.
            pairs = latents[order] * (windows.max() + 1) + windows[order]
            first = np.unique(pairs, return_index=True)[1]
            order = order[np.sort(first)]
        # Owners ascend, so an entry's rank in its list is its distance to its owner's first entry.
        owners = latents[order]
        place = np.arange(len(order)) - np.searchsorted(owners, owners)
        order, place = order[place < count], place[place < count]
        owners = latents[order]
        # A list never gets shorter, so every place that was filled is overwritten and nothing stale remains.
        for name, new in (
            ("scores", offered),
            ("values", values),
            ("windows", windows),
            ("positions", positions),
        ):
            getattr(self, name)[owners, place] = new[order]

    def of(self, latent: int) -> list[tuple[float, int, int]]:
        """List (value, window, position) of a latent's entries, best score first."""
        chosen = self.windows[latent] >= 0
        parts = (self.values[latent], self.windows[latent], self.positions[latent])
        return list(zip(*(part[chosen].tolist() for part in parts), strict=True))


@dataclass
class Activations:
    """Result of a pass over rows.

    Attributes:
        firings: int64 [N]: number of rows on which each latent was active.
        rows: Number of rows of weight above 0.
        top: The highest activations of each latent, one per window.
        positives: Random activations of each latent.
    """

    firings: NDArray[np.int64]
    rows: int
    top: Best
    positives: Best


def gather(
    stream: Iterable[Codes], latents: int, *, top: int, positives: int, context: int, seed: int = 0
) -> Activations:
    """Find activations in one pass over encoded rows, leaving out rows of weight 0.

    Which positives are kept depends only on (seed, token, latent): all active tokens of a latent are equally
    likely, whatever the chunks.

    Args:
        stream: Encoded rows, such as `Setting.codes(units)`.
        latents: N.
        top: Top windows to keep per latent.
        positives: Random active tokens to keep per latent.
        context: Context length T, by which tokens are numbered.
        seed: Seed of the choice of positives.
    """
    found = Activations(
        np.zeros(latents, np.int64),
        0,
        Best(latents, top, one_per_window=True),
        Best(latents, positives, one_per_window=False),
    )
    for codes in stream:
        entries = active(codes)
        found.rows += int((codes.weights > 0).sum())
        found.firings += np.bincount(entries.latents, minlength=latents)
        if top:
            found.top.add(entries, entries.values)
        if positives:
            # A reservoir without state: the tokens of highest hash are a uniform draw without repeats, in any
            # order of arrival. 24 bits of the hash, because a float32 holds those exactly.
            token = entries.windows * context + entries.positions
            drawn = keyed_hash(token * latents + entries.latents, seed)
            found.positives.add(entries, (drawn >> np.uint64(40)).astype(np.float32))
    return found


def active(codes: Codes) -> Entries:
    """Return the active slots of the rows of weight above 0."""
    values, indices = codes.values.cpu().numpy(), codes.indices.cpu().numpy()
    keep = (values > 0) & (codes.weights > 0).cpu().numpy()[:, None]
    row, slot = np.nonzero(keep)
    return Entries(
        indices[row, slot].astype(np.int64),
        values[row, slot].astype(np.float32),
        codes.windows[row],
        codes.positions[row],
    )
