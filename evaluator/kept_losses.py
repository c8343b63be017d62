"""Losses of the windows measured so far, kept beside an SAE so that the measurement resumes."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from winnow.common.figures import count_of
from winnow.common.reporter import say
from winnow.schemas.errors import IntegrityError, MissingObject, UnsupportedVersion
from winnow.schemas.evaluation import LOSSES_KEY, PartialLosses
from winnow.store.objects import ObjectStore

Losses = dict[str, NDArray[np.float64]]
"""Variant -> [windows] nats."""

WRITE_SECONDS = 10.0
"""Shortest time between two writes: what an interruption can lose, against a request per batch."""


class KeptLosses:
    """The object `losses.json` in the folder of an SAE.

    Args:
        out: The folder.
        settings: Digest of everything that the losses depend on. Losses kept with another are not read.
    """

    def __init__(self, out: ObjectStore, settings: str) -> None:
        self._out, self._settings = out, settings
        self._written = time.monotonic()
        found = self._found()
        self._begun: Losses = _arrays(found.losses) if found is not None else {}
        self.finished: dict[str, Losses] = {}
        """Of an SAE of several subjects: name of the dataset -> the losses in its subject, of all windows."""
        if found is not None:
            self.finished = {name: _arrays(losses) for name, losses in found.finished.items()}

    def begun(self, windows: int, label: str) -> Losses:
        """The kept losses of a measurement of so many windows, and a line that it resumes; empty if none."""
        if self._begun:
            done = len(next(iter(self._begun.values())))
            say(f"{label}: resuming after {count_of(done, 'window')} of {windows}")
        return self._begun

    def write(self, measured: Callable[[], Losses]) -> None:
        """Keep what `measured` returns, unless other losses were written within WRITE_SECONDS."""
        if time.monotonic() - self._written >= WRITE_SECONDS:
            self._put(measured())

    def finish(self, name: str, losses: Losses) -> None:
        """Keep the losses in one of several subjects, which are complete; those of the next begin."""
        self._begun = {}
        self.finished[name] = losses
        self._put({})

    def delete(self) -> None:
        """Remove the object: the figures are stored."""
        if self._out.size(LOSSES_KEY) is not None:
            self._out.delete(LOSSES_KEY)

    def _found(self) -> PartialLosses | None:
        try:
            found = PartialLosses.from_json(self._out.get(LOSSES_KEY), origin=f"{self._out.uri}/{LOSSES_KEY}")
        # What cannot be read is measured again: the file only saves time.
        except (MissingObject, IntegrityError, UnsupportedVersion):
            return None
        return found if found.settings_sha256 == self._settings else None

    def _put(self, begun: Losses) -> None:
        self._written = time.monotonic()
        every = (begun, *self.finished.values())
        # JSON has no NaN; an SAE that makes them is measured in one go.
        if not all(np.isfinite(values).all() for losses in every for values in losses.values()):
            return
        finished = {name: _lists(losses) for name, losses in self.finished.items()}
        kept = PartialLosses(settings_sha256=self._settings, losses=_lists(begun), finished=finished)
        self._out.put(LOSSES_KEY, kept.to_json())


def _arrays(losses: dict[str, tuple[float, ...]]) -> Losses:
    return {name: np.asarray(values) for name, values in losses.items()}


def _lists(losses: Losses) -> dict[str, tuple[float, ...]]:
    return {name: tuple(values.tolist()) for name, values in losses.items()}
