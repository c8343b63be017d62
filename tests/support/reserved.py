"""An actor that takes a harvest worker's place and tells what Ray has reserved for it."""

from __future__ import annotations

from typing import Any

import ray


class Reserved:
    """Takes whatever a worker is given."""

    def __init__(self, *_: Any) -> None:
        self._context = ray.get_runtime_context()

    def ready(self) -> str:
        return self._context.get_node_id()

    def resources(self) -> tuple[dict[str, float], list[str]]:
        """What is reserved, and the GPUs this process may see."""
        return self._context.get_assigned_resources(), self._context.get_accelerator_ids()["GPU"]
