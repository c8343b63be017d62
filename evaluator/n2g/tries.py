"""Tries of n-grams with wildcards: an explanation that can be run. Pure.

An n-gram is a tuple of token ids that ends with the token on which the latent is active; `WILDCARD` stands
for any token. Earlier tokens may be wildcards, the last never is. Tries are walked backwards from the last
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WILDCARD = -1
Pattern = tuple[int, ...]


@dataclass
class _Node:
    children: dict[int, _Node] = field(default_factory=dict)
    total: float = 0.0
    count: int = 0


class Trie:
    """The n-grams on which one latent is expected to be active, each with the value to expect."""

    def __init__(self) -> None:
        self._root = _Node()

    def add(self, pattern: Pattern, value: float) -> None:
        """Add an n-gram; if it is added several times, its value is the mean.

        Raises:
            ValueError: The n-gram is empty, or its last place is a wildcard.
        """
        if not pattern or pattern[-1] == WILDCARD:
            raise ValueError(f"an n-gram must end with a token, got {pattern}")
        while pattern[0] == WILDCARD:  # "preceded by any token" says nothing
            pattern = pattern[1:]
        node = self._root
        for token in reversed(pattern):
            node = node.children.setdefault(token, _Node())
        node.total += value
        node.count += 1

    def predict(self, ids: Sequence[int], position: int) -> float | None:
        """Predict the value at a position of a window, or None if no n-gram ends there.

        It is that of the longest n-gram; of equally long ones, the more concrete from the end backwards.
        """
        # Depth first, because a token may continue both as itself and as a wildcard, and either may be
        # longer.
        best: tuple[int, float] | None = None
        stack = [(self._root, position, 0)]
        while stack:
            node, at, depth = stack.pop()
            # `>`, not `>=`: the more concrete of equally long n-grams comes first, and must stay.
            if node.count and (best is None or depth > best[0]):
                best = (depth, node.total / node.count)
            if at < 0:
                continue
            for token in (WILDCARD, int(ids[at])):  # pushed last, the concrete one is popped first
                child = node.children.get(token)
                if child is not None:
                    stack.append((child, at - 1, depth + 1))
        return best[1] if best else None

    def last_tokens(self) -> list[int]:
        """List the tokens that n-grams end with."""
        return list(self._root.children)

    def patterns(self) -> list[tuple[Pattern, float, int]]:
        """List (n-gram, mean value, times added), highest value first."""
        found: list[tuple[Pattern, float, int]] = []
        stack: list[tuple[_Node, Pattern]] = [(self._root, ())]
        while stack:
            node, pattern = stack.pop()
            if node.count:
                found.append((pattern, node.total / node.count, node.count))
            stack += [(child, (token, *pattern)) for token, child in node.children.items()]
        return sorted(found, key=lambda entry: (-entry[1], entry[0]))


class Firings(NamedTuple):
    """Places at which tries fire, in the order of window and position, as arrays of equal length."""

    windows: NDArray[np.int64]
    """Index of the window among those given."""
    positions: NDArray[np.int64]
    """Position in the window."""
    slots: NDArray[np.int64]
    """Number of the trie."""
    values: NDArray[np.float64]
    """Predicted activation."""


def fire(tries: Sequence[Trie], tokens: NDArray[np.int64], allowed: NDArray[np.bool_]) -> Firings:
    """Find every firing of every trie in some windows.

    Args:
        tries: One per latent.
        tokens: Token ids [W, T].
        allowed: bool [W, T]: where tries may fire. N-grams may reach back beyond it.
    """
    # By last token: most tokens end no n-gram at all, and a token that does is tried with a few tries only.
    by_last: dict[int, list[int]] = {}
    for slot, trie in enumerate(tries):
        for token in trie.last_tokens():
            by_last.setdefault(token, []).append(slot)
    last = np.array(sorted(by_last), np.int64)
    found: list[tuple[int, int, int, float]] = []
    for window, position in zip(*np.nonzero(np.isin(tokens, last) & allowed), strict=True):
        ids = tokens[window]
        for slot in by_last[int(ids[position])]:
            value = tries[slot].predict(ids, int(position))  # pyright: ignore[reportArgumentType]
            if value is not None:
                found.append((int(window), int(position), slot, value))
    table = np.array(found, np.float64).reshape(-1, 4)
    whole = table[:, :3].astype(np.int64)
    return Firings(whole[:, 0], whole[:, 1], whole[:, 2], table[:, 3])
