"""Snippets of text for the judge: cut out of windows, with the tokens a latent is active on marked.

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
    fires: tuple[bool, ...]
    """On which of them the latent is active."""

    def text(self, marked: Sequence[bool] | None = None) -> str:
        """On one line, with « » around each run of marked tokens."""
        parts, inside = list[str](), False
        for token, mark in zip(self.tokens, marked or [False] * len(self.tokens), strict=True):
            if mark != inside:
                parts.append("«" if mark else "»")
                inside = mark
            parts.append(token.replace("«", "<<").replace("»", ">>"))
        return re.sub(r"\s*\n\s*", " / ", "".join(parts) + ("»" if inside else "")).strip()


class Where:
    """On which tokens of some windows each chosen latent is active: bool [W, T] for one latent at a time."""

    def __init__(self, latents: NDArray[np.int64], windows: range, context: int, total: int) -> None:
        self._slot = np.full(total, -1, np.int64)
        self._slot[latents] = np.arange(len(latents))
        self._windows, self._context = windows, context
        self._places: list[NDArray[np.int64]] = []

    def add(self, codes: Codes) -> Codes:
        """Note a stream's codes as they pass."""
        entries = active(codes)
        slots = self._slot[entries.latents]
        mine = slots >= 0
        place = (entries.windows[mine] - self._windows.start) * self._context + entries.positions[mine]
        self._places.append(np.stack([slots[mine], place]))
        return codes

    def of(self, slot: int) -> NDArray[np.bool_]:
        """[W, T] of one chosen latent."""
        out = np.zeros(len(self._windows) * self._context, np.bool_)
        for places in self._places:
            out[places[1][places[0] == slot]] = True
        return out.reshape(len(self._windows), self._context)


class Snippets:
    """Cuts snippets out of windows.

    Args:
        tokens: [W, T] of the windows.
        width: Tokens of a snippet.
        word: Token id -> text.
    """

    def __init__(self, tokens: NDArray[np.int64], width: int, word: Callable[[int], str]) -> None:
        self._tokens, self._width, self._word = tokens, min(width, tokens.shape[1]), word

    def around(self, fires: NDArray[np.bool_], window: int, position: int) -> Snippet:
        """The snippet with a position in its third quarter, as near as the window's edges allow."""
        first = min(max(position - 3 * self._width // 4, 0), self._tokens.shape[1] - self._width)
        part = slice(first, first + self._width)
        words = tuple(self._word(int(token)) for token in self._tokens[window, part])
        return Snippet(words, tuple(bool(fire) for fire in fires[window, part]))

    def silent(self, fires: NDArray[np.bool_], count: int, draw: np.random.Generator) -> list[Snippet]:
        """Random snippets without an activation; fewer where few are found."""
        found = list[Snippet]()
        for _ in range(20 * count):
            if len(found) == count:
                break
            window = int(draw.integers(len(self._tokens)))
            snippet = self.around(fires, window, int(draw.integers(self._tokens.shape[1])))
            if not any(snippet.fires):
                found.append(snippet)
        return found


def wrong_marks(snippet: Snippet, draw: np.random.Generator) -> list[bool] | None:
    """As many marks as the snippet has active tokens, all on others; None where it has too few others."""
    others = [i for i, fires in enumerate(snippet.fires) if not fires]
    count = sum(snippet.fires)
    if not 0 < count <= len(others):
        return None
    marks = np.zeros(len(snippet.fires), np.bool_)
    marks[draw.choice(others, count, replace=False)] = True
    return [bool(mark) for mark in marks]
