"""What the tokens are on which a latent fires: role, turn and source, from the labels of the dataset."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.errors import ConfigError
from winnow.store import ActivationStore

_NAMES = ("role", "turn", "source")
# The examples of a latent come from up to 36 units, and the next page's from others. A unit of 131,072 tokens
# has 655 KB of these labels.
_CACHED_UNITS = 64


class Kinds:
    """Reads labels of single tokens; safe to use from threads.

    Args:
        dataset: Opens the dataset.
    """

    def __init__(self, dataset: Callable[[], ActivationStore]) -> None:
        self._dataset = dataset
        self._units: OrderedDict[int, Mapping[str, NDArray[np.generic]]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def known(self) -> bool:
        """Whether the dataset has labels; those planned by earlier versions have none."""
        return self._dataset().plan.labels is not None

    def of(self, fingerprint: str, places: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """What some tokens are.

        Args:
            fingerprint: Of the plan that numbers the windows.
            places: Window and position of each token.

        Returns:
            `roles` and `sources`, all of the dataset, and `tokens`: for each place the numbers of its role
            and source, and its turn.

        Raises:
            ConfigError: The dataset has no labels, or another plan.
        """
        plan = self._dataset().plan
        if plan.labels is None:
            raise ConfigError("labels", expected="a dataset with labels", got="one of an earlier version")
        if plan.fingerprint != fingerprint:
            raise ConfigError("labels", expected="the dataset that was indexed", got="another one")
        found: list[dict[str, int]] = []
        for window, position in places:
            unit, within = divmod(window, plan.spec.windows_per_unit)
            labels = self._unit(unit)
            found.append({name: int(labels[name][within, position]) for name in _NAMES})
        # The last part of an address: a path of the server's disk is nobody's business.
        sources = [PurePosixPath(source.uri).name or source.uri for source in plan.corpus.sources]
        return {"roles": list(plan.labels.roles), "sources": sources, "tokens": found}

    def _unit(self, unit: int) -> Mapping[str, NDArray[np.generic]]:
        with self._lock:
            if unit in self._units:
                self._units.move_to_end(unit)
                return self._units[unit]
        # Outside the lock: other pages are answered while storage is read.
        labels = self._dataset().unit_labels(unit, _NAMES)
        with self._lock:
            self._units[unit] = labels
            while len(self._units) > _CACHED_UNITS:
                self._units.popitem(last=False)
        return labels
