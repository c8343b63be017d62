"""`winnow` in a process that gets a real limit on its memory, and hits it, while it harvests.

    python -m tests.support.starved UNITS harvest CONFIG ...

Once so many units are committed, the driver's address space is limited to little more than it has, and it
asks for more than that: what follows is the system's own refusal, in a process that stays that poor.
"""

from __future__ import annotations

import resource
import sys

import numpy as np
import psutil

from winnow.cli.main import main as command
from winnow.harvester.run.ledger import RunLedger, UnitFacts

SPARE_BYTES = 512 * 2**20


def main() -> None:
    """See the module."""
    units = int(sys.argv.pop(1))
    add = RunLedger.add

    def starve(self: RunLedger, facts: UnitFacts) -> None:
        add(self, facts)
        if self.units == units:
            limit = psutil.Process().memory_info().vms + SPARE_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            np.empty(2 * SPARE_BYTES, np.uint8)

    RunLedger.add = starve
    command()


if __name__ == "__main__":
    main()
