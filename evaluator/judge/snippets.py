"""Snippets of text for the judge, cut out of windows, in which the tokens a latent is active on are marked.

Letters: W windows, T context length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from winnow.evaluator.activations import active
from winnow.evaluator.setting import Codes


@dataclass(frozen=True)
class Snippet:
    """Some neighbouring tokens of a window."""

    tokens: tuple[str, ...]
    """Text of each token."""
    fires: tuple[bool, ...]
    """Whether the latent is active on each."""

    def text(self, marked: Sequence[bool] | None = None) -> str:
        """Render the snippet on one line, with « » around each run of marked tokens."""
        parts, inside = list[str](), False
        for token, mark in zip(self.tokens, marked or [False] * len(self.tokens), strict=True):
            if mark != inside:
                parts.append("«" if mark else "»")
                inside = mark
            # The text's own guillemets would be taken for marks.
            parts.append(token.replace("«", "<<").replace("»", ">>"))
        # One line, since snippets are numbered lines of a list.
        return re.sub(r"\s*\n\s*", " / ", "".join(parts) + ("»" if inside else "")).strip()


class ActivePlaces:
    """The tokens of some windows on which chosen latents are active: bool [W, T] for one latent at a time."""

    def __init__(self, latents: NDArray[np.int64], windows: range, context: int, total: int) -> None:
        # Places are kept as numbers, and a mask is made on demand: a mask for every latent would be n x W x
        # T.
        self._slot = np.full(total, -1, np.int64)
        self._slot[latents] = np.arange(len(latents))
        self._windows, self._context = windows, context
        self._places: list[NDArray[np.int64]] = []

    def add(self, codes: Codes) -> Codes:
        """Record a stream's codes and pass them on."""
        entries = active(codes)
        slots = self._slot[entries.latents]
        mine = slots >= 0
        place = (entries.windows[mine] - self._windows.start) * self._context + entries.positions[mine]
        self._places.append(np.stack([slots[mine], place]))
        return codes

    def of(self, slot: int) -> NDArray[np.bool_]:
        """Return the mask [W, T] of one chosen latent."""
        out = np.zeros(len(self._windows) * self._context, np.bool_)
        for places in self._places:
            out[places[1][places[0] == slot]] = True
        return out.reshape(len(self._windows), self._context)


class Snippets:
    """Cuts snippets out of windows.

    Args:
        tokens: Token ids [W, T] of the windows.
        width: Length of a snippet in tokens.
        word: Token id -> text.
    """

    def __init__(self, tokens: NDArray[np.int64], width: int, word: Callable[[int], str]) -> None:
        self._tokens, self._width, self._word = tokens, min(width, tokens.shape[1]), word

    def around(self, fires: NDArray[np.bool_], window: int, position: int) -> Snippet:
        """Cut the snippet that has a position at three quarters of its width, as far as the window allows."""
        # More before than after it: a causal model has read only what comes before.
        first = min(max(position - 3 * self._width // 4, 0), self._tokens.shape[1] - self._width)
        part = slice(first, first + self._width)
        words = tuple(self._word(int(token)) for token in self._tokens[window, part])
        return Snippet(words, tuple(bool(fire) for fire in fires[window, part]))

    def silent(self, fires: NDArray[np.bool_], count: int, draw: np.random.Generator) -> list[Snippet]:
        """Draw snippets without an activation; fewer if few are found."""
        # Bounded, because a latent that is active nearly everywhere may have no such snippet.
        found = list[Snippet]()
        for _ in range(20 * count):
            if len(found) == count:
                break
            window = int(draw.integers(len(self._tokens)))
            # Cut like the positive ones, so that the cut does not give the answer away.
            snippet = self.around(fires, window, int(draw.integers(self._tokens.shape[1])))
            if not any(snippet.fires):
                found.append(snippet)
        return found


def wrong_marks(snippet: Snippet, draw: np.random.Generator) -> list[bool] | None:
    """Mark as many tokens as are active, all of them others; None if the snippet has too few others."""
    # As many: their number must not tell right marks from wrong ones.
    others = [i for i, fires in enumerate(snippet.fires) if not fires]
    count = sum(snippet.fires)
    if not 0 < count <= len(others):
        return None
    marks = np.zeros(len(snippet.fires), np.bool_)
    marks[draw.choice(others, count, replace=False)] = True
    return [bool(mark) for mark in marks]
