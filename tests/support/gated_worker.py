"""A harvest worker that tells when it starts a unit and waits at a gate, so that tests can act in between."""

from __future__ import annotations

import os
import time
from pathlib import Path

import ray

from winnow.harvester.run.ledger import UnitFacts
from winnow.harvester.run.worker import UnitWorker

GATE = "WINNOW_TEST_GATE"
"""Variable that names the folder: `<node>-<unit>` for each unit begun; `open` opens the gate."""
FREE_UNITS = 2
"""The first units pass a closed gate."""


class GatedWorker(UnitWorker):
    """See the module."""

    def run(self, unit: int) -> UnitFacts:
        folder = Path(os.environ[GATE])
        (folder / f"{ray.get_runtime_context().get_node_id()}-{unit}").touch()
        while unit >= FREE_UNITS and not (folder / "open").exists():
            time.sleep(0.01)
        return super().run(unit)
