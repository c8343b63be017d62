"""Memory of a training process, by arithmetic: what a step holds, tensor by tensor.

Held against torch's own account of allocations by tests/unit/test_memory.py.

Legend: B rows, D d_model, N latents, K active latents a row. Sizes are of one process: with a mesh, B is
its rows and N its latents.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from schemas.training import TrainSpec

FLOAT = 4
"""Bytes of a number: weights, gradients, moments and rows are float32."""
ROWS_ENCODING, ROWS_GRADIENTS = 3, 6
"""[B, D] held while rows are encoded: the batch as it came, normalised, centred; and while gradients are
made: the reconstruction, its error and the gradient by it beside them."""
ENTRY_BYTES = 36
"""Of one active latent of one row: value 4, index 8, and what sorting them by latent takes at its highest."""
TILE_BYTES = 1024 * 4096 * FLOAT
"""The encoder's tile of pre-activations; a mask of one byte a number stands beside it."""
BLOCK_BYTES = 2 << 20
"""A block of latents whose gradients are made at a time; one of the decoder's and one of the encoder's."""


class Memory(NamedTuple):
    """Bytes of one SAE on one device."""

    weights: int
    gradients: int
    moments: int
    """Adam's two."""
    average: int
    """The moving average, where one is kept."""
    counts: int
    """Rows since each latent was active."""
    step: int
    """What a step holds at its highest point, beside all that."""

    @property
    def standing(self) -> int:
        """What is held between steps, gradients included: they live as long as the run."""
        return self.weights + self.gradients + self.moments + self.average + self.counts

    @property
    def total(self) -> int:
        """All of it."""
        return self.standing + self.step


def parameters(d_model: int, latents: int) -> int:
    """Numbers in W_enc, W_dec, b_enc and b_pre."""
    return 2 * latents * d_model + latents + d_model


def sae_memory(
    spec: TrainSpec, d_model: int, *, rows: int | None = None, latents: int | None = None
) -> Memory:
    """What training one SAE takes on one device.

    Args:
        spec: How it is trained.
        d_model: D.
        rows: B of this process; the spec's whole batch where not given.
        latents: N of this process; all where not given.
    """
    rows, latents = rows or spec.batch_rows, latents or spec.latents
    size = parameters(d_model, latents) * FLOAT
    k = spec.k_start or spec.k  # of the widest step
    kept = k + (min(4 * k, latents) if spec.multi_topk else 0)
    tile = min(TILE_BYTES, min(rows, 1024) * min(latents, 4096) * FLOAT)
    one = rows * d_model * FLOAT
    encoding = ROWS_ENCODING * one + tile * 5 // 4
    gradients = ROWS_GRADIENTS * one + 2 * min(BLOCK_BYTES, size // 2)
    step = max(encoding, gradients) + rows * kept * ENTRY_BYTES
    return Memory(
        weights=size,
        gradients=size,
        moments=2 * size,
        average=size if spec.ema else 0,
        counts=8 * latents,
        step=step,
    )


def fleet_memory(specs: list[tuple[TrainSpec, int]]) -> int:
    """Bytes of several SAEs (spec, D) in one process: all that stands, and one step at a time."""
    found = [sae_memory(spec, d_model) for spec, d_model in specs]
    return sum(memory.standing for memory in found) + max(memory.step for memory in found)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on a device: a GPU's free memory, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    with suppress(OSError, ValueError):  # where there is no limit
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
