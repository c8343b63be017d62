"""More of the text around an example: the rest of its document, whose parts are spread over windows.

Windows are shuffled over the corpus, so a document's next part is in any of them. The labels `document` and
`offset` find it: the window whose last token is the one before, or whose first is the one after.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.errors import ConfigError
from winnow.store import ActivationStore

# 12 bytes of labels per token, read once: 1.6 GB.
_SEARCHED_TOKENS = 1 << 27
"""Tokens of the largest dataset in which other windows are searched."""
_LABELS = ("document", "offset")


class _Ends(NamedTuple):
    """First or last tokens of all windows, sorted by what `_key` makes of them."""

    key: NDArray[np.uint64]
    window: NDArray[np.int64]

    @classmethod
    def of(cls, keys: NDArray[np.uint64]) -> _Ends:
        order = np.argsort(keys, kind="stable")
        return cls(keys[order], order)

    def find(self, document: int, offset: int) -> int | None:
        """The window of this token."""
        key = _key(np.uint64(document), np.uint64(offset))
        at = int(np.searchsorted(self.key, key))
        return int(self.window[at]) if at < len(self.key) and self.key[at] == key else None


class Around(NamedTuple):
    """The tokens around one, of its document."""

    ids: list[int]
    at: int
    """Which of them it is."""
    begins: bool
    """Whether the document begins with the first of them."""
    before: bool
    """Whether the dataset has more of it before them."""
    after: bool
    """Whether the dataset has more of it after them."""
    document: bool
    """Whether other windows were searched; otherwise this is text of the window, of one document or not."""


class Contexts:
    """Reads texts around tokens; safe to use from threads.

    Args:
        dataset: Opens the dataset.
    """

    def __init__(self, dataset: Callable[[], ActivationStore]) -> None:
        self._dataset = dataset
        self._found: tuple[_Ends, _Ends] | None = None
        self._lock = threading.Lock()

    def around(self, fingerprint: str, window: int, position: int, before: int, after: int) -> Around:
        """The text around a token.

        Args:
            fingerprint: Of the plan that numbers the windows.
            window: Its window.
            position: Its position there.
            before: Most tokens before it.
            after: Most tokens after it.

        Raises:
            ConfigError: No such token, or the dataset has another plan.
        """
        dataset = self._dataset()
        plan = dataset.plan
        if plan.fingerprint != fingerprint:
            raise ConfigError("text", expected="the dataset that was indexed", got="another one")
        if not (0 <= window < plan.windows and 0 <= position < plan.spec.context_length):
            expected = f"a window below {plan.windows}, a position below {plan.spec.context_length}"
            raise ConfigError("window, position", expected=expected, got=(window, position))
        if plan.labels is None or plan.windows * plan.spec.context_length > _SEARCHED_TOKENS:
            return self._of_window(dataset, window, position, before, after)
        return self._of_document(dataset, window, position, before, after)

    @staticmethod
    def _of_window(dataset: ActivationStore, window: int, position: int, before: int, after: int) -> Around:
        ids = dataset.tokens(window).tolist()
        first, stop = max(0, position - before), min(len(ids), position + after + 1)
        return Around(ids[first:stop], position - first, False, first > 0, stop < len(ids), False)

    def _of_document(
        self, dataset: ActivationStore, window: int, position: int, before: int, after: int
    ) -> Around:
        begins, ends = self._ends(dataset)
        document = int(self._labels(dataset, window)["document"][position])
        ids, offset = self._part(dataset, window, document)
        place = self._labels(dataset, window)["offset"][position]
        # BOS has the offset of the token after it, and is not of the document: what is around it is the same.
        at = int(place) - offset
        while at < before and offset > 0:
            found = ends.find(document, offset - 1)
            if found is None:
                break
            more, offset = self._part(dataset, found, document)
            ids, at = more + ids, at + len(more)
        while len(ids) - at - 1 < after:
            found = begins.find(document, offset + len(ids))
            if found is None:
                break
            ids = ids + self._part(dataset, found, document)[0]
        start, stop = max(0, at - before), min(len(ids), at + after + 1)
        more_before = start > 0 or (offset > 0 and ends.find(document, offset - 1) is not None)
        more_after = stop < len(ids) or begins.find(document, offset + len(ids)) is not None
        return Around(ids[start:stop], at - start, offset + start == 0, more_before, more_after, True)

    def _part(self, dataset: ActivationStore, window: int, document: int) -> tuple[list[int], int]:
        """A window's tokens of a document, without BOS, and the offset of the first."""
        labels = self._labels(dataset, window)
        own = labels["document"] == document
        # A BOS is labelled as the token after it.
        own[0] &= any(labels[name][0] != labels[name][1] for name in _LABELS)
        return dataset.tokens(window)[own].tolist(), int(labels["offset"][own][0])

    @staticmethod
    def _labels(dataset: ActivationStore, window: int) -> dict[str, NDArray[Any]]:
        unit, within = divmod(window, dataset.plan.spec.windows_per_unit)
        return {name: each[within] for name, each in dataset.unit_labels(unit, _LABELS).items()}

    def _ends(self, dataset: ActivationStore) -> tuple[_Ends, _Ends]:
        """The first tokens of all windows, and the last, read once."""
        with self._lock:
            if self._found is None:
                sides: tuple[list[NDArray[np.uint64]], list[NDArray[np.uint64]]] = ([], [])
                for unit in range(dataset.plan.units):
                    labels = dataset.unit_labels(unit, _LABELS)
                    for side, at in zip(sides, (0, -1), strict=True):
                        side.append(_key(labels["document"][:, at], labels["offset"][:, at]))
                first, last = (np.concatenate(side) for side in sides)
                self._found = _Ends.of(first), _Ends.of(last)
        return self._found


def _key(document: Any, offset: Any) -> Any:
    """One number per token of the corpus: a corpus of 2^27 tokens has fewer than 2^32 documents."""
    return np.uint64(document) << np.uint64(32) | np.uint64(offset)
