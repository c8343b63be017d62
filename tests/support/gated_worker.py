"""A harvest worker that tells when it starts a unit and waits at a gate, so that tests can act in between.

`python -m tests.support.gated_worker ARGUMENTS...` is `winnow ARGUMENTS...` with such workers.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import ray

from winnow.harvester.run.ledger import UnitFacts
from winnow.harvester.run.worker import UnitWorker

GATE = "WINNOW_TEST_GATE"
"""Variable that names the folder: `<node>-<unit>` for each unit begun; `open` opens the gate."""
FREE_UNITS = 2
"""The first units pass a closed gate, unless the variable `FREE` has another number of them."""
FREE = "WINNOW_TEST_FREE_UNITS"


class GatedWorker(UnitWorker):
    """See the module."""

    def run(self, unit: int) -> UnitFacts:
        folder = Path(os.environ[GATE])
        (folder / f"{ray.get_runtime_context().get_node_id()}-{unit}").touch()
        free = int(os.environ.get(FREE, FREE_UNITS))
        while unit >= free and not (folder / "open").exists():
            time.sleep(0.01)
        return super().run(unit)


if __name__ == "__main__":
    from tests.support.gated_worker import GatedWorker as Importable
    from winnow.cli.main import app
    from winnow.harvester.run import driver

    driver.UnitWorker = Importable  # not of `__main__`, which Ray's processes do not have
    app(sys.argv[1:])
