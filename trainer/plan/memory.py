"""Memory of a training process, by arithmetic: what a step holds, tensor by tensor.

Held against torch's own account of allocations by tests/unit/trainer/plan/test_estimate.py.

Legend: B rows, D d_model, N latents, K active latents a row. Sizes are of one process: with a mesh, B is
its rows and N its latents.
"""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from winnow.schemas.training import MomentsDtype, TrainSpec
from winnow.trainer.kernels.segment_grad import BLOCK_BYTES, GPU_BLOCK_BYTES
from winnow.trainer.step.moments import BYTES

FLOAT = 4
"""Bytes of a number: weights, gradients, average and rows are float32, and moments unless packed."""
HALF = 2
"""Bytes of an operand in bfloat16."""
ROWS_ENCODING, ROWS_GRADIENTS = 3, 6
"""[B, D] held while rows are encoded: the batch as it came, normalised, centred; and while gradients are
made: the reconstruction, its error and the gradient by it beside them."""
ENTRY_BYTES = 36
"""Of one active latent of one row: value 4, index 8, and what sorting them by latent takes at its highest."""
TILE_BYTES = 1024 * 4096 * FLOAT
"""The encoder's tile of pre-activations; a mask of one byte a number stands beside it."""
SWEEP_SLOT_BYTES, SWEEP_SEED_SHARE = 1 << 28, 16
"""On a GPU: slots for what a sweep keeps, and the share of the latents that its pilot multiplies whole."""


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


def moments_bytes(kind: MomentsDtype, d_model: int, latents: int) -> int:
    """Of Adam's two moments: the matrices' packed, with a scale a row for `int8`, the biases' float32."""
    matrices, scales = 2 * latents * d_model, 2 * latents if kind == "int8" else 0
    return 2 * (matrices * BYTES[kind] + (scales + parameters(d_model, latents) - matrices) * FLOAT)


def sweep_bytes(spec: TrainSpec, rows: int, latents: int, k: int) -> int:
    """What `encode_topk` holds on a GPU: a pilot's pre-activations, or a sweep's slots (see its module)."""
    seed = max(-(-latents // SWEEP_SEED_SHARE), 8 * k)
    if 2 * seed > latents:  # no sweep
        return min(rows, 2048) * min(latents, 8192) * FLOAT * 5 // 4
    stripes = -(-latents // 1024)
    expected = k * latents / seed * min(1.0, 1024 / latents)
    slots = 1 << math.ceil(math.log2(expected + 6 * expected**0.5 + 4))
    chunk = min(rows, max(128, SWEEP_SLOT_BYTES // (8 * stripes * slots) // 128 * 128))
    a_number = FLOAT + HALF if spec.compute_dtype == "bfloat16" else FLOAT
    return max(chunk * seed * a_number, chunk * stripes * slots * 9)  # values, ids, a mask


def sae_memory(
    spec: TrainSpec,
    d_model: int,
    *,
    rows: int | None = None,
    latents: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Memory:
    """What training one SAE takes on one device.

    Args:
        spec: How it is trained.
        d_model: D.
        rows: B of this process; the spec's whole batch where not given. With `accumulate` a part of them
            is on the device at a time.
        latents: N of this process; all where not given.
        device: Whose kernels: what passes through their hands differs. Nothing is known to be right to the
            byte on a GPU before `python -m benchmarks.gpu` has run there.

    AuxK's tensors are left out: how many latents are dead is not known before. They are at most
    B x 12 k_aux numbers of a micro-batch, and with `accumulate` two rows of D for each dead latent.
    """
    rows, latents = -(-(rows or spec.batch_rows) // spec.accumulate), latents or spec.latents
    size = parameters(d_model, latents) * FLOAT
    k = min(spec.k_start or spec.k, latents)  # of the widest step; a shard may have fewer latents than K
    wide = min(4 * k, latents) if spec.multi_topk else 0
    kept, one = k + wide, rows * d_model * FLOAT
    if device == "cuda":
        encoding = ROWS_ENCODING * one + sweep_bytes(spec, rows, latents, max(k, wide))
        block = GPU_BLOCK_BYTES
    else:
        tile = min(TILE_BYTES, min(rows, 1024) * min(latents, 4096) * FLOAT)
        encoding, block = ROWS_ENCODING * one + tile * 5 // 4, BLOCK_BYTES
    gradients = ROWS_GRADIENTS * one + 2 * min(block, size // 2)
    step = max(encoding, gradients) + rows * kept * ENTRY_BYTES
    if device == "cuda" and spec.accumulate == 1:
        step += one  # the next step's rows, which travel meanwhile
    if spec.compute_dtype == "bfloat16":  # both matrices, and a copy of the rows
        step += (2 * latents * d_model + rows * d_model) * (HALF if device == "cuda" else FLOAT)
    return Memory(
        weights=size,
        gradients=size,
        moments=moments_bytes(spec.moments, d_model, latents),
        average=size if spec.ema else 0,
        counts=8 * latents,
        step=step,
    )


def fleet_memory(specs: list[tuple[TrainSpec, int]], device: Literal["cpu", "cuda"] = "cpu") -> int:
    """Bytes of several SAEs (spec, D) in one process: all that stands, and one step at a time."""
    found = [sae_memory(spec, d_model, device=device) for spec, d_model in specs]
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
