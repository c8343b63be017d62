"""Documents to windows, the held-out documents, and the order of windows. Pure: no I/O.

Letters: T context length, W windows per unit, n windows or documents at hand.

The training stream is the documents that are not held out, in reading order except that a document
which was held out for a while joins when it is released. Everything follows from the corpus and
the seed; nothing depends on batch sizes, threads or the number of buckets.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from winnow.common.hashing import keyed_hash
from winnow.harvester.plan.marks import FIRST_MARK, stream_dtype, window_dtype
from winnow.schemas.labels import SPECIAL
from winnow.store.format.layout import philox_key

Tokens = NDArray[Any]
"""A document's tokens with their marks (`marks.stream_dtype`)."""
Windows = NDArray[Any]
"""Windows [n] (`marks.window_dtype`)."""
Numbered = tuple[int, Tokens]
"""A document's number in the corpus, and its tokens."""


# Hashes of a name and the seed, never sums, or the order under one seed would be the choice under another.
# `.v1` is part of the format: another algorithm takes another name, so that old plans keep their order.
def order_key(seed: int) -> int:
    """Key of the windows' order."""
    return philox_key("winnow.windows.v1", seed)


def holdout_key(seed: int) -> int:
    """Key of the choice of held-out documents."""
    return philox_key("winnow.holdout.v1", seed)


class Packer:
    """Cuts a stream of tokens into windows of T; nothing is padded, nothing overlaps.

    Args:
        context_length: T.
        bos: Token that starts every window, which then holds T - 1 tokens of the stream; None for none.
        dtype: dtype of the token ids.
        turns: Whether tokens have turns.
        twice: Whether `bos` is also put before a document that begins with it, so that it stands there twice
            (plans of earlier versions); such a window holds T tokens of the stream otherwise.
    """

    def __init__(
        self,
        context_length: int,
        bos: int | None,
        dtype: np.dtype[np.generic],
        turns: bool = False,
        *,
        twice: bool = False,
    ) -> None:
        self.context_length, self.bos = context_length, bos
        self._once = None if twice else bos
        self.payload = context_length - (bos is not None)
        """Tokens of the stream per window; one more if the window begins with a document's own BOS."""
        self.dtype = window_dtype(context_length, dtype, turns)
        """dtype of a window."""
        self.tail: Tokens = np.empty(0, stream_dtype(dtype, turns))
        """Tokens that do not fill a window yet."""
        self.documents = array("Q")
        """The number of each document of the stream: 8 bytes of memory each."""
        self.own = 0
        """Windows so far that begin with a document's own BOS."""
        self._runs, self._offset = 0, 0

    def push(self, documents: Iterable[Numbered]) -> Windows:
        """Continue the stream with `documents`, and return the windows [n] that are now full."""
        # As plain bytes: NumPy compares the fields of every two arrays that it joins, which takes longer than
        # to copy a short document.
        raw = np.dtype((np.void, self.tail.itemsize))
        parts = [self.tail.view(raw)]
        for number, tokens in documents:
            self.documents.append(number)
            parts.append(tokens.view(raw))
        stream = np.concatenate(parts).view(self.tail.dtype)
        starts = np.flatnonzero(stream["mark"] & FIRST_MARK)
        lead = self.context_length - self.payload
        places = self._places(len(stream), starts[begin_with(self._once, stream[starts])])
        count, whole = len(places) - 1, int(places[-1])
        windows = np.zeros(count, self.dtype)
        own = np.diff(places) > self.payload
        self.own += int(own.sum())
        if lead:
            windows["token"][~own, 0], windows["mark"][~own, 0] = self.bos, SPECIAL
        for name in self.tail.dtype.names or ():
            if not own.any():
                windows[name][:, lead:] = stream[name][:whole].reshape(count, self.payload)
                continue
            rest = places[:-1, None] + own[:, None] + np.arange(self.payload)
            windows[name][:, lead:] = stream[name][rest]
            windows[name][own, 0] = stream[name][places[:-1][own]]
        # Where each window begins, and the tail: in the how-manieth document of the stream, and at which of
        # its tokens. The first tokens of documents tell, and what was counted before.
        before = np.searchsorted(starts, places, side="right")
        latest = starts[np.maximum(before - 1, 0)] if len(starts) else np.zeros_like(places)
        offsets = np.where(before > 0, places - latest, self._offset + places)
        windows["run"], windows["offset"] = self._runs + before[:-1] - 1, offsets[:-1]
        self._runs += int(np.searchsorted(starts, whole))
        self._offset = int(offsets[-1])
        # A copy: a view would keep the whole stream of this call in memory.
        self.tail = stream[whole:].copy()
        return windows

    def _places(self, size: int, own: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each window begins in a stream of `size` tokens, and where the last one ends.

        `own` are the places of documents that begin with the BOS themselves.
        """
        if not len(own):
            return np.arange(size // self.payload + 1) * self.payload
        longer, places, at = set(own.tolist()), [0], 0
        while (at := at + self.payload + (at in longer)) <= size:
            places.append(at)
        return np.array(places)


def begin_with(token: int | None, documents: Tokens) -> NDArray[np.bool_]:
    """Whether each of some documents' first tokens [n] is `token`."""
    return np.zeros(len(documents), np.bool_) if token is None else documents["token"] == token


class Holdout:
    """Sets aside the documents with the smallest hashes: just as many as hold `needed` tokens.

    One pass, memory for `needed` tokens and a document: a document is released, for good, as soon as the
    ones with smaller hashes suffice. The outcome is the shortest run of documents, in ascending hash, with
    `needed` tokens, whatever order they arrive in.

    Args:
        needed: Tokens that are held.
        bos: A token that does not count where a document begins with it: it may take the place of a window's.
    """

    def __init__(self, needed: int, bos: int | None = None) -> None:
        self.needed, self.tokens, self._bos = needed, 0, bos
        self._heap: list[tuple[int, int, Tokens]] = []  # (-hash, ordinal, tokens): the largest hash first

    def push(self, ordinal: int, key_hash: int, tokens: Tokens) -> list[Numbered]:
        """Offer a document, and return those that are released now, possibly this one."""
        # Enough is held, all with smaller hashes: the usual case, without a copy and without the heap.
        if self.tokens >= self.needed and (not self._heap or key_hash > -self._heap[0][0]):
            return [(ordinal, tokens)]
        # A copy: a slice would keep its whole array in memory. Ordinals differ, so that equal hashes never
        # compare arrays.
        heapq.heappush(self._heap, (-key_hash, ordinal, tokens.copy()))
        self.tokens += self._counted(tokens)
        released: list[Numbered] = []
        # Several at once if this document is longer than the last ones together.
        while self._heap and self.tokens - self._counted(self._heap[0][2]) >= self.needed:
            released.append(heapq.heappop(self._heap)[1:])
            self.tokens -= self._counted(released[-1][1])
        return released

    def _counted(self, tokens: Tokens) -> int:
        return len(tokens) - int(begin_with(self._bos, tokens[:1]).sum())

    def documents(self) -> list[Numbered]:
        """The held-out documents, in reading order."""
        return sorted((entry[1:] for entry in self._heap), key=lambda entry: entry[0])


def in_keyed_order(windows: Windows, key: int) -> Windows:
    """Return `windows` [n], numbered from 0, in ascending keyed hash."""
    return windows[np.argsort(keyed_hash(np.arange(len(windows)), key), kind="stable")]


def regroup(blocks: Iterable[Windows], size: int, limit: int) -> Iterator[Windows]:
    """Yield the first `limit` groups of `size` windows from `blocks` of any lengths: [size] each."""
    parts: list[Windows] = []
    held = made = 0
    for block in blocks:
        while len(block) and made < limit:
            part, block = block[: size - held], block[size - held :]
            parts.append(part)
            held += len(part)
            if held == size:
                yield np.concatenate(parts)
                parts, held, made = [], 0, made + 1
        # Here, so that no further block is read from the spill file.
        if made == limit:
            return
