"""Whether a grid of SAEs fits into memory."""

from __future__ import annotations

from winnow.common.device import resolve_device
from winnow.common.figures import human_bytes
from winnow.schemas.errors import ConfigError
from winnow.schemas.training import TrainSpec
from winnow.store import ActivationStore
from winnow.trainer.plan.memory import fleet_memory, free_memory

ROOM = 0.9
"""Share of the free memory that a grid may take."""


def require_room(specs: list[TrainSpec], dataset: ActivationStore) -> int:
    """Bytes needed to train all specs in this process; ConfigError if they are not available."""
    device = resolve_device(specs[0].device)
    kind = "cuda" if device.type == "cuda" else "cpu"
    need = fleet_memory([(spec, dataset.d_model(spec.hook)) for spec in specs], kind)
    free = free_memory(device)
    if need > ROOM * free:
        parts = -(-need // max(1, int(ROOM * free)))
        raise ConfigError(
            f"{len(specs)} SAEs at once do not fit on {device}",
            expected=f"at most {ROOM:.0%} of the {human_bytes(free)} that are free",
            got=f"{human_bytes(need)} for weights, gradients, Adam and averages of all, and one step",
            fix=f"Split the grid into {parts} or more sweeps, or set ema to false",
        )
    return need
