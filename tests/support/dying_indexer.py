"""An index worker that dies once, in the middle of a part, as a machine might."""

from __future__ import annotations

import os
from pathlib import Path

from winnow.explorer.index.crew import IndexWorker

MARK = "WINNOW_TEST_DIED"
"""Variable that names a file: whoever creates it dies."""


class DyingWorker(IndexWorker):
    """See the module."""

    def run(self, step: str, number: int) -> None:
        if step == "part":
            try:
                Path(os.environ[MARK]).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os._exit(1)
        super().run(step, number)
