"""Losses of the windows measured so far, kept beside an SAE so that the measurement resumes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from winnow.evaluator.families.downstream import Losses
from winnow.schemas.base import canonical_json, sha256_hex
from winnow.schemas.errors import IntegrityError, UnsupportedVersion
from winnow.schemas.evaluation import LOSSES_KEY, PartialLosses
from winnow.store.objects import ObjectStore

WRITE_SECONDS = 10.0
"""Shortest time between two writes: what an interruption can lose, against a request per batch."""


class KeptLosses:
    """The object `losses.json` in the folder of an SAE.

    Args:
        out: The folder.
        facts: Everything that the losses depend on, as JSON-compatible values. Losses kept with other facts
            are not read.
    """

    def __init__(self, out: ObjectStore, facts: Mapping[str, Any]) -> None:
        self._out, self._settings = out, sha256_hex(canonical_json(facts))
        self._written = time.monotonic()

    def read(self) -> Losses:
        """The kept losses, each [windows measured]; empty if there are none of these settings."""
        if self._out.size(LOSSES_KEY) is None:
            return {}
        try:
            found = PartialLosses.from_json(self._out.get(LOSSES_KEY), origin=f"{self._out.uri}/{LOSSES_KEY}")
        # What cannot be read is measured again: the file only saves time.
        except (IntegrityError, UnsupportedVersion):
            return {}
        if found.settings_sha256 != self._settings:
            return {}
        return {name: np.asarray(values) for name, values in found.losses.items()}

    def write(self, measured: Callable[[], Losses]) -> None:
        """Keep what `measured` returns, unless other losses were written within WRITE_SECONDS."""
        if time.monotonic() - self._written < WRITE_SECONDS:
            return
        self._written, losses = time.monotonic(), measured()
        # JSON has no NaN; an SAE that makes them is measured in one go.
        if all(np.isfinite(values).all() for values in losses.values()):
            lists = {name: tuple(values.tolist()) for name, values in losses.items()}
            self._out.put(LOSSES_KEY, PartialLosses(settings_sha256=self._settings, losses=lists).to_json())
