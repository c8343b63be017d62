"""Documents to windows, the held-out documents, and the order of windows. Pure: no I/O.

Letters: T context length, W windows per unit, n windows or documents at hand.

The training stream is the documents that are not held out, in reading order except that a document
which was held out for a while joins when it is released. Everything follows from the corpus and
the seed; nothing depends on batch sizes, threads or the number of buckets.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from winnow.common.hashing import keyed_hash
from winnow.store.format.layout import philox_key

Tokens = NDArray[np.generic]
"""Token ids: uint16 if the vocabulary allows, else uint32."""


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
        dtype: dtype of the windows.
    """

    def __init__(self, context_length: int, bos: int | None, dtype: np.dtype[np.generic]) -> None:
        self.context_length, self.bos = context_length, bos
        self.payload = context_length - (bos is not None)
        """Tokens of the stream per window."""
        self.tail: Tokens = np.empty(0, dtype)
        """Tokens that do not fill a window yet."""

    def push(self, tokens: Iterable[Tokens]) -> Tokens:
        """Continue the stream with `tokens`, and return the windows [n, T] that are now full."""
        stream = np.concatenate([self.tail, *tokens])
        count = len(stream) // self.payload
        body = stream[: count * self.payload].reshape(count, self.payload)
        # A copy: a view would keep the whole stream of this call in memory.
        self.tail = stream[count * self.payload :].copy()
        if self.bos is None:
            return body
        windows = np.empty((count, self.context_length), body.dtype)
        windows[:, 0] = self.bos
        windows[:, 1:] = body
        return windows


class Holdout:
    """Sets aside the documents with the smallest hashes: just as many as hold `needed` tokens.

    One pass, memory for `needed` tokens and a document: a document is released, for good, as soon as the
    ones with smaller hashes suffice. The outcome is the shortest run of documents, in ascending hash, with
    `needed` tokens, whatever order they arrive in.
    """

    def __init__(self, needed: int) -> None:
        self.needed, self.tokens = needed, 0
        self._heap: list[tuple[int, int, Tokens]] = []  # (-hash, ordinal, tokens): the largest hash first

    def push(self, ordinal: int, key_hash: int, tokens: Tokens) -> list[Tokens]:
        """Offer a document, and return those that are released now, possibly this one."""
        # Enough is held, all with smaller hashes: the usual case, without a copy and without the heap.
        if self.tokens >= self.needed and (not self._heap or key_hash > -self._heap[0][0]):
            return [tokens]
        # A copy: a slice would keep its whole array in memory. Ordinals differ, so that equal hashes never
        # compare arrays.
        heapq.heappush(self._heap, (-key_hash, ordinal, tokens.copy()))
        self.tokens += len(tokens)
        released: list[Tokens] = []
        # Several at once if this document is longer than the last ones together.
        while self._heap and self.tokens - len(self._heap[0][2]) >= self.needed:
            released.append(heapq.heappop(self._heap)[2])
            self.tokens -= len(released[-1])
        return released

    def documents(self) -> list[Tokens]:
        """The held-out documents, in reading order."""
        return [tokens for _, _, tokens in sorted(self._heap, key=lambda entry: entry[1])]


def in_keyed_order(windows: Tokens, key: int) -> Tokens:
    """Return `windows` [n, T], numbered from 0, in ascending keyed hash."""
    return windows[np.argsort(keyed_hash(np.arange(len(windows)), key), kind="stable")]


def regroup(blocks: Iterable[Tokens], size: int, limit: int) -> Iterator[Tokens]:
    """Yield the first `limit` groups of `size` windows from `blocks` of any lengths: [size, T] each."""
    parts: list[Tokens] = []
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
